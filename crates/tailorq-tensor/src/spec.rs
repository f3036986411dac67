//! What a configuration records of a packed matrix: shape, layout, transform and corrections, which together fix every size.

use crate::{Bits, ElementCorrections, Layout, TileBits, TileMap, TransformSpec};
use serde::{Deserialize, Serialize};
use std::fmt;

/// Which corrections a packed matrix has beside its base, and how many.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct CorrectionSpec {
    /// Tiles that hold means of four instead of codes, see [`crate::Mean4`]. Not beside `tiles`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mean4: Option<usize>,
    /// Tiles with a correction, see [`crate::TileCorrections`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tiles: Option<TileSpec>,
    /// Elements with a 16-bit correction, see [`ElementCorrections`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub elements: Option<usize>,
}

impl CorrectionSpec {
    /// Whether there are none.
    pub fn is_none(&self) -> bool {
        *self == CorrectionSpec::default()
    }
}

/// The tile corrections of a matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct TileSpec {
    /// Width of their codes.
    pub bits: TileBits,
    /// How many tiles have one.
    pub count: usize,
}

/// Everything about a packed matrix but its numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct PackedSpec {
    /// Layout of the base.
    #[serde(flatten)]
    pub layout: Layout,
    /// Outputs.
    pub rows: usize,
    /// Inputs.
    pub cols: usize,
    /// Codes are places in a codebook of `2^bits` levels instead of multiples of the scale.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub codebook: bool,
    /// What is done to the inputs before they meet the base, see [`crate::InputTransform`]; takes no bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub transform: Option<TransformSpec>,
    /// What lies beside the base.
    #[serde(flatten)]
    pub corrections: CorrectionSpec,
}

impl PackedSpec {
    /// A `[rows, cols]` matrix that is nothing but a base.
    pub fn base(rows: usize, cols: usize, layout: Layout) -> Self {
        PackedSpec { layout, rows, cols, codebook: false, transform: None, corrections: CorrectionSpec::default() }
    }

    /// Whether readers of versions before codebooks, transforms and 6 bits can read it.
    pub fn is_plain(&self) -> bool {
        !self.codebook && self.transform.is_none() && self.layout.bits != Bits::Six
    }

    /// Bytes of all parts.
    pub fn bytes(&self) -> usize {
        let &PackedSpec { layout, rows, cols, corrections, codebook, transform: _ } = self;
        let map = rows * TileMap::row_bytes(cols);
        let mean4 = corrections.mean4.map_or(0, |_| map + 2 * rows * layout.group.count(cols));
        let tiles = corrections.tiles.map_or(0, |t| map + t.count * (t.bits.tile_bytes() + 2));
        let index = ElementCorrections::index_bytes(cols);
        let elements = corrections.elements.map_or(0, |n| rows * index + n * (index + 2));
        let levels = if codebook { Layout::level_bytes(layout.bits) } else { 0 };
        layout.bytes(rows, cols) + levels + mean4 + tiles + elements
    }
}

impl fmt::Display for PackedSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.codebook {
            true => write!(f, "{}-bit codebook, {}", self.layout.bits.count(), self.layout.groups())?,
            false => write!(f, "{}", self.layout)?,
        }
        if let Some(transform) = self.transform {
            write!(f, ", {transform}")?;
        }
        let CorrectionSpec { mean4, tiles, elements } = self.corrections;
        let parts = [(mean4.is_some(), " + means"), (tiles.is_some(), " + tiles"), (elements.is_some(), " + elements")];
        parts.iter().filter(|p| p.0).try_for_each(|p| f.write_str(p.1))
    }
}
