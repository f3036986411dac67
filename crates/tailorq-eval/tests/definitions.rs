//! The definitions of perplexity other than that of papers, against plain computations that hold all logits, and WikiText's
//! pages against the harness' own code.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test may stop where it stands, and says why it was skipped"
)]

mod inputs;

use inputs::{Fixture, go_on, open};
use std::ops::ControlFlow;
use std::path::Path;
use tailorq_eval::{Document, EvalError, llamacpp_perplexity, rolling_perplexity};
use tailorq_model::Batch;
use tailorq_model::testing::TinyModel;

const TEXT: &str =
    "The quick brown fox jumps over the lazy dog. Größe, naïveté; 0123456789 and so on, until it ends.\n";

impl Fixture {
    /// A tokenizer that begins every text with the BOS.
    fn with_bos() -> Self {
        let dir = tempfile::tempdir().unwrap();
        TinyModel::new("qwen2", 3).unwrap().write_directory(dir.path()).unwrap();
        let path = dir.path().join("tokenizer.json");
        let mut tokenizer: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        let bos = "<|endoftext|>";
        let text = |id: &str| serde_json::json!({"Sequence": {"id": id, "type_id": 0}});
        let special = serde_json::json!({"SpecialToken": {"id": bos, "type_id": 0}});
        tokenizer["post_processor"] = serde_json::json!({
            "type": "TemplateProcessing", "single": [special, text("A")], "pair": [special, text("A"), text("B")],
            "special_tokens": {bos: {"id": bos, "ids": [256], "tokens": [bos]}},
        });
        std::fs::write(&path, tokenizer.to_string()).unwrap();
        Fixture::of(open(dir.path()))
    }

    /// `-log p(target | context)`, by a pass of its own.
    fn nll(&self, context: &[u32], target: u32) -> f64 {
        let (model, device) = (&self.opened.model, self.device.as_ref());
        let hidden = model.hidden(device, &Batch::new([context]), None);
        let logits = model.logits(device, &hidden);
        let row: Vec<f64> = logits.row(context.len() - 1).iter().map(|l| f64::from(*l)).collect();
        row.iter().map(|l| l.exp()).sum::<f64>().ln() - row[target as usize]
    }
}

fn assert_close(found: f64, expected: f64) {
    assert!((found / expected - 1.0).abs() < 1e-5, "{found} {expected}");
}

#[test]
fn llama_cpp_scores_the_second_half_of_each_window() {
    let fixture = Fixture::new(3, |_| {});
    let tokens = fixture.opened.tokenizer.encode(TEXT.trim_end(), false).unwrap();
    for (window, limit) in [(10, None), (11, None), (16, Some(2))] {
        let found = llamacpp_perplexity(&fixture.subject(), TEXT, window, limit, &mut go_on).unwrap();
        let windows: Vec<&[u32]> = tokens.chunks_exact(window).take(limit.unwrap_or(usize::MAX)).collect();
        let nlls: Vec<f64> = (windows.iter())
            .flat_map(|w| (window / 2 + 1..window).map(|t| fixture.nll(&w[..t], w[t])).collect::<Vec<_>>())
            .collect();
        assert_eq!((found.tokens, found.windows, found.tokens_in_text), (nlls.len(), windows.len(), tokens.len()));
        let n = nlls.len() as f64;
        let mean = nlls.iter().sum::<f64>() / n;
        let deviation = (nlls.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / n / (n - 1.0)).sqrt();
        assert_close(found.value, mean.exp());
        assert_close(found.stderr, deviation * mean.exp());
    }
    for window in [0, 3, tokens.len() / 2 + 1, 5000] {
        let refused = llamacpp_perplexity(&fixture.subject(), TEXT, window, None, &mut go_on);
        assert!(matches!(refused, Err(EvalError::BadOption { option: "window", .. })), "{window}");
    }
}

#[test]
fn llama_cpp_begins_each_window_with_the_bos_where_texts_have_one() {
    let fixture = Fixture::with_bos();
    let tokens = fixture.opened.tokenizer.encode(TEXT.trim_end(), true).unwrap();
    assert_eq!((tokens[0], fixture.opened.tokenizer.bos), (256, Some(256)));
    let found = llamacpp_perplexity(&fixture.subject(), TEXT, 10, None, &mut go_on).unwrap();
    let windows = tokens.chunks_exact(10).map(|w| [&[256], &w[1..]].concat());
    let nlls: Vec<f64> =
        windows.flat_map(|w| (6..10).map(|t| fixture.nll(&w[..t], w[t])).collect::<Vec<_>>()).collect();
    assert_close(found.value, (nlls.iter().sum::<f64>() / nlls.len() as f64).exp());
}

#[test]
fn rolling_scores_every_token_once() {
    let fixture = Fixture::new(3, |tiny| tiny.config.max_positions = 64);
    let documents = [TEXT, "One short document.", "x"].map(|t| Document::plain(t.to_owned()));
    // BOS of the tiny model.
    let prefix = fixture.opened.tokenizer.bos.unwrap();
    for max_length in [64, 20, 19] {
        let (found, sums) = rolling_perplexity(&fixture.subject(), &documents, max_length, &mut go_on).unwrap();
        let (mut nll, mut n) = (0.0, 0);
        for (document, sum) in documents.iter().zip(&sums) {
            let ids = fixture.opened.tokenizer.encode(&document.text, false).unwrap();
            let all = [&[prefix], &ids[..]].concat();
            let mut own = 0.0;
            for t in 0..ids.len() {
                let window = t / max_length;
                // The last window reaches back as far as fits, the others have one token of context.
                let end = ((window + 1) * max_length).min(ids.len());
                own += fixture.nll(&all[end.saturating_sub(max_length)..=t], ids[t]);
            }
            assert_close(-sum, own);
            nll += own;
            n += ids.len();
        }
        assert_eq!((found.tokens, found.documents), (n, 3));
        assert_eq!(found.words, documents.iter().map(|d| d.text.split(char::is_whitespace).count()).sum::<usize>());
        assert_close(found.word_perplexity, (nll / found.words as f64).exp());
        assert_close(found.byte_perplexity, (nll / found.bytes as f64).exp());
        assert_close(found.bits_per_byte, nll / found.bytes as f64 / 2f64.ln());
    }
    let refused = rolling_perplexity(&fixture.subject(), &documents, 65, &mut go_on);
    assert!(matches!(refused, Err(EvalError::BadOption { value: 65, .. })));
    let stopped = rolling_perplexity(&fixture.subject(), &documents, 20, &mut |_, _| ControlFlow::Break(()));
    assert!(matches!(stopped, Err(EvalError::Interrupted)));
}

/// Pages, words, bytes and detokenized text of the raw files, as the harness' Python code gives them.
#[test]
fn wikitext_is_read_as_the_harness_reads_it() {
    let Some(data) = std::env::var_os("TAILORQ_TEST_DATA").filter(|v| !v.is_empty()) else {
        println!("skipped: TAILORQ_TEST_DATA is not set");
        return;
    };
    let expected = [
        ("test", 62, 241_335, 1_290_527, 0xc1be_4a18_cc9f_f7bf_u64),
        ("valid.part1", 30, 96_205, 514_268, 0x860b_d232_e5db_b8d6),
        ("train.sample", 58, 185_769, 995_866, 0xf296_bb1c_5f70_f327),
    ];
    for (name, pages, words, bytes, hash) in expected {
        let path = Path::new(&data).join(format!("wikitext2/wiki.{name}.raw.txt"));
        let documents = Document::wikitext(&std::fs::read_to_string(path).unwrap());
        assert_eq!(documents.len(), pages, "{name}");
        assert_eq!(documents.iter().map(|d| d.words).sum::<usize>(), words, "{name}");
        assert_eq!(documents.iter().map(|d| d.bytes).sum::<usize>(), bytes, "{name}");
        // FNV-1a of all texts, each followed by a zero.
        let all = documents.iter().flat_map(|d| d.text.bytes().chain([0]));
        let found = all.fold(0xcbf2_9ce4_8422_2325, |h: u64, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3));
        assert_eq!(found, hash, "{name}");
    }
}
