//! The names of linears inside a decoder: which block, which slot, which input they share.

use serde::{Deserialize, Serialize};
use std::fmt;

/// The seven linears of a decoder block, in the order in which they are quantized.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Slot {
    /// Query projection.
    Q,
    /// Key projection.
    K,
    /// Value projection.
    V,
    /// Attention output projection.
    O,
    /// Gate of the gated feed-forward.
    Gate,
    /// Up projection of the feed-forward.
    Up,
    /// Down projection of the feed-forward.
    Down,
}

impl Slot {
    /// All slots, in quantization order.
    pub const ALL: [Slot; 7] = [Slot::Q, Slot::K, Slot::V, Slot::O, Slot::Gate, Slot::Up, Slot::Down];

    /// Position in [`Slot::ALL`].
    pub fn index(self) -> usize {
        self as usize
    }

    /// The input that this linear reads.
    pub fn input_group(self) -> InputGroup {
        match self {
            Slot::Q | Slot::K | Slot::V => InputGroup::Attention,
            Slot::O => InputGroup::AttentionOutput,
            Slot::Gate | Slot::Up => InputGroup::Mlp,
            Slot::Down => InputGroup::MlpOutput,
        }
    }

    /// Short lower-case name: `q`, `k`, `v`, `o`, `gate`, `up`, `down`.
    pub fn name(self) -> &'static str {
        match self {
            Slot::Q => "q",
            Slot::K => "k",
            Slot::V => "v",
            Slot::O => "o",
            Slot::Gate => "gate",
            Slot::Up => "up",
            Slot::Down => "down",
        }
    }
}

/// Linears of one group read the same activations, so they share one Hessian.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum InputGroup {
    /// Normalised block input, read by q, k and v.
    Attention,
    /// Mixed attention heads, read by o.
    AttentionOutput,
    /// Normalised input of the feed-forward, read by gate and up.
    Mlp,
    /// Gated hidden activations, read by down.
    MlpOutput,
}

impl InputGroup {
    /// All groups in the order of the forward pass.
    pub const ALL: [InputGroup; 4] =
        [InputGroup::Attention, InputGroup::AttentionOutput, InputGroup::Mlp, InputGroup::MlpOutput];

    /// The linears that read this input.
    pub fn slots(self) -> &'static [Slot] {
        match self {
            InputGroup::Attention => &[Slot::Q, Slot::K, Slot::V],
            InputGroup::AttentionOutput => &[Slot::O],
            InputGroup::Mlp => &[Slot::Gate, Slot::Up],
            InputGroup::MlpOutput => &[Slot::Down],
        }
    }
}

/// One linear of the model ("layer"): block index and slot. Its order breaks ties in allocation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LayerId {
    /// Transformer block, from 0.
    pub block_idx: usize,
    /// The linear inside that block.
    pub slot: Slot,
}

impl fmt::Display for LayerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "block {} {}", self.block_idx, self.slot.name())
    }
}
