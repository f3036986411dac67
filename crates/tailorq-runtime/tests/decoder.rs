//! Generation on a decoder against generation operation by operation: the same words, whoever takes the steps.
#![allow(clippy::unwrap_used, reason = "a test may stop where it stands")]

use std::ops::ControlFlow;
use std::sync::atomic::Ordering;
use tailorq_model::OpenedModel;
use tailorq_model::testing::{PlainDecoders, TinyModel};
use tailorq_runtime::{
    BENCH_START, BatchOptions, BenchOptions, Completion, CompletionRequest, DecoderSize, Decoders, FinishReason,
    Generation, GenerationOptions, KvType, PREFILL_CHUNK, RuntimeError, SamplerOptions, Session, bench_decoding,
    generate, generate_batch, generate_batch_decoding,
};
use tailorq_tensor::Rng;

fn open(change: impl FnOnce(&mut TinyModel)) -> OpenedModel {
    let dir = tempfile::tempdir().unwrap();
    let mut tiny = TinyModel::new("qwen2", 7).unwrap();
    change(&mut tiny);
    tiny.write_directory(dir.path()).unwrap();
    tailorq_model::open(dir.path().to_str().unwrap()).unwrap()
}

fn decoders(sequences: usize) -> PlainDecoders {
    PlainDecoders::new(tailorq_kernels::cpu(), sequences)
}

fn decoding(opened: &OpenedModel, capacity: usize) -> Session<'_> {
    let decoder = decoders(1).open(&opened.model, DecoderSize { sequences: 1, capacity }).unwrap();
    Session::decoding(&opened.model, decoder)
}

fn random_ids(n: usize, seed: u64) -> Vec<u32> {
    let mut rng = Rng::new(seed);
    (0..n).map(|_| rng.below(256) as u32).collect()
}

fn go_on(opened: &OpenedModel, session: &mut Session<'_>, prompt: &[u32], options: &GenerationOptions) -> Generation {
    let mut streamed = String::new();
    let listen = &mut |piece: tailorq_runtime::Piece<'_>| {
        streamed.push_str(piece.text);
        ControlFlow::Continue(())
    };
    let generation = generate(session, &opened.tokenizer, prompt, options, &|| false, listen).unwrap();
    assert_eq!(streamed, generation.text, "the pieces make the text");
    generation
}

#[test]
fn a_session_says_the_same_whoever_computes() {
    let opened = open(|_| {});
    let device = tailorq_kernels::cpu();
    let samplers = [
        SamplerOptions::GREEDY,
        SamplerOptions { repetition_penalty: 1.3, ..SamplerOptions::GREEDY },
        SamplerOptions { temperature: 1.5, ..SamplerOptions::default() },
    ];
    for sampler in samplers {
        // A prompt of several chunks, then turns of a conversation: each begins in the middle of what was chosen ahead.
        let (mut ours, mut theirs) = (decoding(&opened, 4096), Session::new(&opened.model, &*device));
        for (turn, max_tokens) in [(0, 21), (1, 1), (2, 8), (3, 30)] {
            let prompt = random_ids(if turn == 0 { PREFILL_CHUNK + 30 } else { 5 }, turn);
            let options = GenerationOptions { max_tokens, sampler, stop: vec![] };
            let (a, b) = (go_on(&opened, &mut ours, &prompt, &options), go_on(&opened, &mut theirs, &prompt, &options));
            assert_eq!((a.tokens, a.finish, &a.text), (b.tokens, b.finish, &b.text));
            assert_eq!(ours.tokens(), theirs.tokens());
        }
        let back = ours.tokens()[..600].to_vec();
        let kept = ours.rewind_to(&back);
        assert_eq!((kept, theirs.rewind_to(&back)), (599, 599));
        let logits = ours.prefill(&back[kept..], &|| false).unwrap().to_vec();
        assert_eq!(logits, theirs.prefill(&back[kept..], &|| false).unwrap());
        assert_eq!(ours.step(9).unwrap(), theirs.step(9).unwrap());
    }
}

#[test]
fn a_session_ends_where_the_decoder_does() {
    let mut opened = open(|_| {});
    let options = GenerationOptions { max_tokens: 100, sampler: SamplerOptions::GREEDY, stop: vec![] };
    let prompt = random_ids(10, 1);
    let free = go_on(&opened, &mut decoding(&opened, 64), &prompt, &options);
    assert_eq!((free.finish, free.tokens.len()), (FinishReason::ContextFull, 55));
    let full = decoding(&opened, 9).prefill(&prompt, &|| false).map(|_| ());
    assert!(matches!(full, Err(RuntimeError::ContextFull { needed: 10, limit: 9 })), "{full:?}");
    opened.tokenizer.eos = vec![free.tokens[11]];
    let at = free.tokens.iter().position(|t| *t == free.tokens[11]).unwrap();
    let mut session = decoding(&opened, 64);
    let ended = go_on(&opened, &mut session, &prompt, &options);
    assert_eq!((ended.finish, &ended.tokens[..]), (FinishReason::EndOfSequence, &free.tokens[..at]));
    // What was chosen after the end is forgotten.
    assert_eq!(session.tokens(), [&prompt[..], &free.tokens[..at]].concat());
}

/// Prompts of all kinds, some with a long beginning in common.
fn requests() -> Vec<CompletionRequest> {
    let common = random_ids(70, 100);
    let mut prompts: Vec<Vec<u32>> = (0..9).map(|i| random_ids(1 + 23 * i % 61, i as u64)).collect();
    prompts.extend((0..6).map(|i| [&common[..], &random_ids(3 + i, 50 + i as u64)].concat()));
    prompts.push(common);
    let ask = |(i, prompt): (usize, Vec<u32>)| {
        let stop = if i % 3 == 0 { ('a'..='z').map(String::from).collect() } else { vec![] };
        CompletionRequest { prompt, max_tokens: [0, 1, 9, 25, 8][i % 5], stop }
    };
    prompts.into_iter().enumerate().map(ask).collect()
}

#[test]
fn a_batch_says_the_same_whoever_computes() {
    let mut opened = open(|_| {});
    let requests = requests();
    for round in 0..2 {
        let OpenedModel { model, tokenizer, .. } = &opened;
        let device = tailorq_kernels::cpu();
        let listen = &mut |_: tailorq_runtime::BatchProgress<'_>| ControlFlow::Continue(());
        let options = BatchOptions::default();
        let expected = generate_batch(model, tokenizer, &*device, &requests, &options, listen).unwrap();
        for sequences in [1, 3, 8] {
            let (decoders, mut heard) = (decoders(sequences), Vec::new());
            let found = generate_batch_decoding((model, tokenizer), &decoders, &requests, &mut |progress| {
                heard.extend(progress.finished.map(|(i, completion)| (i, completion.clone())));
                ControlFlow::Continue(())
            });
            assert_eq!(found.unwrap(), expected, "{sequences} sequences");
            heard.sort_by_key(|(i, _)| *i);
            assert_eq!(heard.into_iter().map(|(_, c)| c).collect::<Vec<Completion>>(), expected);
            let all: usize = requests.iter().map(|r| r.prompt.len()).sum();
            let read = decoders.n_read.load(Ordering::Relaxed);
            assert!(read <= all - 5 * 60, "{read} of {all} tokens were read: beginnings in common are not read again");
        }
        // Again with an end token that comes in the middle of an answer.
        let long = expected.iter().find(|c| c.tokens.len() > 15).unwrap();
        let eos = long.tokens[10];
        assert_eq!(expected.iter().any(|c| c.finish == FinishReason::EndOfSequence), round == 1);
        opened.tokenizer.eos = vec![eos];
    }
}

#[test]
fn a_batch_can_be_stopped_and_refuses_what_does_not_fit() {
    let opened = open(|tiny| tiny.config.max_positions = 40);
    let both = (&opened.model, &opened.tokenizer);
    let request = |n: usize, max_tokens| CompletionRequest { prompt: random_ids(n, 4), max_tokens, stop: vec![] };
    let stopped = generate_batch_decoding(both, &decoders(2), &[request(5, 9)], &mut |_| ControlFlow::Break(()));
    assert!(matches!(stopped, Err(RuntimeError::Interrupted)));
    let go_on = &mut |_: tailorq_runtime::BatchProgress<'_>| ControlFlow::Continue(());
    let refused = generate_batch_decoding(both, &decoders(2), &[request(5, 40)], go_on);
    assert!(matches!(refused, Err(RuntimeError::ContextFull { needed: 41, limit: 40 })), "{refused:?}");
    assert!(generate_batch_decoding(both, &decoders(2), &[], go_on).unwrap().is_empty());
    // A long prompt loses its beginning.
    let cut = generate_batch_decoding(both, &decoders(2), &[request(60, 9)], go_on).unwrap();
    assert_eq!((cut[0].cut_tokens, cut[0].tokens.len()), (60 - 31, 9));
}

#[test]
fn the_benchmark_counts_what_a_decoder_reads() {
    let opened = open(|_| {});
    let options =
        BenchOptions { prompt: 20, generate: 6, batch: 3, repeat: 2, seed: 1, kv: KvType::F16, memory_bytes: 1 << 20 };
    let decoders = decoders(3);
    let size = DecoderSize { sequences: 3, capacity: 20 };
    let mut decoder = decoders.open(&opened.model, size).unwrap();
    let mut go_on = |_, _| ControlFlow::Continue(());
    let report = bench_decoding(&opened.model, decoder.as_mut(), &options, &mut go_on).unwrap();
    let (linears, head) = decoder.weight_bytes();
    assert_eq!((report.step.linears, report.step.head), (linears, head));
    assert_eq!(report.step.kv, 3 * decoder.kv_bytes(BENCH_START + 3));
    assert_eq!(report.memory.median, 1e9);
    let (generate, read) = (report.generate.unwrap(), report.read.unwrap());
    assert!((read.max / (generate.max / 3.0 * report.step.total() as f64) - 1.0).abs() < 1e-9);
    assert!(report.prompt.unwrap().min > 0.0);
    // Start, and in both repeats a prompt and three beginnings.
    let n_read = BENCH_START + 2 * (20 + 3 * BENCH_START);
    assert_eq!(decoders.n_read.load(Ordering::Relaxed), n_read);
}
