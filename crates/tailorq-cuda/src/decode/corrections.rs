//! Corrections as the kernels of `decode_gemv.cu` read them.
//!
//! Corrected tiles and elements of a block's rows are dealt out in rounds of 32, a lane each: a tile, or four elements of one row.
//! Rounds lie one after the other, those of a warp together, so that they come to shared memory like the stages of the base
//! (`stream`) and after them. A round is four words for all lanes, four words a lane, and a word a lane beside those:
//!
//! - for all: bit `i`: a row begins at lane `i`, where lane 0 stands for a row that the warp has not had; where the sum of the
//!   first lane's row goes; the most lanes of a row; nothing;
//! - a tile: codes of columns 2q, 2q + 1, 2q + 8 and 2q + 9 in word q; its step of 16 columns, its scale in the upper half;
//! - elements: place of the column among the fragments of one token, the value in the upper half. Where places take more than 16
//!   bits the rest is in the word beside, 5 bits an element, which is left out otherwise.
//!
//! What a warp adds to a row has a place of its own, for tiles and for elements: `warp + row`, counting those that have some.
//! So the order of all sums is that of the matrix.

use super::layout::{CHUNK, TILE_ROWS, Tiles, fragment_place};
use super::stream::Plan;
use half::f16;
use rayon::prelude::*;
use std::ops::Range;
use tailorq_tensor::PackedMatrix;

/// Entries of a round.
const LANES: usize = 32;

/// Words of a round that all lanes read.
const HEAD: usize = 4;

/// Words of a lane's entry.
const BODY: usize = 4;

/// The time of a stage of the base, in rounds: warps with less of the base have more of the corrections.
const STAGE_ROUNDS: usize = 3;

/// Of a row: bits of the place after the last of its sums, above it the number of places less one; nothing where there are none.
/// The lower half is for tiles, the upper one for elements.
const PLACE_BITS: u32 = 12;

/// A tile, or some elements of a row.
#[derive(Clone, Copy)]
struct Entry {
    row: usize,
    body: [u32; BODY],
    beside: u32,
}

/// What is the same for all blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Shape {
    pub(super) has_tiles: bool,
    pub(super) has_elements: bool,
    /// Whether columns take more than 16 bits.
    pub(super) is_wide: bool,
}

impl Shape {
    /// Of what is there.
    pub(super) fn of(tiles: &Tiles<'_>) -> Option<Shape> {
        let all = || tiles.rows().filter_map(|(tile, r)| tiles.packed(tile, r));
        let has_tiles = all().any(|(m, row)| m.tiles().is_some_and(|t| t.row(row).next().is_some()));
        let has_elements = all().any(|(m, row)| m.elements().is_some_and(|e| e.row(row).len() > 0));
        let is_wide = tiles.chunks() * CHUNK > 1 << 16;
        (has_tiles || has_elements).then_some(Shape { has_tiles, has_elements, is_wide })
    }

    /// Places for the sums of tiles and of elements.
    pub(super) fn places(self, plan: &Plan) -> [usize; 2] {
        let all = plan.n_warps + plan.tiles_a_block * TILE_ROWS;
        [self.has_tiles, self.has_elements].map(|has| if has { all } else { 0 })
    }

    /// Bytes of a round of tiles and of one of elements.
    pub(super) fn round_bytes(self) -> [usize; 2] {
        [true, self.is_wide].map(|beside| 4 * round_words(beside))
    }
}

fn round_words(beside: bool) -> usize {
    HEAD + LANES * BODY + if beside { LANES } else { 0 }
}

/// The corrections of a matrix.
pub(super) struct Corrections {
    pub(super) rounds: Vec<u32>,
    /// `[blocks, warps]`: where the warp's rounds begin, in 16 bytes; how many of tiles; how many of elements; nothing.
    pub(super) shares: Vec<[u32; 4]>,
    /// `[blocks, rows]`: where the sums of a row are, see [`PLACE_BITS`].
    pub(super) rows: Vec<u32>,
}

impl Corrections {
    pub(super) fn new(tiles: &Tiles<'_>, shape: Shape, plan: &Plan) -> Corrections {
        let blocks: Vec<_> =
            (0..plan.n_blocks()).into_par_iter().map(|block| of_block(tiles, shape, plan, block)).collect();
        let mut all = Corrections { rounds: Vec::new(), shares: Vec::new(), rows: Vec::new() };
        for block in blocks {
            let first = (all.rounds.len() / 4) as u32;
            all.shares.extend(block.shares.iter().map(|s| [first + s[0], s[1], s[2], s[3]]));
            all.rounds.extend(block.rounds);
            all.rows.extend(block.rows);
        }
        all
    }
}

fn of_block(tiles: &Tiles<'_>, shape: Shape, plan: &Plan, block: usize) -> Corrections {
    let first = block * plan.tiles_a_block;
    let n_tiles = plan.tiles_a_block.min(plan.n_tiles - first);
    let rows = (0..n_tiles * TILE_ROWS).map(|row| (row, tiles.packed(first + row / TILE_ROWS, row % TILE_ROWS)));
    let rows: Vec<_> = rows.filter_map(|(row, of)| of.map(|(m, r)| (row, m, r))).collect();
    let entries = [
        rows.iter().flat_map(|&(row, m, r)| tile_entries(row, m, r)).collect::<Vec<_>>(),
        rows.iter().flat_map(|&(row, m, r)| element_entries(row, m, r)).collect(),
    ];
    let n_rounds = entries.each_ref().map(|e| e.len().div_ceil(LANES));
    let stages: Vec<usize> = (0..plan.n_warps).map(|warp| plan.stages_of(warp, n_tiles)).collect();
    let shares = shares(n_rounds[0] + n_rounds[1], &stages);
    let mut out =
        Corrections { rounds: Vec::new(), shares: Vec::new(), rows: vec![0; plan.tiles_a_block * TILE_ROWS] };
    let first_places = [0, shape.places(plan)[0]];
    let mut writers = [0, 1].map(|kind| Rounds {
        entries: &entries[kind],
        beside: kind == 0 || shape.is_wide,
        first_place: first_places[kind] as u32,
        shift: 16 * kind as u32,
        n_warps: 0,
        n_rows: 0,
        last_row: None,
    });
    let mut done = 0;
    for n in shares {
        let end = done + n;
        let at = (out.rounds.len() / 4) as u32;
        let of_tiles = done.min(n_rounds[0])..end.min(n_rounds[0]);
        let of_elements = done.max(n_rounds[0]) - n_rounds[0]..end.max(n_rounds[0]) - n_rounds[0];
        out.shares.push([at, of_tiles.len() as u32, of_elements.len() as u32, 0]);
        for (writer, rounds) in writers.iter_mut().zip([of_tiles, of_elements]) {
            writer.write(rounds, &mut out);
        }
        done = end;
    }
    out
}

/// So many rounds for warps with so many stages: all have done at about the same time.
fn shares(n_rounds: usize, stages: &[usize]) -> Vec<usize> {
    let room = |end: usize| stages.iter().map(move |s| end.saturating_sub(s * STAGE_ROUNDS));
    let (mut low, mut high) = (0, n_rounds + stages.iter().max().map_or(0, |s| s * STAGE_ROUNDS));
    while low < high {
        let middle = usize::midpoint(low, high);
        if room(middle).sum::<usize>() >= n_rounds { high = middle } else { low = middle + 1 }
    }
    let mut left = n_rounds;
    let take = |room: usize| {
        let n = room.min(left);
        left -= n;
        n
    };
    room(low).map(take).collect()
}

/// Writes the rounds of one kind.
struct Rounds<'a> {
    entries: &'a [Entry],
    beside: bool,
    first_place: u32,
    /// Of the half of a row's word.
    shift: u32,
    /// Warps and rows that have begun.
    n_warps: usize,
    n_rows: usize,
    last_row: Option<usize>,
}

impl Rounds<'_> {
    /// Those of the next warp.
    fn write(&mut self, rounds: Range<usize>, out: &mut Corrections) {
        let mut is_new = true;
        self.n_warps += usize::from(!rounds.is_empty());
        for round in rounds {
            let entries = &self.entries[round * LANES..self.entries.len().min((round + 1) * LANES)];
            let (mut begins, mut place, mut longest, mut length) = (0u32, 0, 0, 0);
            for (lane, entry) in entries.iter().enumerate() {
                let is_next = self.last_row != Some(entry.row);
                if is_next {
                    self.n_rows += 1;
                    self.last_row = Some(entry.row);
                }
                let at = self.first_place + (self.n_warps + self.n_rows - 2) as u32;
                if is_next || is_new {
                    begins |= 1 << lane;
                    let more = if is_next { at + 1 } else { 1 | 1 << PLACE_BITS };
                    out.rows[entry.row] += more << self.shift;
                }
                if lane == 0 {
                    place = at;
                }
                is_new = false;
                length = if is_next { 1 } else { length + 1 };
                longest = longest.max(length);
            }
            out.rounds.extend([begins, place, longest, 0]);
            let padded = || (0..LANES).map(|lane| entries.get(lane));
            out.rounds.extend(padded().flat_map(|e| e.map_or([0; BODY], |e| e.body)));
            if self.beside {
                out.rounds.extend(padded().map(|e| e.map_or(0, |e| e.beside)));
            }
        }
    }
}

/// Codes of 4 bits take 8 here.
fn tile_entries(row: usize, m: &PackedMatrix, r: usize) -> impl Iterator<Item = Entry> + '_ {
    m.tiles().into_iter().flat_map(move |t| t.row(r)).map(move |t| {
        let word = |q: usize| u32::from_le_bytes([q, q + 1, q + 8, q + 9].map(|c| t.codes[c] as u8));
        let beside = t.tile as u32 | u32::from(t.scale.to_bits()) << 16;
        Entry { row, body: [0, 2, 4, 6].map(word), beside }
    })
}

/// Elements that are not there are zeros at a place that is.
fn element_entries(row: usize, m: &PackedMatrix, r: usize) -> Vec<Entry> {
    let all: Vec<(u32, u32)> = (m.elements().into_iter().flat_map(|e| e.row(r)))
        .map(|(col, value)| (fragment_place(col), u32::from(f16::from_f32(value).to_bits())))
        .collect();
    let entry = |four: &[(u32, u32)]| {
        let mut entry = Entry { row, body: [four[0].0 & 0xffff; BODY], beside: 0 };
        for i in 0..BODY {
            let (place, value) = four.get(i).copied().unwrap_or((four[0].0, 0));
            entry.body[i] = (place & 0xffff) | value << 16;
            entry.beside |= (place >> 16) << (5 * i);
        }
        entry
    };
    all.chunks(BODY).map(entry).collect()
}
