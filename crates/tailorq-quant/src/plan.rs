//! What each layer shall become.

use serde::{Deserialize, Serialize};
use std::str::FromStr;
use tailorq_tensor::{Bits, Group, Layout};

/// How the range of a group, and with it scale and zero point, is found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Clip {
    /// Its extremes as they are.
    None,
    /// The shrunken range with the least `sum |e|^2.4` over the group: the search of GPTQ's reference code.
    #[default]
    Magnitude,
    /// The shrunken range with the least `sum e_j^2 / U_jj^2`: what rounding column `j` adds to GPTQ's objective, so that
    /// inputs which matter keep a fine grid and others pay for it. Lowers the loss of nearly every layer, and yet not
    /// that of every model. Methods without a Hessian search by magnitude.
    Hessian,
}

impl Clip {
    /// Every choice.
    pub const ALL: [Clip; 3] = [Clip::None, Clip::Magnitude, Clip::Hessian];

    /// As in recipes and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Clip::None => "none",
            Clip::Magnitude => "magnitude",
            Clip::Hessian => "hessian",
        }
    }

    /// What remains of the choice where there is no Hessian.
    pub fn without_hessian(self) -> Self {
        if self == Clip::Hessian { Clip::Magnitude } else { self }
    }
}

impl FromStr for Clip {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let names = Clip::ALL.map(Clip::name).join(", ");
        Clip::ALL
            .into_iter()
            .find(|c| c.name() == s)
            .ok_or_else(|| format!("there is no clip '{s}': use one of {names}"))
    }
}

/// How one linear is quantized. Written to recipes and artifacts, so the field names are part of the file format.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LayerSettings {
    /// Width of the codes, group and symmetry of the grid.
    pub layout: Layout,
    /// How the range of every group is found.
    #[serde(default)]
    pub clip: Clip,
    /// Added to the Hessian's diagonal, as a fraction of the mean of that diagonal. Finite and not negative.
    #[serde(default = "default_damping")]
    pub damping: f64,
    /// Quantize columns in the order of falling Hessian diagonal, with grids fitted on the original weights.
    #[serde(default)]
    pub act_order: bool,
}

impl LayerSettings {
    /// The defaults for a width and a group: asymmetric, clip search by magnitude, damping 0.01, columns in natural order.
    pub fn new(bits: Bits, group: Group) -> Self {
        LayerSettings {
            layout: Layout { bits, group, symmetric: false },
            clip: Clip::default(),
            damping: default_damping(),
            act_order: false,
        }
    }
}

fn default_damping() -> f64 {
    0.01
}
