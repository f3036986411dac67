//! Sessions and generation on a tiny random model, against recomputing everything for each token.
#![allow(clippy::unwrap_used, reason = "a test may stop where it stands")]

use std::ops::ControlFlow;
use std::sync::Arc;
use tailorq_model::testing::TinyModel;
use tailorq_model::{Batch, OpenedModel};
use tailorq_runtime::{
    Device, FinishReason, Generation, GenerationOptions, KvType, PREFILL_CHUNK, RuntimeError, SamplerOptions, Session,
    generate,
};
use tailorq_tensor::Rng;

struct Fixture {
    opened: OpenedModel,
    device: Arc<dyn Device>,
    _dir: tempfile::TempDir,
}

impl Fixture {
    fn new(change: impl FnOnce(&mut TinyModel)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut tiny = TinyModel::new("llama", 7).unwrap();
        change(&mut tiny);
        tiny.write_directory(dir.path()).unwrap();
        let opened = tailorq_model::open(dir.path().to_str().unwrap()).unwrap();
        Fixture { opened, device: tailorq_kernels::cpu(), _dir: dir }
    }

    fn session(&self) -> Session<'_> {
        Session::new(&self.opened.model, self.device.as_ref())
    }

    /// Logits after the last of `ids`, without any cache.
    fn fresh_logits(&self, ids: &[u32]) -> Vec<f32> {
        let model = &self.opened.model;
        let hidden = model.hidden(self.device.as_ref(), &Batch::new([ids]), None);
        let last = tailorq_tensor::Matrix::from_vec(1, hidden.cols(), hidden.row(ids.len() - 1).to_vec());
        model.logits(self.device.as_ref(), &last).into_vec()
    }

    fn greedy(&self, prompt: &[u32], options: &GenerationOptions) -> Generation {
        let options = GenerationOptions { sampler: SamplerOptions::GREEDY, ..options.clone() };
        let mut streamed = String::new();
        let generation =
            generate(&mut self.session(), &self.opened.tokenizer, prompt, &options, &|| false, &mut |piece| {
                streamed.push_str(piece.text);
                ControlFlow::Continue(())
            })
            .unwrap();
        assert_eq!(streamed, generation.text, "the pieces make the text");
        generation
    }
}

fn random_ids(n: usize, seed: u64) -> Vec<u32> {
    let mut rng = Rng::new(seed);
    (0..n).map(|_| rng.below(256) as u32).collect()
}

fn argmax(logits: &[f32]) -> u32 {
    logits.iter().enumerate().fold(0, |best, (i, l)| if *l > logits[best] { i } else { best }) as u32
}

fn assert_close(a: &[f32], b: &[f32]) {
    assert_eq!(a.len(), b.len());
    let worst = a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(worst < 1e-4, "logits differ by {worst}");
}

#[test]
fn chunks_steps_and_a_rewind_give_the_logits_of_a_fresh_pass() {
    let fixture = Fixture::new(|_| {});
    let ids = random_ids(PREFILL_CHUNK + 40, 1);
    let mut session = fixture.session();
    assert_close(session.prefill(&ids, &|| false).unwrap(), &fixture.fresh_logits(&ids));
    assert_close(session.step(9).unwrap(), &fixture.fresh_logits(&[&ids[..], &[9]].concat()));

    let mut other = ids[..300].to_vec();
    other.extend(random_ids(20, 2));
    let kept = session.rewind_to(&other);
    assert!((300..320).contains(&kept), "{kept}");
    assert!(session.logits().is_empty(), "those of what was forgotten");
    assert_eq!(session.tokens(), &other[..kept]);
    assert_close(session.prefill(&other[kept..], &|| false).unwrap(), &fixture.fresh_logits(&other));
    // The same again: the last token is read anew, because only reading gives logits.
    assert_eq!(session.rewind_to(&other), other.len() - 1);
    session.prefill(&other[other.len() - 1..], &|| false).unwrap();
    assert_eq!(session.logits().len(), fixture.opened.model.config.vocab);
    session.reset();
    assert!(session.logits().is_empty());
    assert_eq!(session.rewind_to(&other), 0);
}

#[test]
fn stored_keys_and_values_cost_little_and_are_rewound() {
    let fixture = Fixture::new(|_| {});
    let (model, device) = (&fixture.opened.model, fixture.device.as_ref());
    let ids = random_ids(PREFILL_CHUNK + 40, 1);
    let expected = fixture.fresh_logits(&ids);
    for (kv, tolerance) in [(KvType::F16, 0.01), (KvType::Q8, 0.15)] {
        let mut session = Session::with(model, device, kv);
        let whole = session.prefill(&ids, &|| false).unwrap().to_vec();
        let worst = whole.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(0.0 < worst && worst < tolerance, "{kv}: {worst}");
        let mut other = ids[..77].to_vec();
        other.extend(random_ids(20, 2));
        session.rewind_to(&other);
        session.prefill(&other[77..], &|| false).unwrap();
        let kept = session.rewind_to(&ids);
        assert_eq!(kept, 77);
        assert_close(session.prefill(&ids[kept..], &|| false).unwrap(), &whole);
    }
}

#[test]
fn bad_input_is_an_error_and_leaves_the_session_as_it_was() {
    let fixture = Fixture::new(|tiny| tiny.config.max_positions = 8);
    let mut session = fixture.session();
    session.prefill(&[1, 2, 3], &|| false).unwrap();
    assert!(matches!(session.prefill(&[], &|| false), Err(RuntimeError::EmptyPrompt)));
    let unknown = session.prefill(&[4, 259], &|| false);
    assert!(matches!(unknown, Err(RuntimeError::UnknownToken { id: 259, position: 4, .. })), "{unknown:?}");
    let full = session.prefill(&[0; 6], &|| false);
    assert!(matches!(full, Err(RuntimeError::ContextFull { needed: 9, limit: 8 })), "{full:?}");
    assert!(matches!(session.prefill(&[4], &|| true), Err(RuntimeError::Interrupted)));
    assert_eq!(session.tokens(), [1, 2, 3]);
    session.prefill(&[0; 5], &|| false).unwrap();
}

#[test]
fn greedy_generation_is_the_argmax_of_fresh_passes() {
    let fixture = Fixture::new(|_| {});
    let prompt = random_ids(10, 3);
    let generation = fixture.greedy(&prompt, &GenerationOptions { max_tokens: 12, ..Default::default() });
    let mut ids = prompt.clone();
    for &token in &generation.tokens {
        let expected = argmax(&fixture.fresh_logits(&ids));
        assert_eq!(token, expected, "after {} tokens", ids.len());
        ids.push(token);
    }
    if generation.finish == FinishReason::MaxTokens {
        assert_eq!(generation.tokens.len(), 12);
    } else {
        assert_eq!(generation.finish, FinishReason::EndOfSequence);
        assert!(fixture.opened.tokenizer.eos.contains(&argmax(&fixture.fresh_logits(&ids))));
    }
    assert_eq!(generation.text, fixture.opened.tokenizer.decode(&generation.tokens, true).unwrap());
    assert_eq!(generation.prompt_tokens, 10);
}

#[test]
fn generation_ends_for_every_reason_there_is() {
    let mut fixture = Fixture::new(|tiny| tiny.config.max_positions = 16);
    fixture.opened.tokenizer.eos.clear();
    let prompt = random_ids(4, 5);
    let all = fixture.greedy(&prompt, &GenerationOptions { max_tokens: 100, ..Default::default() });
    assert_eq!(all.finish, FinishReason::ContextFull);
    // The token after a full context is still known, so one more comes than was read.
    assert_eq!(prompt.len() + all.tokens.len(), 16 + 1);

    let stop: String = all.text.chars().skip(2).take(1).collect();
    let stopped =
        fixture.greedy(&prompt, &GenerationOptions { max_tokens: 100, stop: vec![stop.clone()], ..Default::default() });
    assert_eq!(stopped.finish, FinishReason::StopString);
    assert_eq!(stopped.text, all.text[..all.text.find(&stop).unwrap()]);

    fixture.opened.tokenizer.eos = vec![all.tokens[3]];
    let ended = fixture.greedy(&prompt, &GenerationOptions { max_tokens: 100, ..Default::default() });
    assert_eq!(ended.finish, FinishReason::EndOfSequence);
    assert!(ended.tokens.len() <= 3 && !ended.tokens.contains(&all.tokens[3]));

    fixture.opened.tokenizer.eos.clear();
    let options = GenerationOptions { max_tokens: 100, ..Default::default() };
    let mut calls = 0;
    let broken = generate(&mut fixture.session(), &fixture.opened.tokenizer, &prompt, &options, &|| false, &mut |_| {
        calls += 1;
        if calls == 2 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    })
    .unwrap();
    assert_eq!((broken.finish, broken.tokens.len()), (FinishReason::Interrupted, 2));
}

#[test]
fn the_same_seed_generates_the_same_text() {
    let fixture = Fixture::new(|_| {});
    let play = |seed| {
        let sampler = SamplerOptions { temperature: 1.0, top_p: 1.0, top_k: 0, seed, ..SamplerOptions::default() };
        let options = GenerationOptions { max_tokens: 24, sampler, ..Default::default() };
        let go = &mut |_: tailorq_runtime::Piece<'_>| ControlFlow::Continue(());
        generate(&mut fixture.session(), &fixture.opened.tokenizer, &[65, 66], &options, &|| false, go).unwrap().tokens
    };
    assert_eq!(play(1), play(1));
    assert_ne!(play(1), play(2));
}
