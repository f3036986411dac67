//! The sampling flags that `run` and `chat` share.

use clap::Args;
use tailorq_runtime::{GenerationOptions, SamplerOptions};

/// How tokens are chosen.
#[derive(Args)]
#[command(next_help_heading = "Sampling")]
pub struct SamplingArgs {
    /// 0 always takes the most likely token; higher is more varied
    #[arg(long, default_value_t = 0.7, value_name = "X")]
    temperature: f32,
    /// Choose among the most likely tokens that together have this probability (1 = all)
    #[arg(long, default_value_t = 0.95, value_name = "P")]
    top_p: f32,
    /// Choose among this many most likely tokens (0 = all)
    #[arg(long, default_value_t = 40, value_name = "N")]
    top_k: usize,
    /// Choose among tokens at least this times as likely as the most likely one (0 = all)
    #[arg(long, default_value_t = 0.0, value_name = "P")]
    min_p: f32,
    /// Make tokens that already occurred less likely (1 = off)
    #[arg(long, default_value_t = 1.0, value_name = "X")]
    repetition_penalty: f32,
    /// Seed of the random choice: the same seed gives the same text
    #[arg(long, default_value_t = 0, value_name = "N")]
    seed: u64,
    /// Most tokens to generate
    #[arg(long, default_value_t = 512, value_name = "N", value_parser = parse_max_tokens)]
    max_tokens: usize,
    /// Stop before this text (may be given several times)
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,
}

fn parse_max_tokens(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(0) => Err("generate at least 1 token".to_owned()),
        Ok(n) => Ok(n),
        Err(e) => Err(format!("{e}")),
    }
}

impl SamplingArgs {
    /// For the `turn`-th generation of a conversation: each draws other random numbers.
    pub fn options(&self, turn: u64) -> GenerationOptions {
        GenerationOptions {
            max_tokens: self.max_tokens,
            stop: self.stop.clone(),
            sampler: SamplerOptions {
                temperature: self.temperature,
                top_k: self.top_k,
                top_p: self.top_p,
                min_p: self.min_p,
                repetition_penalty: self.repetition_penalty,
                seed: self.seed.wrapping_add(turn),
            },
        }
    }
}
