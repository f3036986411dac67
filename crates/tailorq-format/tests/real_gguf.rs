//! Real GGUF models, when TAILORQ_TEST_MODELS names the directory that holds them.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

use std::path::PathBuf;
use tailorq_format::GgufFile;

fn models() -> Option<PathBuf> {
    let dir = std::env::var_os("TAILORQ_TEST_MODELS").map(PathBuf::from);
    if dir.is_none() {
        println!("skipped: TAILORQ_TEST_MODELS is not set");
    }
    dir
}

#[test]
fn real_models_open_and_decode_to_plausible_weights() {
    let Some(dir) = models() else { return };
    let mut n_models = 0;
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|e| e != "gguf") {
            continue;
        }
        let file = GgufFile::open(&path).unwrap();
        let architecture: &str = file.metadata().require("general.architecture").unwrap();
        let width: usize = file.metadata().require(&format!("{architecture}.embedding_length")).unwrap();
        let tokens: &[String] = file.metadata().require("tokenizer.ggml.tokens").unwrap();
        let embedding = file.rows("token_embd.weight").unwrap();
        assert_eq!((embedding.rows(), embedding.cols()), (tokens.len(), width));
        for tensor in file.tensors() {
            let values = if tensor.dims().len() == 1 {
                tensor.vector().unwrap()
            } else {
                let rows = tensor.rows().unwrap();
                let n_rows = rows.rows().min(256);
                let mut out = vec![0.0; n_rows * rows.cols()];
                rows.read_rows(rows.rows() - n_rows, &mut out);
                out
            };
            let rms = (values.iter().map(|v| f64::from(v * v)).sum::<f64>() / values.len() as f64).sqrt();
            assert!(values.iter().all(|v| v.is_finite()), "{} {}", tensor.name(), tensor.type_name());
            assert!((1e-6..1e3).contains(&rms), "{} {}: rms {rms}", tensor.name(), tensor.type_name());
        }
        n_models += 1;
    }
    assert!(n_models > 0, "TAILORQ_TEST_MODELS holds no .gguf file");
}
