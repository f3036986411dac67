//! Many continuations at once against each of them alone, on tiny random models and on a real one.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test may stop where it stands, and says why it was skipped"
)]

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::slice;
use std::sync::Arc;
use tailorq_model::testing::TinyModel;
use tailorq_model::{Batch, KvCache, OpenedModel};
use tailorq_runtime::{
    BatchOptions, BatchProgress, Completion, CompletionRequest, Device, FinishReason, GenerationOptions, KvType,
    PREFIX_CHUNK, RuntimeError, SamplerOptions, Session, generate, generate_batch,
};
use tailorq_tensor::Rng;

struct Fixture {
    opened: OpenedModel,
    device: Arc<dyn Device>,
}

impl Fixture {
    fn new(change: impl FnOnce(&mut TinyModel)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut tiny = TinyModel::new("qwen2", 7).unwrap();
        change(&mut tiny);
        tiny.write_directory(dir.path()).unwrap();
        // The files are memory-mapped, so they may lose their names.
        Fixture { opened: tailorq_model::open(dir.path().to_str().unwrap()).unwrap(), device: tailorq_kernels::cpu() }
    }

    fn batch(&self, requests: &[CompletionRequest], options: &BatchOptions) -> Vec<Completion> {
        self.listen(requests, options, &mut |_| ControlFlow::Continue(())).unwrap()
    }

    fn listen(
        &self,
        requests: &[CompletionRequest],
        options: &BatchOptions,
        on_progress: &mut dyn FnMut(BatchProgress<'_>) -> ControlFlow<()>,
    ) -> Result<Vec<Completion>, RuntimeError> {
        let OpenedModel { model, tokenizer, .. } = &self.opened;
        generate_batch(model, tokenizer, self.device.as_ref(), requests, options, on_progress)
    }

    fn alone(&self, request: &CompletionRequest) -> Completion {
        let mut session = Session::new(&self.opened.model, self.device.as_ref());
        let options = GenerationOptions {
            max_tokens: request.max_tokens,
            stop: request.stop.clone(),
            sampler: SamplerOptions::GREEDY,
        };
        let go_on = &mut |_: tailorq_runtime::Piece<'_>| ControlFlow::Continue(());
        let tokenizer = &self.opened.tokenizer;
        let g = generate(&mut session, tokenizer, &request.prompt, &options, &|| false, go_on).unwrap();
        Completion { text: g.text, tokens: g.tokens, finish: g.finish, cut_tokens: 0 }
    }
}

fn random_ids(n: usize, seed: u64) -> Vec<u32> {
    let mut rng = Rng::new(seed);
    (0..n).map(|_| rng.below(256) as u32).collect()
}

/// Prompts of all kinds: short, long, twice the same, and several with two chunks in common.
fn requests() -> Vec<CompletionRequest> {
    let common = random_ids(2 * PREFIX_CHUNK + 10, 100);
    let mut prompts: Vec<Vec<u32>> = (0..14).map(|i| random_ids(1 + 23 * i % 61, i as u64)).collect();
    prompts.extend((0..5).map(|i| [&common[..], &random_ids(3 + i, 50 + i as u64)].concat()));
    prompts.push(common[..2 * PREFIX_CHUNK].to_vec());
    prompts.push(common[..PREFIX_CHUNK + 1].to_vec());
    prompts.push(prompts[3].clone());
    let ask = |(i, prompt): (usize, Vec<u32>)| {
        let stop = if i % 3 == 0 { ('a'..='z').map(String::from).collect() } else { vec![] };
        CompletionRequest { prompt, max_tokens: [0, 1, 9, 25][i % 4], stop }
    };
    prompts.into_iter().enumerate().map(ask).collect()
}

#[test]
fn every_sequence_gets_what_it_gets_alone() {
    let fixture = Fixture::new(|_| {});
    let requests = requests();
    let expected: Vec<Completion> = requests.iter().map(|r| fixture.alone(r)).collect();
    for finish in [FinishReason::MaxTokens, FinishReason::StopString] {
        assert!(expected.iter().any(|c| c.finish == finish), "no sequence ends with {}", finish.name());
    }
    for (sequences, kv_bytes) in [(1, usize::MAX), (3, usize::MAX), (12, usize::MAX), (40, usize::MAX), (12, 500_000)] {
        let options = BatchOptions { sequences, kv_bytes, ..BatchOptions::default() };
        assert_eq!(fixture.batch(&requests, &options), expected, "{sequences} sequences, {kv_bytes} bytes");
    }
    assert!(fixture.batch(&[], &BatchOptions::default()).is_empty());
    // In another precision the words may be others, but not because of the company.
    for kv in [KvType::F16, KvType::Q8] {
        let together = fixture.batch(&requests, &BatchOptions { kv, ..BatchOptions::default() });
        assert_eq!(fixture.batch(&requests, &BatchOptions { kv, sequences: 1, ..BatchOptions::default() }), together);
        assert_eq!(together.len(), expected.len());
    }
}

#[test]
fn an_end_token_ends_one_sequence_and_not_the_others() {
    let mut fixture = Fixture::new(|_| {});
    let requests: Vec<CompletionRequest> =
        (0..6).map(|i| CompletionRequest { prompt: random_ids(8, i), max_tokens: 20, stop: vec![] }).collect();
    let free: Vec<Completion> = requests.iter().map(|r| fixture.alone(r)).collect();
    fixture.opened.tokenizer.eos = vec![free[2].tokens[5]];
    let expected: Vec<Completion> = requests.iter().map(|r| fixture.alone(r)).collect();
    assert_eq!(expected[2].finish, FinishReason::EndOfSequence);
    assert!(expected.iter().any(|c| c.finish == FinishReason::MaxTokens), "the others go on");
    assert_eq!(fixture.batch(&requests, &BatchOptions::default()), expected);
}

/// What the default number of sequences rests on: up to 12 rows are computed one by one.
#[test]
fn a_step_of_up_to_twelve_sequences_has_the_bits_of_each_alone() {
    let fixture = Fixture::new(|tiny| {
        (tiny.config.hidden, tiny.config.n_heads, tiny.config.intermediate) = (144, 9, 208);
        (tiny.config.n_kv_heads, tiny.config.vocab) = (3, 700);
    });
    let (model, device) = (&fixture.opened.model, fixture.device.as_ref());
    let mut caches: Vec<KvCache> = Vec::new();
    for i in 0..BatchOptions::default().sequences {
        let mut cache = KvCache::new();
        let prompt = random_ids(1 + 17 * i, i as u64);
        model.hidden(device, &Batch::new([&prompt[..]]), Some(slice::from_mut(&mut cache)));
        caches.push(cache);
    }
    let next = random_ids(caches.len(), 77);
    let alone: Vec<Vec<u32>> = (next.iter().zip(&caches))
        .map(|(id, cache)| {
            let hidden = model.hidden(device, &Batch::new([slice::from_ref(id)]), Some(&mut [cache.clone()]));
            model.logits(device, &hidden).data().iter().map(|l| l.to_bits()).collect()
        })
        .collect();
    for n in 1..=caches.len() {
        let mut caches = caches[..n].to_vec();
        let hidden = model.hidden(device, &Batch::new(next[..n].iter().map(slice::from_ref)), Some(&mut caches));
        let logits = model.logits(device, &hidden);
        for (row, alone) in alone[..n].iter().enumerate() {
            let bits: Vec<u32> = logits.row(row).iter().map(|l| l.to_bits()).collect();
            assert!(bits == *alone, "row {row} of {n}");
        }
    }
}

/// A prompt computes the same whether its beginning was read for it or for another.
#[test]
fn shared_chunks_change_no_bit() {
    let fixture = Fixture::new(|_| {});
    let (model, device) = (&fixture.opened.model, fixture.device.as_ref());
    let prompt = random_ids(3 * PREFIX_CHUNK + 40, 5);
    let read = |cache: &mut KvCache, ids: &[u32]| {
        let chunks = ids.chunks(PREFIX_CHUNK);
        let hidden = chunks.map(|c| model.hidden(device, &Batch::new([c]), Some(slice::from_mut(cache)))).last();
        hidden.unwrap().into_vec()
    };
    let mut whole = KvCache::new();
    let expected = read(&mut whole, &prompt);
    let mut other = KvCache::new();
    read(&mut other, &[&prompt[..2 * PREFIX_CHUNK + 30], &random_ids(200, 6)].concat());
    other.truncate(2 * PREFIX_CHUNK);
    assert_eq!(read(&mut other, &prompt[2 * PREFIX_CHUNK..]), expected);
}

#[test]
fn long_prompts_lose_their_beginning() {
    let fixture = Fixture::new(|tiny| tiny.config.max_positions = 64);
    let prompt = random_ids(100, 1);
    let request = CompletionRequest { prompt: prompt.clone(), max_tokens: 10, stop: vec![] };
    let short = CompletionRequest { prompt: prompt[46..].to_vec(), ..request.clone() };
    let [long] = &fixture.batch(slice::from_ref(&request), &BatchOptions::default())[..] else { panic!() };
    assert_eq!((long.cut_tokens, &long.tokens), (46, &fixture.alone(&short).tokens));
    let options = BatchOptions { context: Some(32), ..BatchOptions::default() };
    assert_eq!(fixture.batch(slice::from_ref(&request), &options)[0].cut_tokens, 78);
}

#[test]
fn requests_that_cannot_be_continued_are_errors() {
    let fixture = Fixture::new(|tiny| tiny.config.max_positions = 64);
    let ask = |prompt: &[u32], max_tokens| {
        let requests = [CompletionRequest { prompt: prompt.to_vec(), max_tokens, stop: vec![] }];
        fixture.listen(&requests, &BatchOptions::default(), &mut |_| ControlFlow::Continue(())).unwrap_err()
    };
    assert!(matches!(ask(&[], 3), RuntimeError::EmptyPrompt));
    assert!(matches!(ask(&[1, 259], 3), RuntimeError::UnknownToken { id: 259, position: 1, .. }));
    assert!(matches!(ask(&[1], 64), RuntimeError::ContextFull { needed: 65, limit: 64 }));
    assert!(matches!(ask(&[1], usize::MAX), RuntimeError::ContextFull { .. }));
}

#[test]
fn progress_names_every_finished_one_once_and_can_stop_the_work() {
    let fixture = Fixture::new(|_| {});
    let requests = requests();
    let mut heard = vec![0; requests.len()];
    let mut last = (0, 0);
    let all = fixture
        .listen(&requests, &BatchOptions::default(), &mut |progress| {
            if let Some((i, completion)) = progress.finished {
                assert!(completion.tokens.len() <= requests[i].max_tokens);
                heard[i] += 1;
            }
            assert!(progress.done >= last.0, "progress goes forwards");
            last = (progress.done, progress.total);
            ControlFlow::Continue(())
        })
        .unwrap();
    assert_eq!((heard, last), (vec![1; requests.len()], (all.len(), all.len())));
    for stop_at in [0, 1, 30] {
        let mut calls = 0;
        let stopped = fixture.listen(&requests, &BatchOptions::default(), &mut |_| {
            calls += 1;
            if calls > stop_at { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        assert!(matches!(stopped, Err(RuntimeError::Interrupted)));
        assert_eq!(calls, stop_at + 1, "nothing happens after the break");
    }
}

/// The reference's greedy tokens, its three prompts continued together.
fn check_golden(file: &str, numbers: &str) {
    let find = |variable: &str| {
        let value = std::env::var_os(variable).filter(|v| !v.is_empty());
        if value.is_none() {
            println!("skipped: {variable} is not set");
        }
        value.map(PathBuf::from)
    };
    let (Some(models), Some(golden)) = (find("TAILORQ_TEST_MODELS"), find("TAILORQ_TEST_GOLDEN")) else { return };
    let fixture = Fixture {
        opened: tailorq_model::open(models.join(file).to_str().unwrap()).unwrap(),
        device: tailorq_kernels::cpu(),
    };
    let numbers: serde_json::Value = serde_json::from_slice(&std::fs::read(golden.join(numbers)).unwrap()).unwrap();
    let list = |item: &serde_json::Value, key: &str| -> Vec<u32> { serde_json::from_value(item[key].clone()).unwrap() };
    let items = numbers["greedy"].as_array().unwrap();
    let full = std::env::var_os("TAILORQ_TEST_FULL").is_some();
    let n_tokens = if full { usize::MAX } else { 12 };
    let requests: Vec<CompletionRequest> = (items.iter())
        .map(|item| CompletionRequest {
            prompt: list(item, "prompt_tokens"),
            max_tokens: list(item, "new_tokens").len().min(n_tokens),
            stop: vec![],
        })
        .collect();
    let completions = fixture.batch(&requests, &BatchOptions::default());
    assert_eq!(completions.len(), 3);
    for (item, completion) in items.iter().zip(&completions) {
        let expected = list(item, "new_tokens");
        assert_eq!(completion.tokens, expected[..expected.len().min(n_tokens)]);
        assert!(item["text"].as_str().unwrap().starts_with(&completion.text), "{}", completion.text);
    }
}

#[test]
fn smollm2_continues_as_the_reference_does() {
    check_golden("SmolLM2-135M-Instruct.Q4_1.gguf", "smollm2-135m.json");
}

#[test]
fn qwen_continues_as_the_reference_does() {
    if std::env::var_os("TAILORQ_TEST_FULL").is_none() {
        println!("skipped: TAILORQ_TEST_FULL is not set");
        return;
    }
    check_golden("Qwen2.5-Coder-0.5B-Instruct.Q4_K_M.gguf", "qwen2.5-coder-0.5b.json");
}
