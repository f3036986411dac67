//! Matrices as the kernels of `decode_gemv.cu` read them, arranged in the host's memory.
//!
//! A matrix lies in tiles of 16 rows and units of 128 columns (64 of a dense one), which `stream` puts in order. In a unit lane `4 g + t` of a warp holds
//! rows `g` and `g + 8` of the tile at columns `16 step + 8 high + 2 t + odd`; where in its words each code lies is what
//! [`Format::pieces`] says. Rows past the last and columns past the last have codes, scales and zeros of 0.

use half::{bf16, f16};
use rayon::prelude::*;
use tailorq_tensor::{Bits, Group, InputTransform, PackedMatrix, Weight};

/// Rows of a tile.
pub(super) const TILE_ROWS: usize = 16;

/// Columns of a chunk of activations.
pub(super) const CHUNK: usize = 128;

/// The type in which dense weights lie on the device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DenseWeights {
    /// Half precision: three bits more than bfloat16, numbers below 6e-5 rounded to multiples of 6e-8.
    #[default]
    F16,
    /// bfloat16, as most checkpoints have them.
    Bf16,
}

/// How the numbers of a matrix are written on the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Format {
    /// Codes times scales, less a zero.
    Affine(Bits),
    /// Codes are places in a table.
    Codebook(Bits),
    /// Numbers.
    Dense(DenseWeights),
}

/// Some bits of a code: `width` of them, from bit `from` of the code, at bit `to` of word `word` of its row.
#[derive(Clone, Copy, Debug)]
struct Piece {
    word: usize,
    to: u32,
    from: u32,
    width: u32,
}

impl Format {
    /// The format of `weight` when dense weights are kept as `dense`.
    pub(super) fn of(weight: &Weight, dense: DenseWeights) -> Format {
        match weight {
            // Means of four are a scheme for comparisons: their values are kept instead, exact up to the rounding to f16.
            Weight::Packed(m) if m.mean4().is_some() => Format::Dense(DenseWeights::F16),
            Weight::Packed(m) if m.levels().is_some() => Format::Codebook(m.layout().bits),
            Weight::Packed(m) => Format::Affine(m.layout().bits),
            Weight::Dense(_) | Weight::Stored(_) => Format::Dense(dense),
        }
    }

    /// Words of a lane in a unit.
    pub(super) fn lane_words(self) -> usize {
        match self {
            Format::Affine(bits) | Format::Codebook(bits) => 2 * bits.count() as usize,
            Format::Dense(_) => 16,
        }
    }

    /// Columns of a unit.
    pub(super) fn unit_columns(self) -> usize {
        if matches!(self, Format::Dense(_)) { 64 } else { CHUNK }
    }

    /// Where the code of column `16 step + 8 high + 2 t + odd` lies in the words that lane `t` has of a row; see `pair` in
    /// `decode_codes.cuh`.
    fn pieces(self, step: usize, high: usize, odd: usize) -> Vec<Piece> {
        let upper = 16 * odd as u32;
        let whole = |word: usize, to: u32, width: u32| vec![Piece { word, to: to + upper, from: 0, width }];
        match self {
            Format::Affine(Bits::Two) => whole(high, 2 * step as u32, 2),
            Format::Affine(Bits::Three) => match (step, high) {
                (0..5, _) => whole(high, 3 * step as u32, 3),
                (5 | 6, 0) => whole(2, 3 * (step - 5) as u32, 3),
                (5 | 6, _) => whole(2, 9 + 3 * (step - 5) as u32, 3),
                (_, 0) => whole(2, 6, 3),
                // What is left of each word is one bit.
                _ => (0..3).map(|i| Piece { word: i, to: 15 + upper, from: i as u32, width: 1 }).collect(),
            },
            Format::Affine(Bits::Four) => whole(step / 4 * 2 + high, 4 * (step % 4) as u32, 4),
            Format::Affine(Bits::Six) => match step {
                0..6 => whole(3 * high + step / 2, 6 * (step % 2) as u32, 6),
                // What is left of each word is four bits.
                _ => {
                    let low = Piece { word: 3 * high + step - 6, to: 12 + upper, from: 0, width: 4 };
                    let top = Piece { word: 3 * high + 2, to: 12 + 2 * (step as u32 - 6) + upper, from: 4, width: 2 };
                    vec![low, top]
                }
            },
            Format::Affine(Bits::Eight) => whole(step / 2 * 2 + high, 8 * (step % 2) as u32, 8),
            Format::Codebook(bits) => selector(bits, step, high, odd),
            Format::Dense(_) => Vec::new(),
        }
    }
}

/// Codes as nibbles of the selectors of byte permutations, four a selector.
fn selector(bits: Bits, step: usize, high: usize, odd: usize) -> Vec<Piece> {
    let nibble = (step % 2 * 2 + odd + step / 2 % 2 * 4) as u32;
    if bits == Bits::Four {
        return vec![Piece { word: step / 4 * 2 + high, to: 4 * nibble, from: 0, width: 4 }];
    }
    let place = step / 4;
    let mut pieces = vec![Piece { word: high, to: 4 * nibble + 2 * place as u32, from: 0, width: 2 }];
    if bits == Bits::Three {
        pieces.push(Piece { word: 2, to: 4 * nibble + (high * 2 + place) as u32, from: 2, width: 1 });
    }
    pieces
}

/// The pieces of all 32 codes that a lane has of a row in a unit: `[step, high, odd]`.
fn table(format: Format) -> Vec<Vec<Piece>> {
    (0..32).map(|i| format.pieces(i / 4, i / 2 % 2, i % 2)).collect()
}

/// Which row of which matrix lies where: tiles from one or several matrices of the same columns.
pub(super) struct Tiles<'a> {
    pub(super) matrices: Vec<&'a Weight>,
    /// `(matrix, its first row)` of the upper and of the lower eight rows of each tile.
    order: Vec<[(usize, usize); 2]>,
}

impl<'a> Tiles<'a> {
    /// One under the other. All but the last have whole tiles.
    pub(super) fn stacked(matrices: Vec<&'a Weight>) -> Self {
        let tiles = |m: &Weight| m.rows().div_ceil(TILE_ROWS);
        let tile = |i: usize, t: usize| [(i, t * TILE_ROWS), (i, t * TILE_ROWS + TILE_ROWS / 2)];
        let order = (matrices.iter().enumerate()).flat_map(|(i, m)| (0..tiles(m)).map(move |t| tile(i, t))).collect();
        Tiles { matrices, order }
    }

    /// Two matrices of the same rows: eight rows of the first and the same eight of the second in a tile.
    pub(super) fn paired(first: &'a Weight, second: &'a Weight) -> Self {
        let half = TILE_ROWS / 2;
        let order = (0..first.rows().div_ceil(half)).map(|t| [(0, t * half), (1, t * half)]).collect();
        Tiles { matrices: vec![first, second], order }
    }

    /// How many there are.
    pub(super) fn len(&self) -> usize {
        self.order.len()
    }

    pub(super) fn cols(&self) -> usize {
        self.matrices[0].cols()
    }

    pub(super) fn chunks(&self) -> usize {
        self.cols().div_ceil(CHUNK)
    }

    /// The matrix that row `r` of a tile is of, and which of its rows, if it has that row.
    fn row(&self, tile: usize, r: usize) -> (&'a Weight, Option<usize>) {
        let (matrix, first) = self.order[tile][r / (TILE_ROWS / 2)];
        let weight = self.matrices[matrix];
        let row = first + r % (TILE_ROWS / 2);
        (weight, (row < weight.rows()).then_some(row))
    }

    /// The same of a packed matrix.
    pub(super) fn packed(&self, tile: usize, r: usize) -> Option<(&'a PackedMatrix, usize)> {
        match self.row(tile, r) {
            (Weight::Packed(m), Some(row)) => Some((m.as_ref(), row)),
            _ => None,
        }
    }

    /// One number a row, in the order of the tiles.
    pub(super) fn per_row(&self, values: &[Option<&[f32]>]) -> Vec<f32> {
        let mut all = vec![0.0; self.order.len() * TILE_ROWS];
        for (tile, out) in all.chunks_exact_mut(TILE_ROWS).enumerate() {
            for (r, out) in out.iter_mut().enumerate() {
                let (matrix, first) = self.order[tile][r / (TILE_ROWS / 2)];
                let at = first + r % (TILE_ROWS / 2);
                *out = values[matrix].and_then(|v| v.get(at)).copied().unwrap_or(0.0);
            }
        }
        all
    }

    /// The words of all units.
    pub(super) fn codes(&self, format: Format) -> Vec<u32> {
        let words = format.lane_words() * 32;
        let units = self.cols().div_ceil(CHUNK) * CHUNK / format.unit_columns();
        let mut all = vec![0u32; self.order.len() * units * words];
        let table = table(format);
        all.par_chunks_mut((units * words).max(1)).enumerate().for_each(|(tile, out)| match format {
            Format::Dense(kind) => self.dense_tile(tile, kind, out),
            Format::Affine(_) | Format::Codebook(_) => self.packed_tile(tile, format, &table, out),
        });
        all
    }

    fn packed_tile(&self, tile: usize, format: Format, table: &[Vec<Piece>], out: &mut [u32]) {
        let lane_words = format.lane_words();
        let mut codes = vec![0u8; self.chunks() * CHUNK];
        let mut row_words = vec![0u32; lane_words / 2];
        for r in 0..TILE_ROWS {
            let Some((m, row)) = self.packed(tile, r) else { continue };
            read_codes(m, row, &mut codes);
            for (unit, codes) in out.chunks_exact_mut(lane_words * 32).zip(codes.chunks_exact(CHUNK)) {
                for quarter in 0..4 {
                    row_words.fill(0);
                    for (i, pieces) in table.iter().enumerate() {
                        let code = u32::from(codes[16 * (i / 4) + 8 * (i / 2 % 2) + 2 * quarter + i % 2]);
                        for p in pieces {
                            row_words[p.word] |= (code >> p.from & ((1 << p.width) - 1)) << p.to;
                        }
                    }
                    let lane = r % 8 * 4 + quarter;
                    for (i, &word) in row_words.iter().enumerate() {
                        unit[place(lane_words, lane, r / 8 * (lane_words / 2) + i)] = word;
                    }
                }
            }
        }
    }

    fn dense_tile(&self, tile: usize, kind: DenseWeights, out: &mut [u32]) {
        let cols = self.cols();
        let mut values = vec![0.0f32; cols];
        let mut bits = vec![0u16; self.chunks() * CHUNK];
        for r in 0..TILE_ROWS {
            let (weight, Some(row)) = self.row(tile, r) else { continue };
            weight.reader().read_rows(row, &mut values);
            for (bits, &v) in bits.iter_mut().zip(&values) {
                *bits = match kind {
                    DenseWeights::F16 => f16::from_f32(v.clamp(-65504.0, 65504.0)).to_bits(),
                    DenseWeights::Bf16 => bf16::from_f32(v).to_bits(),
                };
            }
            for (unit, bits) in out.chunks_exact_mut(16 * 32).zip(bits.chunks_exact(64)) {
                for (i, pair) in bits.as_chunks::<2>().0.iter().enumerate() {
                    // Pair `i` is columns `16 step + 8 high + 2 quarter` and the next.
                    let (step, high, quarter) = (i / 8, i / 4 % 2, i % 4);
                    let word = 4 * step + 2 * high + r / 8;
                    unit[place(16, r % 8 * 4 + quarter, word)] = u32::from(pair[0]) | u32::from(pair[1]) << 16;
                }
            }
        }
    }

    /// Scales of rows `g` and `g + 8`: `[tiles, groups, 8]`.
    pub(super) fn scales(&self, groups: usize) -> Vec<u32> {
        let mut all = vec![0u32; self.order.len() * groups * 8];
        for (tile, out) in all.chunks_exact_mut(groups * 8).enumerate() {
            for r in 0..TILE_ROWS {
                let Some((m, row)) = self.packed(tile, r) else { continue };
                for (group, scale) in m.scales(row).iter().enumerate() {
                    out[group * 8 + r % 8] |= u32::from(scale.to_bits()) << (r / 8 * 16);
                }
            }
        }
        all
    }

    /// Zeros of rows `g` and `g + 8` at the same bits of both halves of a word: `[tiles, groups, words]`.
    pub(super) fn zeros(&self, groups: usize, bits: Bits) -> Vec<u32> {
        let width = zero_bits(bits);
        let (words, rows) = (width / 2, 16 / width);
        let put = |out: &mut [u32], r: usize, zero: u8| {
            out[r % 8 / rows] |= u32::from(zero) << (r % 8 % rows * width + r / 8 * 16);
        };
        let mut all = vec![0u32; self.order.len() * groups * words];
        for (tile, out) in all.chunks_exact_mut(groups * words).enumerate() {
            for r in 0..TILE_ROWS {
                let Some((m, row)) = self.packed(tile, r) else { continue };
                for group in 0..m.layout().group.count(m.cols()) {
                    put(&mut out[group * words..], r, m.zero(row, group));
                }
            }
        }
        all
    }

    /// What the matrices have in common, if they have it in common.
    pub(super) fn agree(matrices: &[&Weight], dense: DenseWeights) -> bool {
        let base = |w: &Weight| {
            let packed = match w {
                Weight::Packed(m) if m.mean4().is_none() => Some(m),
                _ => None,
            };
            let levels = packed.and_then(|m| m.levels().map(<[f16]>::to_vec));
            let transform = packed.and_then(|m| m.transform().map(InputTransform::spec));
            (Format::of(w, dense), w.cols(), packed.map(|m| m.layout()), levels, transform)
        };
        matrices.windows(2).all(|pair| base(pair[0]) == base(pair[1]))
    }

    /// All rows, as tile and row of the tile.
    pub(super) fn rows(&self) -> impl Iterator<Item = (usize, usize)> {
        (0..self.order.len()).flat_map(|tile| (0..TILE_ROWS).map(move |r| (tile, r)))
    }
}

/// Bits of a zero on the device.
fn zero_bits(bits: Bits) -> usize {
    match bits {
        Bits::Two => 2,
        Bits::Three | Bits::Four => 4,
        Bits::Six | Bits::Eight => 8,
    }
}

/// Words of a group of zeros.
pub(super) fn zero_words(bits: Bits) -> usize {
    zero_bits(bits) / 2
}

/// The zero of a symmetric layout at all places of a word.
pub(super) fn middle_word(bits: Bits) -> u32 {
    (0..32).step_by(zero_bits(bits)).fold(0, |word, at| word | u32::from(bits.middle()) << at)
}

/// Steps of 16 columns in a group; 0: one group a row.
pub(super) fn group_steps(group: Group) -> usize {
    match group {
        Group::Inputs(n) => n / 16,
        Group::Row => 0,
    }
}

/// The levels of a codebook as four words of lower bytes and four of upper ones.
pub(super) fn level_words(levels: &[f16]) -> [u32; 8] {
    let mut words = [0u32; 8];
    for (i, level) in levels.iter().enumerate() {
        let [low, high] = level.to_bits().to_le_bytes();
        words[i / 4] |= u32::from(low) << (8 * (i % 4));
        words[4 + i / 4] |= u32::from(high) << (8 * (i % 4));
    }
    words
}

/// Where number `c` of a single token lies among fragments, see `decode_parts.cuh`.
pub(super) fn fragment_place(c: usize) -> u32 {
    let in_step = c % 16;
    (c / 32 * 32 + in_step % 8 / 2 * 8 + c / 16 % 2 * 4 + in_step / 8 * 2 + in_step % 2) as u32
}

/// The word of a unit that is word `word` of lane `lane`: lanes side by side with 16 bytes each, a rest of 8 bytes likewise.
fn place(lane_words: usize, lane: usize, word: usize) -> usize {
    let plane = word / 4;
    let width = (lane_words - 4 * plane).min(4);
    plane * 128 + lane * width + word % 4
}

/// The codes of a row, 0 past the last column.
fn read_codes(m: &PackedMatrix, row: usize, codes: &mut [u8]) {
    let (words, highs, high_words) = (m.code_words(row), m.code_highs(row), m.code_high_words(row));
    let (low, from_high): (usize, u32) = match m.layout().bits {
        Bits::Two | Bits::Three => (2, 1),
        Bits::Four | Bits::Six => (4, 2),
        Bits::Eight => (8, 0),
    };
    let mask = (1u32 << low) - 1;
    let per_word = 32 / low;
    for (word, codes) in words.iter().zip(codes.chunks_mut(per_word)) {
        for (i, code) in codes.iter_mut().enumerate() {
            *code = (word >> (low * i) & mask) as u8;
        }
    }
    let high = highs.iter().map(|&h| u32::from(h)).chain(high_words.iter().copied());
    for (high, codes) in high.zip(codes.chunks_mut(16)) {
        for (i, code) in codes.iter_mut().enumerate() {
            *code |= ((high >> (from_high * i as u32) & ((1 << from_high) - 1)) << low) as u8;
        }
    }
    codes[m.cols()..].fill(0);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_bit_of_a_lane_is_used_once() {
        let codebooks = [Bits::Two, Bits::Three, Bits::Four].map(Format::Codebook);
        for format in Bits::ALL.map(Format::Affine).into_iter().chain(codebooks) {
            let mut used = vec![0u32; format.lane_words() / 2];
            for p in table(format).iter().flatten() {
                let bits = ((1u32 << p.width) - 1) << p.to;
                assert_eq!(used[p.word] & bits, 0, "{format:?}: {p:?}");
                used[p.word] |= bits;
            }
            assert!(used.iter().all(|w| *w == u32::MAX), "{format:?}: {used:x?}");
        }
    }

    #[test]
    fn places_of_a_unit_are_distinct() {
        for lane_words in [4, 6, 8, 12, 16] {
            let mut all: Vec<usize> =
                (0..32 * lane_words).map(|i| place(lane_words, i / lane_words, i % lane_words)).collect();
            all.sort_unstable();
            assert!(all.into_iter().eq(0..32 * lane_words));
        }
    }

    #[test]
    fn fragments_of_a_chunk_are_distinct() {
        let mut all: Vec<u32> = (0..2 * CHUNK).map(fragment_place).collect();
        all.sort_unstable();
        assert!(all.into_iter().eq(0..2 * CHUNK as u32));
    }
}
