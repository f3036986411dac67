//! Tile corrections: for a salient tile, sixteen more codes on a finer grid, added to the base.
//!
//! Every tile has its codes in the base, salient or not, so that the main loop has no branch; the corrections are a second,
//! sparse pass. Their grid is signed and symmetric with a scale of its own for each tile.

use crate::{PackError, SharedBytes, TILE, TileMap};
use half::f16;
use serde::{Deserialize, Serialize};

/// Width of the codes of tile corrections.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "u32", into = "u32")]
pub enum TileBits {
    /// From -8 to 7; code `i` at bits `4i` of the tile's eight bytes read as one little-endian u64, two's complement.
    Four,
    /// From -128 to 127; code `i` in byte `i`.
    Eight,
}

impl TileBits {
    /// All widths.
    pub const ALL: [TileBits; 2] = [TileBits::Four, TileBits::Eight];

    /// The width as a number.
    pub fn count(self) -> u32 {
        match self {
            TileBits::Four => 4,
            TileBits::Eight => 8,
        }
    }

    /// The largest code, which is what a symmetric grid scales to.
    pub fn max_code(self) -> i8 {
        i8::MAX >> (8 - self.count())
    }

    /// Bytes of the codes of one tile.
    pub fn tile_bytes(self) -> usize {
        TILE * self.count() as usize / 8
    }
}

impl TryFrom<u32> for TileBits {
    type Error = String;
    fn try_from(n: u32) -> Result<Self, String> {
        let known = TileBits::ALL.into_iter().find(|b| b.count() == n);
        known.ok_or_else(|| format!("no tile correction has {n} bits: use 4 or 8"))
    }
}

impl From<TileBits> for u32 {
    fn from(b: TileBits) -> u32 {
        b.count()
    }
}

/// The correction of one tile: `codes[i] * scale` is added to weight `i` of the tile.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TileCorrection {
    /// Which tile of its row.
    pub tile: usize,
    /// Finite and not negative.
    pub scale: f16,
    /// Codes past the last column are 0.
    pub codes: [i8; TILE],
}

/// The parts of tile corrections as they lie in a file, little-endian.
#[derive(Clone, Debug)]
pub struct TileParts {
    /// u8 `[rows, ceil(tiles / 8)]`, see [`TileMap`].
    pub tilemap: SharedBytes,
    /// `[n, tile_bytes]`: the codes of the `n` marked tiles, row after row, see [`TileBits`].
    pub codes: SharedBytes,
    /// f16 `[n]`, finite and not negative.
    pub scales: SharedBytes,
}

/// Corrections of some tiles of a `[rows, cols]` matrix; cheap to clone.
#[derive(Clone, Debug)]
pub struct TileCorrections {
    map: TileMap,
    bits: TileBits,
    parts: TileParts,
}

impl TileCorrections {
    /// Validates sizes, alignment, scales and the codes past the last column once; afterwards nothing is checked again.
    pub fn new(rows: usize, cols: usize, bits: TileBits, parts: TileParts) -> Result<Self, PackError> {
        let map = TileMap::new(rows, cols, parts.tilemap.clone())?;
        let size = |part, bytes: &SharedBytes, one: usize| {
            let (found, expected) = (bytes.len(), map.len() * one);
            if found == expected { Ok(()) } else { Err(PackError::CorrectionSize { part, found, expected }) }
        };
        size("tile_codes", &parts.codes, bits.tile_bytes())?;
        size("tile_scales", &parts.scales, 2)?;
        check_scales("tile_scales", &parts.scales)?;
        let corrections = TileCorrections { map, bits, parts };
        let (last, used) = (cols / TILE, cols % TILE);
        for row in 0..if used == 0 { 0 } else { rows } {
            let codes = corrections.map.rank(row, last).map(|rank| corrections.codes(rank));
            if let Some(&code) = codes.iter().flat_map(|c| &c[used..]).find(|c| **c != 0) {
                return Err(PackError::TileCode { row, tile: last, code });
            }
        }
        Ok(corrections)
    }

    /// The corrections of each row, tiles strictly ascending, for a matrix of `cols` columns.
    pub fn from_rows(cols: usize, bits: TileBits, rows: &[Vec<TileCorrection>]) -> Result<Self, PackError> {
        let map = TileMap::from_rows(cols, rows.iter().map(|row| row.iter().map(|t| t.tile)))?;
        let mut codes = Vec::with_capacity(map.len() * bits.tile_bytes());
        for (row, t) in rows.iter().enumerate().flat_map(|(r, row)| row.iter().map(move |t| (r, t))) {
            let max = bits.max_code();
            if let Some(&code) = t.codes.iter().find(|c| !(-max - 1..=max).contains(*c)) {
                return Err(PackError::TileCode { row, tile: t.tile, code });
            }
            match bits {
                TileBits::Four => {
                    codes.extend(t.codes.as_chunks::<2>().0.iter().map(|[a, b]| *a as u8 & 15 | (*b as u8) << 4))
                }
                TileBits::Eight => codes.extend(t.codes.map(|c| c as u8)),
            }
        }
        let scales: Vec<f16> = rows.iter().flatten().map(|t| t.scale).collect();
        let parts = TileParts {
            tilemap: map.bytes().clone(),
            codes: SharedBytes::from_vec(codes),
            scales: SharedBytes::from_vec(scales),
        };
        TileCorrections::new(rows.len(), cols, bits, parts)
    }

    /// The rows of all `panels`, one under the other; a panel is `(rows, its corrections)` and may have none. `None` when no
    /// panel has any; panics when the widths differ.
    pub(crate) fn stack(cols: usize, panels: &[(usize, Option<&TileCorrections>)]) -> Option<Self> {
        let there = || panels.iter().filter_map(|p| p.1);
        let bits = there().next()?.bits;
        assert!(there().all(|t| t.bits == bits), "tile corrections of one width");
        let map = TileMap::stack(cols, panels.iter().map(|p| (p.0, p.1.map(|t| &t.map))));
        let parts = TileParts {
            tilemap: map.bytes().clone(),
            codes: SharedBytes::from_vec(there().flat_map(|t| t.parts.codes.iter().copied()).collect::<Vec<u8>>()),
            scales: SharedBytes::from_vec(there().flat_map(|t| t.scales()).copied().collect::<Vec<f16>>()),
        };
        let rows = map.rows();
        Some(TileCorrections::new(rows, cols, bits, parts).expect("stacked corrections are as valid as each of them"))
    }

    /// Rows of the matrix.
    pub fn rows(&self) -> usize {
        self.map.rows()
    }

    /// Columns of the matrix.
    pub fn cols(&self) -> usize {
        self.map.cols()
    }

    /// Width of the codes.
    pub fn bits(&self) -> TileBits {
        self.bits
    }

    /// Which tiles are corrected.
    pub fn map(&self) -> &TileMap {
        &self.map
    }

    /// The parts as they lie in a file.
    pub fn parts(&self) -> &TileParts {
        &self.parts
    }

    /// How many tiles are corrected.
    pub fn len(&self) -> usize {
        self.map.len()
    }

    /// Whether no tile is.
    pub fn is_empty(&self) -> bool {
        self.map.is_empty()
    }

    /// Bytes of all parts together.
    pub fn bytes(&self) -> usize {
        self.parts.tilemap.len() + self.parts.codes.len() + self.parts.scales.len()
    }

    /// The scales by rank.
    pub fn scales(&self) -> &[f16] {
        self.parts.scales.cast().expect("checked at the door")
    }

    /// The codes of the tile with this rank as they are stored: [`TileBits::tile_bytes`] bytes.
    pub fn code_bytes(&self, rank: usize) -> &[u8] {
        let n = self.bits.tile_bytes();
        &self.parts.codes[rank * n..(rank + 1) * n]
    }

    /// The codes of the tile with this rank.
    pub fn codes(&self, rank: usize) -> [i8; TILE] {
        let bytes = self.code_bytes(rank);
        match self.bits {
            // The shifts carry the sign of the upper and of the lower half byte down.
            TileBits::Four => std::array::from_fn(|i| ((bytes[i / 2] << (4 * (1 - i % 2))) as i8) >> 4),
            TileBits::Eight => std::array::from_fn(|i| bytes[i] as i8),
        }
    }

    /// The corrected tiles of row `r`, ascending.
    pub fn row(&self, r: usize) -> impl Iterator<Item = TileCorrection> + '_ {
        let scales = self.scales();
        self.map.row(r).map(move |(tile, rank)| TileCorrection { tile, scale: scales[rank], codes: self.codes(rank) })
    }

    /// What is added to weight `(r, c)`; `None` when its tile is not corrected. Takes the same time anywhere.
    pub fn get(&self, r: usize, c: usize) -> Option<f32> {
        let rank = self.map.rank(r, c / TILE)?;
        Some(f32::from(self.codes(rank)[c % TILE]) * self.scales()[rank].to_f32())
    }

    /// Adds the corrections of row `r` to that row, `[cols]`.
    pub fn add_to_row(&self, r: usize, row: &mut [f32]) {
        for TileCorrection { tile, scale, codes } in self.row(r) {
            let end = row.len().min((tile + 1) * TILE);
            for (weight, code) in row[tile * TILE..end].iter_mut().zip(codes) {
                *weight += f32::from(code) * scale.to_f32();
            }
        }
    }
}

/// Index of the first scale that is infinite, no number or negative.
pub(crate) fn bad_scale(scales: &[f16]) -> Option<usize> {
    // Infinity, what is no number, and everything with a sign have larger bits than numbers without; a negative zero is fine.
    // Opening a model checks millions of scales: without a branch for each, they pass in vectors.
    let is_bad = |s: &f16| (s.to_bits() >= f16::INFINITY.to_bits()) & (s.to_bits() != f16::NEG_ZERO.to_bits());
    let mut chunks = scales.chunks(1024).enumerate();
    let (i, chunk) = chunks.find(|(_, chunk)| chunk.iter().fold(false, |any, s| any | is_bad(s)))?;
    chunk.iter().position(is_bad).map(|at| 1024 * i + at)
}

/// Fails on a scale that is not finite or negative, or when they are misaligned.
pub(crate) fn check_scales(part: &'static str, scales: &SharedBytes) -> Result<(), PackError> {
    let scales = scales.cast::<f16>().ok_or(PackError::Misaligned(part))?;
    match bad_scale(scales) {
        Some(index) => Err(PackError::CorrectionScale { part, index, value: scales[index].to_f32() }),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bad_scales_are_found_wherever_they_are() {
        let good = [f16::ZERO, f16::NEG_ZERO, f16::MIN_POSITIVE, f16::ONE, f16::MAX];
        let scales: Vec<f16> = good.into_iter().cycle().take(2500).collect();
        assert_eq!(bad_scale(&scales), None);
        for at in [0, 1023, 1024, 2499] {
            for bad in [f16::INFINITY, f16::NEG_INFINITY, f16::NAN, -f16::ONE, f16::MIN, f16::from_bits(0xffff)] {
                let mut scales = scales.clone();
                scales[at] = bad;
                assert_eq!(bad_scale(&scales), Some(at), "{bad}");
            }
        }
    }
}
