//! The closed set of layouts of a packed matrix.

use crate::ScaleBits;
use serde::{Deserialize, Serialize};
use std::fmt;

/// Consecutive inputs of one output that share a code word.
pub const TILE: usize = 16;

/// Width of a code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "u32", into = "u32")]
pub enum Bits {
    /// 2 bits: one u32 word a tile, code `i` at bits `2i`.
    Two,
    /// 3 bits: the low two bits as for [`Bits::Two`], the high bit of code `i` at bit `i` of a u16 in a plane of its own.
    Three,
    /// 4 bits: two u32 words a tile, code `i` at bits `4i` of the pair read as one little-endian u64.
    Four,
    /// 6 bits: the low four bits as for [`Bits::Four`], the high two bits of code `i` at bits `2i` of a u32 word in a plane of
    /// their own.
    Six,
    /// 8 bits: 16 bytes a tile (four u32 words), code `i` in byte `i`.
    Eight,
}

impl Bits {
    /// All widths.
    pub const ALL: [Bits; 5] = [Bits::Two, Bits::Three, Bits::Four, Bits::Six, Bits::Eight];

    /// The width as a number.
    pub fn count(self) -> u32 {
        match self {
            Bits::Two => 2,
            Bits::Three => 3,
            Bits::Four => 4,
            Bits::Six => 6,
            Bits::Eight => 8,
        }
    }

    /// The largest code.
    pub fn max_code(self) -> u8 {
        (u16::MAX >> (16 - self.count())) as u8
    }

    /// The zero point of a symmetric grid, `2^(b-1)`.
    pub fn middle(self) -> u8 {
        1 << (self.count() - 1)
    }

    /// u32 words a tile in the main code plane (see [`Bits::high_bytes`] for the other).
    pub fn words_per_tile(self) -> usize {
        match self {
            Bits::Two | Bits::Three => 1,
            Bits::Four | Bits::Six => 2,
            Bits::Eight => 4,
        }
    }

    /// Bytes of a tile in the plane of high bits: a u16 for 3 bits, a u32 for 6, nothing for the others.
    pub fn high_bytes(self) -> usize {
        match self {
            Bits::Three => 2,
            Bits::Six => 4,
            Bits::Two | Bits::Four | Bits::Eight => 0,
        }
    }
}

impl TryFrom<u32> for Bits {
    type Error = String;
    fn try_from(n: u32) -> Result<Self, String> {
        Bits::ALL
            .into_iter()
            .find(|b| b.count() == n)
            .ok_or_else(|| format!("no layout has {n} bits: use 2, 3, 4, 6 or 8"))
    }
}

impl From<Bits> for u32 {
    fn from(b: Bits) -> u32 {
        b.count()
    }
}

/// How many consecutive inputs of a row share a scale. The last group of a row may be short.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "GroupName", into = "GroupName")]
pub enum Group {
    /// 32, 64 or 128 inputs.
    Inputs(usize),
    /// The whole row.
    Row,
}

impl Group {
    /// The group sizes that exist beside the whole row.
    pub const SIZES: [usize; 3] = [32, 64, 128];

    /// `Inputs(n)` for a size that exists.
    pub fn inputs(n: usize) -> Result<Self, String> {
        if Group::SIZES.contains(&n) {
            Ok(Group::Inputs(n))
        } else {
            Err(format!("no layout has groups of {n}: use 32, 64, 128 or row"))
        }
    }

    /// Inputs a group for rows of `cols` inputs (at least 1).
    pub fn len(self, cols: usize) -> usize {
        match self {
            Group::Inputs(n) => n,
            Group::Row => cols.max(1),
        }
    }

    /// Groups in a row of `cols` inputs.
    pub fn count(self, cols: usize) -> usize {
        cols.div_ceil(self.len(cols))
    }
}

impl std::str::FromStr for Group {
    type Err = String;
    fn from_str(s: &str) -> Result<Self, String> {
        match s {
            "row" => Ok(Group::Row),
            _ => Group::inputs(s.parse().map_err(|_| format!("'{s}' is no group: use 32, 64, 128 or row"))?),
        }
    }
}

impl fmt::Display for Group {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Group::Inputs(n) => write!(f, "{n}"),
            Group::Row => f.write_str("row"),
        }
    }
}

/// A group as files write it: a number or the word `row`.
#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum GroupName {
    Inputs(usize),
    Word(String),
}

impl TryFrom<GroupName> for Group {
    type Error = String;
    fn try_from(name: GroupName) -> Result<Self, String> {
        match name {
            GroupName::Inputs(n) => Group::inputs(n),
            GroupName::Word(w) => w.parse(),
        }
    }
}

impl From<Group> for GroupName {
    fn from(g: Group) -> Self {
        match g {
            Group::Inputs(n) => GroupName::Inputs(n),
            Group::Row => GroupName::Word("row".into()),
        }
    }
}

/// What a packed matrix holds and where: `value = (code - zero) * scale`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Layout {
    /// Width of a code.
    pub bits: Bits,
    /// Inputs that share a scale (and a zero).
    pub group: Group,
    /// Symmetric grids store no zeros: the zero is `2^(bits-1)`.
    pub symmetric: bool,
    /// Width of a stored scale.
    #[serde(rename = "scale_bits", default, skip_serializing_if = "ScaleBits::is_sixteen")]
    pub scales: ScaleBits,
}

impl fmt::Display for Layout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let grid = if self.symmetric { "symmetric" } else { "affine" };
        write!(f, "{}-bit {grid}, {}", self.bits.count(), self.groups())
    }
}

impl Layout {
    /// An asymmetric layout with f16 scales.
    pub const fn new(bits: Bits, group: Group) -> Self {
        Layout { bits, group, symmetric: false, scales: ScaleBits::Sixteen }
    }

    /// The groups and their scales, for people.
    pub(crate) fn groups(&self) -> String {
        match self.scales {
            ScaleBits::Sixteen => format!("group {}", self.group),
            ScaleBits::Eight => format!("group {}, 8-bit scales", self.group),
        }
    }

    /// Bytes of a `[rows, cols]` matrix in this layout, all parts included.
    pub fn bytes(&self, rows: usize, cols: usize) -> usize {
        let tiles = cols.div_ceil(TILE);
        let high = tiles * self.bits.high_bytes();
        rows * (4 * tiles * self.bits.words_per_tile()
            + high
            + self.scales.bytes() * self.group.count(cols)
            + self.zero_bytes_per_row(cols))
    }

    /// Whether codes may be places in a codebook: 2 to 4 bits, without zeros.
    pub fn has_codebooks(&self) -> bool {
        self.symmetric && self.bits <= Bits::Four
    }

    /// Bytes of the codebook of a matrix, f16 `[2^bits]`.
    pub fn level_bytes(bits: Bits) -> usize {
        2 << bits.count()
    }

    /// Bytes of one row's packed zeros: a little-endian bit stream at the base's width, padded to a byte.
    pub fn zero_bytes_per_row(&self, cols: usize) -> usize {
        if self.symmetric { 0 } else { (self.group.count(cols) * self.bits.count() as usize).div_ceil(8) }
    }
}
