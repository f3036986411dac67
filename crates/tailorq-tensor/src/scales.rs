//! Scales of groups, as they are stored: f16, or one byte each.
//!
//! A scale of 8 bits is an f16 of which bits 7 to 14 are kept: its exponent, and three bits of its fraction. The sign would be 0. So
//! shifting a byte gives the f16 that it stands for, a matrix needs nothing beside the bytes, and whatever an f16 can scale a
//! byte can. Codes are chosen after the scale was rounded, and a scale need not be exact to be a good one: the error that is least
//! at one scale grows with the square of the distance from it.

use crate::PackError;
use crate::tiles::bad_scale;
use half::f16;
use serde::{Deserialize, Serialize};
use std::borrow::Cow;

/// Width of a stored scale.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "u32", into = "u32")]
pub enum ScaleBits {
    /// Bits 7 to 14 of an f16, the others of which are 0: four significant bits.
    Eight,
    /// An f16.
    #[default]
    Sixteen,
}

impl ScaleBits {
    /// Every width.
    pub const ALL: [ScaleBits; 2] = [ScaleBits::Eight, ScaleBits::Sixteen];

    /// Where the bits of a byte lie in the f16.
    pub const SHIFT: u32 = 7;

    /// The width as a number.
    pub fn count(self) -> u32 {
        match self {
            ScaleBits::Eight => 8,
            ScaleBits::Sixteen => 16,
        }
    }

    /// Bytes of a scale.
    pub fn bytes(self) -> usize {
        self.count() as usize / 8
    }

    /// Whether it is the width that needs no mention.
    pub fn is_sixteen(&self) -> bool {
        *self == ScaleBits::Sixteen
    }

    /// The scale that a byte stands for; one of all finite numbers up to 247.
    #[inline(always)]
    pub fn of_byte(byte: u8) -> f16 {
        f16::from_bits(u16::from(byte) << ScaleBits::SHIFT)
    }

    /// The byte of a scale; `None` for one that 8 bits do not hold.
    pub fn byte(scale: f16) -> Option<u8> {
        let byte = (scale.to_bits() >> ScaleBits::SHIFT) as u8;
        (byte <= LARGEST && ScaleBits::of_byte(byte).to_bits() == scale.to_bits()).then_some(byte)
    }

    /// The largest scale.
    pub fn max(self) -> f16 {
        match self {
            ScaleBits::Eight => ScaleBits::of_byte(LARGEST),
            ScaleBits::Sixteen => f16::MAX,
        }
    }

    /// The least scale above 0.
    pub fn least(self) -> f16 {
        match self {
            ScaleBits::Eight => ScaleBits::of_byte(1),
            ScaleBits::Sixteen => f16::from_bits(1),
        }
    }

    /// The stored scale nearest to `exact`, which is not negative, and the upper one of two; `None` above the largest.
    #[inline(always)]
    pub fn nearest(self, exact: f32) -> Option<f16> {
        self.stored(exact, 1 << (ScaleBits::SHIFT - 1))
    }

    /// The least stored scale that is not below `exact` rounded to f16, so that what it was made to reach stays in reach; `None`
    /// above the largest. With 16 bits that is the nearest.
    #[inline(always)]
    pub fn above(self, exact: f32) -> Option<f16> {
        self.stored(exact, (1 << ScaleBits::SHIFT) - 1)
    }

    /// `exact` as an f16; with 8 bits plus `added` of its last places, cut to those that are kept.
    #[inline(always)]
    fn stored(self, exact: f32, added: u16) -> Option<f16> {
        let half = f16::from_f32(exact);
        let scale = match self {
            ScaleBits::Sixteen => half,
            // Up to an infinity, which is not below the largest, nothing wraps around.
            ScaleBits::Eight => f16::from_bits((half.to_bits() + added) >> ScaleBits::SHIFT << ScaleBits::SHIFT),
        };
        (scale <= self.max()).then_some(scale)
    }
}

impl TryFrom<u32> for ScaleBits {
    type Error = String;
    fn try_from(n: u32) -> Result<Self, String> {
        ScaleBits::ALL
            .into_iter()
            .find(|b| b.count() == n)
            .ok_or_else(|| format!("no layout has scales of {n} bits: use 8 or 16"))
    }
}

impl From<ScaleBits> for u32 {
    fn from(b: ScaleBits) -> u32 {
        b.count()
    }
}

impl std::str::FromStr for ScaleBits {
    type Err = String;
    fn from_str(s: &str) -> Result<Self, String> {
        let n: u32 = s.parse().map_err(|_| format!("'{s}' is no width of scales: use 8 or 16"))?;
        n.try_into()
    }
}

impl std::fmt::Display for ScaleBits {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.count())
    }
}

/// Scales where they lie.
#[derive(Clone, Copy, Debug)]
pub enum Scales<'a> {
    /// One byte each.
    Bytes(&'a [u8]),
    /// f16.
    Halves(&'a [f16]),
}

impl<'a> Scales<'a> {
    /// Scale `i`.
    #[inline(always)]
    pub fn get(self, i: usize) -> f16 {
        match self {
            Scales::Bytes(all) => ScaleBits::of_byte(all[i]),
            Scales::Halves(all) => all[i],
        }
    }

    /// `n` scales from number `first` on.
    pub(crate) fn part(self, first: usize, n: usize) -> Self {
        match self {
            Scales::Bytes(all) => Scales::Bytes(&all[first..first + n]),
            Scales::Halves(all) => Scales::Halves(&all[first..first + n]),
        }
    }

    /// All of them as f16: borrowed, or spread out.
    pub fn to_halves(self) -> Cow<'a, [f16]> {
        match self {
            Scales::Bytes(all) => all.iter().map(|&byte| ScaleBits::of_byte(byte)).collect(),
            Scales::Halves(all) => Cow::Borrowed(all),
        }
    }

    /// Fails on a scale that is infinite, no number or negative.
    pub(crate) fn check(self) -> Result<(), PackError> {
        match self {
            Scales::Bytes(all) => match bad_byte(all) {
                Some(index) => Err(PackError::Scale { index, value: self.get(index).to_f32() }),
                None => Ok(()),
            },
            Scales::Halves(all) => match bad_scale(all) {
                Some(index) => Err(PackError::Scale { index, value: all[index].to_f32() }),
                None => Ok(()),
            },
        }
    }
}

/// Above it lie an infinity and what is no number.
const LARGEST: u8 = 247;

/// Index of the first byte that is no scale.
fn bad_byte(all: &[u8]) -> Option<usize> {
    // Without a branch for each, they pass in vectors.
    let mut chunks = all.chunks(1024).enumerate();
    let (i, chunk) = chunks.find(|(_, chunk)| chunk.iter().fold(false, |any, b| any | (*b > LARGEST)))?;
    chunk.iter().position(|b| *b > LARGEST).map(|at| 1024 * i + at)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_scales_and_ascend() {
        let all: Vec<f16> = (0..=LARGEST).map(ScaleBits::of_byte).collect();
        assert!(all.is_sorted() && all.iter().all(|s| s.is_finite() && *s >= f16::ZERO));
        assert!((LARGEST + 1..=u8::MAX).all(|b| !ScaleBits::of_byte(b).is_finite()));
        assert_eq!((all[0].to_f32(), all[1].to_f32(), all[247].to_f32()), (0.0, 2f32.powi(-17), 61440.0));
        assert_eq!((ScaleBits::Eight.least(), ScaleBits::Eight.max()), (all[1], all[247]));
        for (byte, scale) in all.iter().enumerate() {
            assert_eq!(ScaleBits::byte(*scale), Some(byte as u8));
        }
        // Everything else has none: one bit too many, negative, no number.
        for other in [0x2a01u16, 0x2a40, 0x8000, 0xaa00, 0x7c00, 0x7e00] {
            assert_eq!(ScaleBits::byte(f16::from_bits(other)), None, "{other:#x}");
        }
    }

    /// Against a search through all scales.
    #[test]
    fn rounding_finds_the_nearest_and_the_next() {
        let all: Vec<f16> = (0..=LARGEST).map(ScaleBits::of_byte).collect();
        let mut rng = crate::Rng::new(3);
        for _ in 0..20_000 {
            // Of all sizes that occur, f16 so that the first rounding is none.
            let exact = f16::from_f32((rng.uniform() as f32 * 35.9 - 20.0).exp2()).to_f32();
            let above = all.iter().copied().find(|s| s.to_f32() >= exact);
            assert_eq!(ScaleBits::Eight.above(exact), above, "{exact}");
            let nearest = all.iter().copied().rev().min_by(|a, b| {
                let distance = |s: &f16| (s.to_f64() - f64::from(exact)).abs();
                distance(a).total_cmp(&distance(b))
            });
            let found = ScaleBits::Eight.nearest(exact);
            // Past the largest it is the nearest as long as it is nearer than the one that would follow.
            let expected = if exact < 63488.0 { nearest } else { None };
            assert_eq!(found, expected, "{exact}");
            assert_eq!(ScaleBits::Sixteen.above(exact), Some(f16::from_f32(exact)));
        }
        for scales in ScaleBits::ALL {
            for exact in [7e4, f32::INFINITY, f32::MAX] {
                assert_eq!((scales.nearest(exact), scales.above(exact)), (None, None));
            }
            assert_eq!((scales.nearest(0.0), scales.above(0.0)), (Some(f16::ZERO), Some(f16::ZERO)));
        }
        assert_eq!(ScaleBits::Eight.above(61472.0), None);
        assert_eq!(ScaleBits::Sixteen.above(61472.0), Some(f16::from_f32(61472.0)));
    }

    #[test]
    fn bad_bytes_are_found_wherever_they_are() {
        let bytes: Vec<u8> = (0..=LARGEST).cycle().take(2500).collect();
        assert_eq!(bad_byte(&bytes), None);
        for (at, bad) in [(0, 248), (1023, 255), (1024, 250), (2499, 248)] {
            let mut bytes = bytes.clone();
            bytes[at] = bad;
            assert_eq!(bad_byte(&bytes), Some(at));
        }
    }

    #[test]
    fn widths_have_names() {
        for scales in ScaleBits::ALL {
            assert_eq!(scales.to_string().parse::<ScaleBits>().unwrap(), scales);
        }
        for bad in ["12", "-8", "f16", ""] {
            assert!(bad.parse::<ScaleBits>().unwrap_err().contains("8 or 16"), "{bad}");
        }
    }
}
