//! What gathered numbers say about which part of a model to protect: calculations without a model.
//!
//! The TAQ family (LeVi et al. 2025, "You Had One Job", arXiv 2511.06516) scores whole blocks: by the information and the
//! stability of their outputs ([`information_stability`]), by what noise on an output does to the prediction ([`NoiseStep`],
//! [`divergence`]), or by the task metric lost when a block alone is quantized ([`metric_drops`]). The passes that gather
//! these numbers from a model are in [`crate::survey`].

mod entropy;
mod noise;
mod reservoir;
mod stability;

pub use entropy::{matrix_entropy, normalize_rows};
pub use noise::{NoiseStep, add_uniform_noise, divergence, noise_rng, range};
pub use reservoir::{Reservoir, Sampling};
pub use stability::{Moments, information_stability, metric_drops};
