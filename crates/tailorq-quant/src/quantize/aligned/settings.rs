//! What the memory-aligned scheme leaves open, each choice named in recipes and on the command line.

use super::super::feedback::BLOCK;
use crate::QuantError;
use serde::{Deserialize, Serialize};
use std::str::FromStr;
use tailorq_tensor::{Bits, CorrectionSpec, Layout, PackedSpec, TILE, TileBits, TileSpec};

/// Which units are ranked against each other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Scope {
    /// Those of all rows in a block of 128 columns, by the weights as the errors of earlier blocks have left them.
    #[default]
    Block,
    /// Those of the whole matrix, before any column is rounded (but see [`Saliency::Gain`]).
    Matrix,
}

/// What makes a unit salient: the sum over its weights of one of these. The method `aligned-task` puts the squared gradients
/// of the task's loss, summed over calibration samples, in the place of `1 / U_ii^2`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Saliency {
    /// `w_i^2 / U_ii^2`, what setting the weight to zero would cost.
    Hessian,
    /// `(e_i^2 - f_i^2) / U_ii^2` with the errors `e` of the base and `f` of the finer form: what that form gains. The
    /// errors are those of a trial run of the block; over the whole matrix, of a whole run without salient units.
    #[default]
    Gain,
    /// A seeded draw: the control, which says what choosing is worth.
    Random,
}

/// What a salient unit holds instead of codes of the base.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Salient {
    /// Codes of the base, and finer ones with a scale of their own that are added to it.
    #[default]
    Corrections,
    /// Four int8, each the mean of four neighbours: the paper as written.
    Mean4,
    /// Sixteen int8: the paper with the precision that its results suggest.
    EightBit,
}

/// What is salient or not as a whole.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Unit {
    /// Sixteen consecutive inputs of one output.
    #[default]
    Tile,
    /// A single weight: the paper's ablation without grouping.
    Weight,
}

impl Unit {
    /// Weights of a unit.
    pub fn weights(self) -> usize {
        match self {
            Unit::Tile => TILE,
            Unit::Weight => 1,
        }
    }
}

/// Settings of [`Aligned`](super::Aligned), which is two methods. Written to recipes, so the field names are part of the file format.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AlignedSettings {
    /// Share of the units that are salient, from 0 to 1, in every scope.
    pub share: f64,
    /// Width of the codes of [`Salient::Corrections`].
    pub tile_bits: TileBits,
    /// Which units are ranked against each other.
    pub scope: Scope,
    /// What makes a unit salient.
    pub saliency: Saliency,
    /// What a salient unit holds.
    pub salient: Salient,
    /// What is salient as a whole.
    pub unit: Unit,
    /// For [`Saliency::Random`].
    #[serde(skip_serializing_if = "is_zero")]
    pub seed: u64,
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde asks so")]
fn is_zero(seed: &u64) -> bool {
    *seed == 0
}

impl Default for AlignedSettings {
    /// 5 % of the tiles corrected with 4 bits: on a base of 2 bits with groups of 128, 2.45 bits a weight in the file.
    fn default() -> Self {
        AlignedSettings {
            share: 0.05,
            tile_bits: TileBits::Four,
            scope: Scope::default(),
            saliency: Saliency::default(),
            salient: Salient::default(),
            unit: Unit::default(),
            seed: 0,
        }
    }
}

impl AlignedSettings {
    /// The paper's rule: the `k` most salient of 128 columns, read as that share of the tiles of every block of 128 columns,
    /// by the Hessian.
    pub fn paper(k: u32, salient: Salient) -> Self {
        let share = f64::from(k) / 128.0;
        AlignedSettings { share, salient, saliency: Saliency::Hessian, ..AlignedSettings::default() }
    }

    /// Refuses what no matrix can be, on a base of `layout`.
    pub fn check(&self, layout: Layout) -> Result<(), QuantError> {
        let fail = |problem: String| Err(QuantError::Settings(problem));
        if !(self.share.is_finite() && (0.0..=1.0).contains(&self.share)) {
            return fail(format!("the share of salient tiles is {}: use 0 to 1", self.share));
        }
        if i64::try_from(self.seed).is_err() {
            return fail(format!("the seed of random tiles is {}: use one below 2^63", self.seed));
        }
        if self.salient == Salient::Mean4 && self.unit == Unit::Tile && layout.bits != Bits::Two {
            return fail(format!("a word of {} bits a weight holds no four means: use 2", layout.bits.count()));
        }
        Ok(())
    }

    /// Units that are salient in a `[rows, cols]` matrix: the share of every block of columns, or of the matrix.
    pub fn n_salient(&self, rows: usize, cols: usize) -> usize {
        let units = |cols: usize| share_of(self.share, rows * cols.div_ceil(self.unit.weights()));
        match self.scope {
            Scope::Block => (0..cols).step_by(BLOCK).map(|start| units(BLOCK.min(cols - start))).sum(),
            Scope::Matrix => units(cols),
        }
    }

    /// Bytes that this adds to a `[rows, cols]` matrix with a base of `layout`.
    pub fn bytes(&self, layout: Layout, rows: usize, cols: usize) -> usize {
        let count = self.n_salient(rows, cols);
        let tiles = |bits| CorrectionSpec { tiles: Some(TileSpec { bits, count }), ..CorrectionSpec::default() };
        let corrections = match (self.unit, self.salient) {
            _ if self.share == 0.0 => CorrectionSpec::default(),
            (Unit::Weight, _) => CorrectionSpec { elements: Some(count), ..CorrectionSpec::default() },
            (Unit::Tile, Salient::Mean4) => CorrectionSpec { mean4: Some(count), ..CorrectionSpec::default() },
            (Unit::Tile, Salient::Corrections) => tiles(self.tile_bits),
            (Unit::Tile, Salient::EightBit) => tiles(TileBits::Eight),
        };
        PackedSpec { corrections, ..PackedSpec::base(rows, cols, layout) }.bytes() - layout.bytes(rows, cols)
    }

    /// What the forms that lie in the file with some waste would take in a format of their own: one bit a unit that says
    /// which are salient, these at 8 bits instead of their codes in the base, and one scale of theirs a row and group.
    /// Kept elements come on top as they are. `None` for forms that lie there without.
    pub(crate) fn counted_bits(
        &self,
        layout: Layout,
        (rows, cols): (usize, usize),
        (n_salient, kept): (usize, Option<usize>),
    ) -> Option<u64> {
        let is_stored = match self.salient {
            Salient::Corrections => true,
            Salient::Mean4 => self.unit == Unit::Tile,
            Salient::EightBit => false,
        };
        if is_stored || self.share == 0.0 {
            return None;
        }
        let corrections = CorrectionSpec { elements: kept, ..CorrectionSpec::default() };
        let base = 8 * PackedSpec { corrections, ..PackedSpec::base(rows, cols, layout) }.bytes();
        let bitmap = 8 * rows * cols.div_ceil(self.unit.weights()).div_ceil(8);
        let finer = n_salient * self.unit.weights() * (8 - layout.bits.count() as usize);
        Some((base + bitmap + finer + 16 * rows * layout.group.count(cols)) as u64)
    }
}

/// As many of `n` units as a share comes to.
pub(super) fn share_of(share: f64, n: usize) -> usize {
    (share * n as f64).round() as usize
}

/// Gives a choice its names: [`FromStr`], `ALL` and `name`.
macro_rules! named {
    ($choice:ident, $what:literal, $($variant:ident = $name:literal),+) => {
        impl $choice {
            /// Every choice.
            pub const ALL: &[$choice] = &[$($choice::$variant),+];

            /// As in recipes and on the command line.
            pub fn name(self) -> &'static str {
                match self {
                    $($choice::$variant => $name),+
                }
            }
        }

        impl FromStr for $choice {
            type Err = String;

            fn from_str(s: &str) -> Result<Self, String> {
                let found = $choice::ALL.iter().copied().find(|c| c.name() == s);
                let names = || $choice::ALL.iter().map(|c| c.name()).collect::<Vec<_>>().join(", ");
                found.ok_or_else(|| format!("there is no {} '{s}': use one of {}", $what, names()))
            }
        }
    };
}

named!(Scope, "scope", Block = "block", Matrix = "matrix");
named!(Saliency, "saliency", Hessian = "hessian", Gain = "gain", Random = "random");
named!(Salient, "form of salient tiles", Corrections = "corrections", Mean4 = "mean4", EightBit = "eight-bit");
named!(Unit, "unit", Tile = "tile", Weight = "weight");

#[cfg(test)]
mod tests {
    use super::*;
    use tailorq_tensor::Group;

    #[test]
    fn names_are_those_of_files() {
        for scope in Scope::ALL {
            assert_eq!(serde_json::to_value(scope).unwrap(), scope.name());
        }
        for saliency in Saliency::ALL {
            assert_eq!(serde_json::to_value(saliency).unwrap(), saliency.name());
        }
        for salient in Salient::ALL {
            assert_eq!(serde_json::to_value(salient).unwrap(), salient.name());
            assert_eq!(salient.name().parse(), Ok(*salient));
        }
        for unit in Unit::ALL {
            assert_eq!(serde_json::to_value(unit).unwrap(), unit.name());
        }
        assert!("mean5".parse::<Salient>().unwrap_err().contains("mean4"));
    }

    #[test]
    fn bytes_by_hand() {
        let layout = Layout::new(Bits::Two, Group::Inputs(128));
        let of = |settings: AlignedSettings| settings.bytes(layout, 64, 1024);
        // 64 x 64 tiles: the bitmap has 512 bytes, 5 % of each of 8 blocks are 26 tiles of 8 bytes and a scale of 2; of the
        // matrix 205.
        assert_eq!(of(AlignedSettings::default()), 512 + 8 * 26 * 10);
        assert_eq!(of(AlignedSettings { scope: Scope::Matrix, ..AlignedSettings::default() }), 512 + 205 * 10);
        // Means take the words of the base and add a scale for each of 8 groups.
        assert_eq!(of(AlignedSettings::paper(50, Salient::Mean4)), 512 + 64 * 8 * 2);
        assert_eq!(of(AlignedSettings::paper(100, Salient::EightBit)), 512 + 3200 * 18);
        assert_eq!(of(AlignedSettings { share: 0.0, ..AlignedSettings::default() }), 0);
    }
}
