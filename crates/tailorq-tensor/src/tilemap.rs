//! A bitmap over the tiles of a matrix that finds the data of any marked tile in constant time.

use crate::{PackError, SharedBytes, TILE};
use std::sync::Arc;

/// Tiles that one entry of the rank directory stands for.
const WORD: usize = 64;

/// Marks some of the tiles of a `[rows, cols]` matrix and numbers them row after row. Cheap to clone.
///
/// The bitmap is u8 `[rows, ceil(tiles / 8)]`: tile `t` of a row is bit `t % 8` of its byte `t / 8`, and bits beyond the last
/// tile are 0. The number (rank) of a tile is how many marked tiles precede it: a directory has that count for every 64th
/// tile of a row, the rest is one population count. Who walks over many rows takes the tiles as one flat run instead, from
/// a second directory in memory ([`TileMap::places`]): a loop over the few tiles of each row ends at another turn in each.
#[derive(Clone, Debug)]
pub struct TileMap {
    rows: usize,
    cols: usize,
    bits: SharedBytes,
    /// Marked tiles before each word of each row, and in all: `[rows * words + 1]`.
    ranks: Arc<[u32]>,
    /// See [`TileMap::places`].
    places: Arc<[TilePlace]>,
}

/// Where a marked tile lies, in a word: its row modulo 256, and which tile of the row it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TilePlace(u32);

impl TilePlace {
    /// Tiles of the widest row that has places.
    const TILES: usize = 1 << 24;

    fn new(row: usize, tile: usize) -> Self {
        TilePlace((tile as u32) << 8 | row as u32 & 0xFF)
    }

    /// Which tile of its row.
    pub fn tile(self) -> usize {
        self.0 as usize >> 8
    }

    /// How many rows after row `first` its own is, which are less than 256.
    pub fn row_after(self, first: usize) -> usize {
        usize::from((self.0 as u8).wrapping_sub(first as u8))
    }
}

impl TileMap {
    /// Bytes of the bitmap of one row of `cols` columns.
    pub fn row_bytes(cols: usize) -> usize {
        cols.div_ceil(TILE).div_ceil(8)
    }

    /// Validates the size and that no bit lies beyond a row's last tile; counts once.
    pub fn new(rows: usize, cols: usize, bits: SharedBytes) -> Result<Self, PackError> {
        let too_large = || PackError::TooLarge(rows, cols);
        let n = TileMap::row_bytes(cols);
        let expected = rows.checked_mul(n).ok_or_else(too_large)?;
        if bits.len() != expected {
            return Err(PackError::CorrectionSize { part: "tilemap", found: bits.len(), expected });
        }
        let tiles = cols.div_ceil(TILE);
        if tiles > TilePlace::TILES {
            return Err(too_large());
        }
        let (mut ranks, mut places) = (vec![0], Vec::new());
        let mut marked = 0u32;
        for (row, bytes) in bits.chunks_exact(n.max(1)).enumerate() {
            for (i, word) in bytes.chunks(WORD / 8).map(word_of).enumerate() {
                let end = WORD * i + WORD - word.leading_zeros() as usize;
                if end > tiles {
                    return Err(PackError::Tile { row, tile: end - 1, tiles });
                }
                marked = marked.checked_add(word.count_ones()).ok_or_else(too_large)?;
                ranks.push(marked);
                places.extend(Ones(word).map(|bit| TilePlace::new(row, WORD * i + bit)));
            }
        }
        Ok(TileMap { rows, cols, bits, ranks: ranks.into(), places: places.into() })
    }

    /// The map of the tiles that are listed for each row, strictly ascending.
    pub fn from_rows<R: IntoIterator<Item = usize>>(
        cols: usize,
        rows: impl IntoIterator<Item = R>,
    ) -> Result<Self, PackError> {
        let (n, tiles) = (TileMap::row_bytes(cols), cols.div_ceil(TILE));
        let (mut bits, mut n_rows) = (Vec::new(), 0);
        for (row, marked) in rows.into_iter().enumerate() {
            let mut bytes = vec![0u8; n];
            let mut least = 0;
            for tile in marked {
                if tile < least || tile >= tiles {
                    return Err(PackError::Tile { row, tile, tiles });
                }
                bytes[tile / 8] |= 1 << (tile % 8);
                least = tile + 1;
            }
            bits.extend(bytes);
            n_rows += 1;
        }
        TileMap::new(n_rows, cols, SharedBytes::from_vec(bits))
    }

    /// The rows of all `panels`, one under the other; a panel without a map, only with rows, marks nothing.
    pub(crate) fn stack<'a>(cols: usize, panels: impl Iterator<Item = (usize, Option<&'a TileMap>)>) -> Self {
        let (mut bits, mut rows) = (Vec::new(), 0);
        for (n, map) in panels {
            rows += n;
            match map {
                Some(map) => bits.extend_from_slice(&map.bits),
                None => bits.resize(bits.len() + n * TileMap::row_bytes(cols), 0u8),
            }
        }
        TileMap::new(rows, cols, SharedBytes::from_vec(bits)).expect("stacked maps are as valid as each of them")
    }

    /// Rows of the matrix.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Columns of the matrix.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The bitmap as it lies in a file.
    pub fn bytes(&self) -> &SharedBytes {
        &self.bits
    }

    /// How many tiles are marked.
    pub fn len(&self) -> usize {
        self.ranks.last().map_or(0, |&n| n as usize)
    }

    /// Whether none is.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The rank of tile `tile` in row `r`; `None` when it is not marked.
    pub fn rank(&self, r: usize, tile: usize) -> Option<usize> {
        let word = word_of(self.row_bits(r).chunks(WORD / 8).nth(tile / WORD)?);
        let bit = tile % WORD;
        let before = word & ((1 << bit) - 1);
        (word >> bit & 1 == 1)
            .then(|| self.ranks[r * self.words() + tile / WORD] as usize + before.count_ones() as usize)
    }

    /// How many marked tiles precede row `r`, which may be the end.
    pub fn rank_of_row(&self, r: usize) -> usize {
        self.ranks[r * self.words()] as usize
    }

    /// The marked tiles by rank: four bytes each, in memory alone.
    pub fn places(&self) -> &[TilePlace] {
        &self.places
    }

    /// The marked tiles of row `r` with their ranks, both ascending.
    pub fn row(&self, r: usize) -> impl Iterator<Item = (usize, usize)> + '_ {
        let first = self.ranks[r * self.words()] as usize;
        let words = self.row_bits(r).chunks(WORD / 8).map(word_of).enumerate();
        words
            .flat_map(|(i, word)| Ones(word).map(move |bit| WORD * i + bit))
            .enumerate()
            .map(move |(i, t)| (t, first + i))
    }

    /// Entries of the rank directory in a row.
    fn words(&self) -> usize {
        self.cols.div_ceil(TILE).div_ceil(WORD)
    }

    fn row_bits(&self, r: usize) -> &[u8] {
        let n = TileMap::row_bytes(self.cols);
        &self.bits[r * n..(r + 1) * n]
    }
}

/// Up to eight bytes of a row, little-endian.
fn word_of(bytes: &[u8]) -> u64 {
    let mut word = [0; WORD / 8];
    word[..bytes.len()].copy_from_slice(bytes);
    u64::from_le_bytes(word)
}

/// The positions of the bits that are set, from the lowest on.
struct Ones(u64);

impl Iterator for Ones {
    type Item = usize;
    fn next(&mut self) -> Option<usize> {
        let at = self.0.trailing_zeros() as usize;
        // Clears the lowest bit that is set.
        self.0 &= self.0.checked_sub(1)?;
        Some(at)
    }
}
