//! The literal scheme of the memory-aligned paper: the 32-bit word of a salient tile holds four int8 instead of sixteen
//! 2-bit codes, each the mean of four neighbouring weights.
//!
//! Kept so that the paper can be reproduced and measured as it is written. The mean of four uncorrelated weights leaves
//! three quarters of their variance, so a tile of means is finer in value and four times coarser in place.

use crate::tiles::check_scales;
use crate::{Group, PackError, SharedBytes, TILE, TileMap};
use half::f16;

/// Neighbouring weights that share a mean.
const RUN: usize = 4;

/// One tile of means: weight `i` of the tile is `means[i / 4]` times the scale of its row and group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MeanTile {
    /// Which tile of its row.
    pub tile: usize,
    /// A mean all of whose weights are past the last column is 0.
    pub means: [i8; TILE / RUN],
}

impl MeanTile {
    /// The tile's word in the codes: mean `i` in byte `i`, two's complement.
    pub(crate) fn word(&self) -> u32 {
        u32::from_le_bytes(self.means.map(|m| m as u8))
    }
}

/// Which tiles of a 2-bit matrix hold means, and the scales of the means. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Mean4 {
    map: TileMap,
    group: Group,
    scales: SharedBytes,
}

impl Mean4 {
    /// `tilemap` as [`TileMap`] says, `scales` f16 `[rows, groups]`, finite and not negative; checked once.
    pub fn new(
        rows: usize,
        cols: usize,
        group: Group,
        tilemap: SharedBytes,
        scales: SharedBytes,
    ) -> Result<Self, PackError> {
        let map = TileMap::new(rows, cols, tilemap)?;
        let expected = rows.checked_mul(group.count(cols)).and_then(|n| n.checked_mul(2));
        let expected = expected.ok_or(PackError::TooLarge(rows, cols))?;
        if scales.len() != expected {
            return Err(PackError::CorrectionSize { part: "mean_scales", found: scales.len(), expected });
        }
        check_scales("mean_scales", &scales)?;
        Ok(Mean4 { map, group, scales })
    }

    /// The tiles that are listed for each row, strictly ascending; `scales` are f16 `[rows, groups]`.
    pub(crate) fn from_rows(
        cols: usize,
        group: Group,
        scales: &[f16],
        rows: &[Vec<MeanTile>],
    ) -> Result<Self, PackError> {
        let map = TileMap::from_rows(cols, rows.iter().map(|row| row.iter().map(|t| t.tile)))?;
        Mean4::new(rows.len(), cols, group, map.bytes().clone(), SharedBytes::from_vec(scales.to_vec()))
    }

    /// The rows of all `panels`, one under the other; a panel is `(rows, its means)` and may have none. `None` when no panel
    /// has any; panics when the groups differ.
    pub(crate) fn stack(cols: usize, panels: &[(usize, Option<&Mean4>)]) -> Option<Self> {
        let group = panels.iter().find_map(|p| p.1)?.group;
        assert!(panels.iter().filter_map(|p| p.1).all(|m| m.group == group), "means of one group size");
        let map = TileMap::stack(cols, panels.iter().map(|p| (p.0, p.1.map(|m| &m.map))));
        let mut scales = Vec::new();
        for &(rows, means) in panels {
            match means {
                Some(means) => scales.extend_from_slice(means.scales()),
                None => scales.resize(scales.len() + rows * group.count(cols), f16::ZERO),
            }
        }
        let stacked = Mean4::new(map.rows(), cols, group, map.bytes().clone(), SharedBytes::from_vec(scales));
        Some(stacked.expect("stacked means are as valid as each of them"))
    }

    /// Rows of the matrix.
    pub fn rows(&self) -> usize {
        self.map.rows()
    }

    /// Columns of the matrix.
    pub fn cols(&self) -> usize {
        self.map.cols()
    }

    /// Groups of the scales, those of the base.
    pub fn group(&self) -> Group {
        self.group
    }

    /// Which tiles hold means.
    pub fn map(&self) -> &TileMap {
        &self.map
    }

    /// The scales as they lie in a file.
    pub fn scale_bytes(&self) -> &SharedBytes {
        &self.scales
    }

    /// How many tiles hold means.
    pub fn len(&self) -> usize {
        self.map.len()
    }

    /// Whether no tile does.
    pub fn is_empty(&self) -> bool {
        self.map.is_empty()
    }

    /// Bytes beside the base.
    pub fn bytes(&self) -> usize {
        self.map.bytes().len() + self.scales.len()
    }

    /// Fails when a mean past the last column is not 0; `words` are the code words of the matrix, one a tile.
    pub(crate) fn check(&self, words: &[u32]) -> Result<(), PackError> {
        let (tile, used) = (self.cols() / TILE, (self.cols() % TILE).div_ceil(RUN));
        if used == 0 {
            return Ok(());
        }
        for (row, words) in words.chunks_exact(tile + 1).enumerate() {
            let past = means(words[tile])[used..].iter().find(|m| **m != 0).copied();
            if let (Some(code), Some(_)) = (past, self.map.rank(row, tile)) {
                return Err(PackError::TileCode { row, tile, code });
            }
        }
        Ok(())
    }

    /// Weight `(r, c)`; `None` when its tile holds codes. `words` are the code words of row `r`.
    pub(crate) fn get(&self, r: usize, c: usize, words: &[u32]) -> Option<f32> {
        let tile = c / TILE;
        self.map.rank(r, tile)?;
        Some(
            f32::from(means(words[tile])[c % TILE / RUN])
                * self.row_scales(r)[c / self.group.len(self.cols())].to_f32(),
        )
    }

    /// Writes the tiles of means into row `r`, `[cols]`, and leaves the others; `words` are the row's code words.
    pub fn write_to_row(&self, r: usize, words: &[u32], row: &mut [f32]) {
        let (group, scales) = (self.group.len(self.cols()), self.row_scales(r));
        for (tile, _) in self.map.row(r) {
            // Groups are whole tiles, so a tile lies in one group.
            let scale = scales[tile * TILE / group].to_f32();
            let end = row.len().min((tile + 1) * TILE);
            for (weights, mean) in row[tile * TILE..end].chunks_mut(RUN).zip(means(words[tile])) {
                weights.fill(f32::from(mean) * scale);
            }
        }
    }

    fn scales(&self) -> &[f16] {
        self.scales.cast().expect("checked at the door")
    }

    fn row_scales(&self, r: usize) -> &[f16] {
        let n = self.group.count(self.cols());
        &self.scales()[r * n..(r + 1) * n]
    }
}

/// The four means of a word.
fn means(word: u32) -> [i8; TILE / RUN] {
    word.to_le_bytes().map(|b| b as i8)
}
