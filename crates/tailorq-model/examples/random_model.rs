//! Writes a Hugging Face directory of random weights, to measure how memory and time grow with the number of blocks:
//! `cargo run --release -p tailorq-model --example random_model -- DIR BLOCKS [HIDDEN]`.

use std::path::Path;
use tailorq_model::testing::TinyModel;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [dir, blocks, rest @ ..] = &args[..] else {
        return Err("usage: random_model DIR BLOCKS [HIDDEN]".into());
    };
    let hidden: usize = rest.first().map_or(Ok(512), |h| h.parse())?;
    let mut model = TinyModel::new("llama", 1)?;
    model.dtype = tailorq_tensor::DType::BF16;
    model.config.n_blocks = blocks.parse()?;
    model.config.hidden = hidden;
    model.config.intermediate = 4 * hidden;
    model.config.head_dim = 64;
    model.config.n_heads = hidden / 64;
    model.config.n_kv_heads = hidden / 64;
    model.write_directory(Path::new(dir))?;
    Ok(())
}
