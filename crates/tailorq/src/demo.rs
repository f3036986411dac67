//! The texts of the demo: written for it, part of the program.

/// Calibration items, JSONL of `{"prompt","completion"}`.
pub const CALIBRATION: &str = include_str!("../assets/demo-calibration.jsonl");
/// Prose that shares nothing with the calibration items, for perplexity and divergence.
pub const HELD_OUT: &str = include_str!("../assets/demo-heldout.txt");
/// What both models are asked.
pub const PROMPT: &str = "Why does the moon seem to change its shape during a month?";
