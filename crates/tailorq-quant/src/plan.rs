//! What each layer shall become.

use serde::{Deserialize, Serialize};
use tailorq_tensor::{Bits, Group, Layout};

/// How one linear is quantized. Written to recipes and artifacts, so the field names are part of the file format.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LayerSettings {
    /// Width of the codes, group and symmetry of the grid.
    pub layout: Layout,
    /// Search for the clipping of every group's range instead of taking its extremes.
    #[serde(default = "yes")]
    pub clip_search: bool,
    /// Added to the Hessian's diagonal, as a fraction of the mean of that diagonal. Finite and not negative.
    #[serde(default = "default_damping")]
    pub damping: f64,
    /// Quantize columns in the order of falling Hessian diagonal, with grids fitted on the original weights.
    #[serde(default)]
    pub act_order: bool,
}

impl LayerSettings {
    /// The defaults for a width and a group: asymmetric, clip search on, damping 0.01, columns in natural order.
    pub fn new(bits: Bits, group: Group) -> Self {
        LayerSettings {
            layout: Layout { bits, group, symmetric: false },
            clip_search: yes(),
            damping: default_damping(),
            act_order: false,
        }
    }
}

fn yes() -> bool {
    true
}

fn default_damping() -> f64 {
    0.01
}
