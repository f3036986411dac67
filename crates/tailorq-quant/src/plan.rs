//! What each layer shall become.

use crate::QuantError;
use crate::quantize::AlignedSettings;
use serde::{Deserialize, Serialize};
use std::str::FromStr;
use std::sync::Arc;
use tailorq_tensor::{Bits, Group, Layout, TransformKind, TransformSpec};

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

/// The input transform of a linear: what [`TransformSpec`] becomes for its width.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TransformSettings {
    /// Its kind.
    pub kind: TransformKind,
    /// Of the signs; the same for all linears, so that those of one input share its rotation.
    #[serde(default)]
    pub seed: u64,
    /// Inputs that are mixed with each other, a power of two up to the width; by the width when it is not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub block: Option<usize>,
}

impl TransformSettings {
    /// The Hadamard transform with the blocks that fit each width.
    pub fn hadamard(seed: u64) -> Self {
        TransformSettings { kind: TransformKind::Hadamard, seed, block: None }
    }

    /// The transform for rows of `width` inputs.
    pub fn spec(&self, width: usize) -> TransformSpec {
        let TransformKind::Hadamard = self.kind;
        let by_width = TransformSpec::hadamard(width, self.seed);
        TransformSpec { block: self.block.unwrap_or(by_width.block), ..by_width }
    }
}

/// What codes stand for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum GridKind {
    /// Multiples of the scale, counted from a zero.
    #[default]
    Affine,
    /// Places in a codebook of the matrix, times the scale. For symmetric layouts of 2 to 4 bits; wider ones stay affine.
    Codebook,
}

impl GridKind {
    /// Whether it is the one that needs no mention.
    pub fn is_affine(&self) -> bool {
        *self == GridKind::Affine
    }
}

impl FromStr for GridKind {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        match s {
            "affine" => Ok(GridKind::Affine),
            "codebook" => Ok(GridKind::Codebook),
            _ => Err(format!("there is no grid '{s}': use affine or codebook")),
        }
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
    /// The layer stays at 16 bits ([`Half`](crate::quantize::Half)), whatever the method and the rest of these settings:
    /// how a plan says 16 where other layers have 2, 3, 4 or 8.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub half: bool,
    /// What codes stand for; a codebook for methods that can ([`Quantizer::rotates`](crate::Quantizer::rotates)).
    #[serde(default, skip_serializing_if = "GridKind::is_affine")]
    pub grid: GridKind,
    /// What is done to the inputs before they meet the packed base; for methods that can
    /// ([`Quantizer::rotates`](crate::Quantizer::rotates)).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub transform: Option<TransformSettings>,
    /// Salient tiles, for the method `aligned`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub aligned: Option<AlignedSettings>,
}

impl LayerSettings {
    /// A layer that stays at 16 bits.
    pub fn half() -> Self {
        LayerSettings { half: true, ..LayerSettings::new(Bits::Eight, Group::Row) }
    }

    /// Whether codes are places in a codebook.
    pub fn has_codebook(&self) -> bool {
        self.grid == GridKind::Codebook && self.layout.bits <= Bits::Four
    }

    /// The defaults for a width and a group: asymmetric, clip search by magnitude, damping 0.01, columns in natural order.
    pub fn new(bits: Bits, group: Group) -> Self {
        LayerSettings {
            layout: Layout::new(bits, group),
            clip: Clip::default(),
            damping: default_damping(),
            act_order: false,
            half: false,
            grid: GridKind::Affine,
            transform: None,
            aligned: None,
        }
    }
}

fn default_damping() -> f64 {
    0.01
}

/// Weights of one matrix that stay at 16 bits (TACQ's circuit, SpQR's outliers), row by row.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ElementMask {
    /// Where each row begins in `cols`, and the end of the last; empty for no row.
    starts: Vec<usize>,
    cols: Vec<u32>,
}

impl ElementMask {
    /// The elements of a `[rows, cols]` matrix by ascending row-major index, `row * cols + col`. Indices that do not
    /// ascend or lie outside are an error.
    pub fn from_indices(
        rows: usize,
        cols: usize,
        indices: impl IntoIterator<Item = usize>,
    ) -> Result<Self, QuantError> {
        let mut mask = ElementMask { starts: vec![0], cols: Vec::new() };
        let mut last = None;
        for index in indices {
            if index >= rows * cols || last.is_some_and(|l| l >= index) {
                let problem = format!("element {index} of a [{rows}, {cols}] matrix is outside or out of order");
                return Err(QuantError::Settings(problem));
            }
            mask.starts.resize(index / cols + 1, mask.cols.len());
            mask.cols.push((index % cols) as u32);
            last = Some(index);
        }
        mask.starts.resize(rows + 1, mask.cols.len());
        Ok(mask)
    }

    /// Rows of the matrix.
    pub fn rows(&self) -> usize {
        self.starts.len().saturating_sub(1)
    }

    /// The kept columns of a row, ascending.
    pub fn row(&self, row: usize) -> &[u32] {
        &self.cols[self.starts[row]..self.starts[row + 1]]
    }

    /// Where each row begins among all kept columns (and the end of the last row), and these columns.
    pub(crate) fn parts(&self) -> (&[usize], &[u32]) {
        (&self.starts, &self.cols)
    }

    /// Kept elements.
    pub fn len(&self) -> usize {
        self.cols.len()
    }

    /// Whether nothing is kept.
    pub fn is_empty(&self) -> bool {
        self.cols.is_empty()
    }
}

/// What one layer shall become: settings for all of its weights, and the weights that are excepted.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerPlan {
    /// How it is quantized.
    pub settings: LayerSettings,
    /// Elements at 16 bits; of the layer's shape.
    pub kept: Option<Arc<ElementMask>>,
}

impl From<LayerSettings> for LayerPlan {
    /// No exceptions.
    fn from(settings: LayerSettings) -> Self {
        LayerPlan { settings, kept: None }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mask_is_its_indices_row_by_row() {
        let mask = ElementMask::from_indices(4, 10, [3, 9, 10, 35]).unwrap();
        let rows: Vec<&[u32]> = (0..4).map(|r| mask.row(r)).collect();
        assert_eq!(rows, [&[3, 9][..], &[0], &[], &[5]]);
        assert_eq!((mask.rows(), mask.len()), (4, 4));
        assert!(ElementMask::from_indices(2, 3, []).unwrap().is_empty());
        for bad in [vec![3, 3], vec![4, 2], vec![6]] {
            assert!(ElementMask::from_indices(2, 3, bad.clone()).is_err(), "{bad:?}");
        }
    }
}
