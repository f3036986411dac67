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
    let mut out = Corrections { rounds: Vec::new(), shares: Vec::new(), rows: vec![0; plan.tiles_a_block * TILE_ROWS] };
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;
    use tailorq_tensor::{
        Bits, ElementCorrections, Group, Layout, Rng, TILE, TileBits, TileCorrection, TileCorrections, Weight,
    };

    /// What is added to a row: `(column, value)`.
    type Added = Vec<(usize, f32)>;

    /// A matrix of nothing but corrections, and those of each row.
    fn corrected(rng: &mut Rng, (rows, cols): (usize, usize), share: impl Fn(usize) -> f64) -> (Weight, Vec<Added>) {
        let layout = Layout { symmetric: true, ..Layout::new(Bits::Two, Group::Row) };
        let (mut tiles, mut elements, mut added) = (Vec::new(), Vec::new(), vec![Added::new(); rows]);
        for (row, added) in added.iter_mut().enumerate() {
            let some = |rng: &mut Rng, n: usize| (0..n).filter(|_| rng.uniform() < share(row)).collect::<Vec<_>>();
            let tile = |tile: usize, rng: &mut Rng| TileCorrection {
                tile,
                scale: f16::from_f32(0.5 + rng.uniform() as f32),
                codes: std::array::from_fn(|c| if tile * TILE + c < cols { 1 + rng.below(127) as i8 } else { 0 }),
            };
            let of_row: Vec<_> = some(rng, cols.div_ceil(TILE)).into_iter().map(|t| tile(t, rng)).collect();
            for t in &of_row {
                let one = |c: usize| (t.tile * TILE + c, t.scale.to_f32() * f32::from(t.codes[c]));
                added.extend((0..TILE).map(one).filter(|a| a.1 != 0.0));
            }
            tiles.push(of_row);
            let of_row: Vec<_> =
                some(rng, cols).into_iter().map(|c| (c, f16::from_f32(1.0 + rng.uniform() as f32))).collect();
            added.extend(of_row.iter().map(|&(c, v)| (c, v.to_f32())));
            elements.push(of_row);
        }
        let base = PackedMatrix::pack(rows, cols, layout, &vec![0; rows * cols], &vec![f16::ONE; rows], &[]).unwrap();
        let base = base.with_tiles(TileCorrections::from_rows(cols, TileBits::Eight, &tiles).unwrap()).unwrap();
        (base.with_elements(ElementCorrections::from_rows(cols, &elements).unwrap()).unwrap().into(), added)
    }

    /// What a lane adds, read as the kernel does.
    fn entry(round: &[u32], lane: usize, is_tile: bool, column_at: &[usize]) -> Added {
        let body = &round[HEAD + BODY * lane..][..BODY];
        let beside = round.get(HEAD + BODY * LANES + lane).copied().unwrap_or(0);
        let half = |bits: u32| f16::from_bits((bits >> 16) as u16).to_f32();
        let mut all: Added = match is_tile {
            true => (0..TILE)
                .map(|i| {
                    let column = i / 4 * 2 + i / 2 % 2 * 8 + i % 2;
                    let code = body[i / 4].to_le_bytes()[i % 4] as i8;
                    ((beside & 0xffff) as usize * TILE + column, f32::from(code) * half(beside))
                })
                .collect(),
            false => (0..BODY)
                .map(|i| {
                    let place = body[i] & 0xffff | (beside >> (5 * i) & 31) << 16;
                    (column_at[place as usize], half(body[i]))
                })
                .collect(),
        };
        all.retain(|a| a.1 != 0.0);
        all.sort_by_key(|a| a.0);
        all
    }

    /// What is at each place of a block's sums, in the order in which a warp adds it.
    fn read(all: &Corrections, shape: Shape, plan: &Plan, block: usize, column_at: &[usize]) -> HashMap<usize, Added> {
        let mut places = HashMap::<usize, Added>::new();
        for share in &all.shares[block * plan.n_warps..][..plan.n_warps] {
            let mut at = 4 * share[0] as usize;
            let mut had = Vec::new();
            for round in 0..share[1] + share[2] {
                let is_tile = round < share[1];
                let words = shape.round_bytes()[usize::from(!is_tile)] / 4;
                let round = &all.rounds[at..at + words];
                at += words;
                let mut place = round[1] as usize;
                let (mut length, mut longest) = (0, 0);
                for lane in 0..LANES {
                    let begins = round[0] >> lane & 1 == 1;
                    place += usize::from(begins && lane > 0);
                    if begins {
                        assert!(!places.contains_key(&place), "a place that another row or warp has");
                        had.push(place);
                    }
                    assert_eq!(had.last(), Some(&place), "a row goes on where its warp had it");
                    let added = entry(round, lane, is_tile, column_at);
                    length = if begins { 1 } else { length + 1 };
                    longest = longest.max(if added.is_empty() { 0 } else { length });
                    places.entry(place).or_default().extend(added);
                }
                assert_eq!(longest, round[2], "lanes of the longest row");
            }
        }
        places
    }

    #[test]
    fn rounds_hold_all_corrections() {
        let rng = &mut Rng::new(1);
        let shares: [fn(usize) -> f64; 5] = [
            |_| 0.02,
            |row| if row % 3 == 0 { 0.0 } else { 0.05 },
            |row| if row == 17 { 1.0 } else { 0.001 },
            |row| if row == 39 { 0.7 } else { 0.0 },
            |row| if row == 5 { 0.1 } else { 0.0 },
        ];
        for (i, share) in shares.into_iter().enumerate() {
            for (shape, n_processors) in [((40, 896), 132), ((40, 2064), 2), ((150, 4864), 1), ((40, 66_000), 2)] {
                let (weight, added) = corrected(rng, shape, share);
                let tiles = Tiles::stacked(vec![&weight]);
                for n_warps in [16, 8] {
                    let plan = Plan::new(tiles.len(), 3, n_warps, n_processors);
                    let found = Shape::of(&tiles).expect("corrections");
                    assert_eq!(found.is_wide, shape.1 > 1 << 16);
                    let all = Corrections::new(&tiles, found, &plan);
                    check(&all, found, &plan, &added, shape.1, &format!("case {i}, {shape:?}"));
                }
            }
        }
    }

    fn check(all: &Corrections, shape: Shape, plan: &Plan, added: &[Added], cols: usize, name: &str) {
        let mut column_at = vec![usize::MAX; cols.next_multiple_of(CHUNK)];
        (0..column_at.len()).for_each(|c| column_at[fragment_place(c) as usize] = c);
        let n_places: usize = shape.places(plan).iter().sum();
        let of_block = plan.tiles_a_block * TILE_ROWS;
        assert_eq!(all.rows.len(), plan.n_blocks() * of_block);
        for block in 0..plan.n_blocks() {
            let mut places = read(all, shape, plan, block, &column_at);
            assert!(places.keys().all(|&p| p < n_places), "{name}");
            for (row, &word) in all.rows[block * of_block..][..of_block].iter().enumerate() {
                let mut found = Added::new();
                for half in [word & 0xffff, word >> 16].map(|h| h as usize) {
                    let end = half & ((1 << PLACE_BITS) - 1);
                    let n = if end > 0 { (half >> PLACE_BITS) + 1 } else { 0 };
                    (end - n..end).for_each(|p| found.extend(places.remove(&p).expect("a place of one row")));
                }
                let expected = added.get(block * of_block + row).cloned().unwrap_or_default();
                assert_eq!(found, expected, "{name}, block {block}, row {row}");
            }
            assert!(places.is_empty(), "{name}: {places:?}");
        }
    }

    #[test]
    fn rounds_go_where_there_is_little_else() {
        assert_eq!(shares(7, &[1, 1, 1, 1, 0, 0, 0, 0]), [0, 0, 0, 0, 2, 2, 2, 1]);
        assert_eq!(shares(0, &[4, 4, 3]), [0, 0, 0]);
        assert_eq!(shares(10, &[2, 2, 0]), [2, 2, 6]);
        let equal = shares(1000, &[5; 16]);
        assert!(equal.iter().sum::<usize>() == 1000 && equal.iter().all(|&n| n <= 63), "{equal:?}");
    }
}
