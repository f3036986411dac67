//! How a product is shared out, and the order in which its weights lie for it.
//!
//! A block of threads computes some tiles; its warps have the units of all of them in equal shares, one after the other. What a
//! warp reads is one stream of stages: of some units the codes, then the scales, then the zeros, up to a multiple of 16 bytes.
//! The shape alone decides, so that a token's numbers do not depend on those beside it.

use super::layout::{Format, group_steps, zero_words};
use rayon::prelude::*;
use tailorq_tensor::Group;

/// Threads of a block; the kernels are compiled for it.
pub(super) const BLOCK_THREADS: u32 = 384;

const WARPS: usize = BLOCK_THREADS as usize / 32;

/// Warps that add corrections while the others multiply.
const SPARSE_WARPS: usize = 4;

/// Tiles of a block at most: their partial sums lie in shared memory.
const MOST_TILES: usize = 64;

/// Bytes of codes that a stage has, unless a unit has more.
const STAGE_CODES: usize = 1024;

/// 16 bytes, of which copies have a whole number.
const WORDS_A_PIECE: usize = 4;

/// Which units each warp of each block has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Plan {
    pub(super) n_tiles: usize,
    /// Of a tile.
    pub(super) n_units: usize,
    pub(super) tiles_a_block: usize,
    pub(super) units_a_warp: usize,
    /// Those that multiply.
    pub(super) n_warps: usize,
    pub(super) n_sparse: usize,
}

impl Plan {
    /// For so many tiles of so many units: as few tiles a block as let all blocks run at once.
    pub(super) fn new(n_tiles: usize, n_units: usize, has_corrections: bool, n_processors: usize) -> Plan {
        let rounds = n_tiles.div_ceil(n_processors * MOST_TILES).max(1);
        let tiles_a_block = n_tiles.div_ceil(n_processors * rounds).max(1);
        let n_sparse = if has_corrections { SPARSE_WARPS } else { 0 };
        let n_warps = WARPS - n_sparse;
        let units_a_warp = (tiles_a_block * n_units).div_ceil(n_warps).max(1);
        Plan { n_tiles, n_units, tiles_a_block, units_a_warp, n_warps, n_sparse }
    }

    pub(super) fn n_blocks(&self) -> usize {
        self.n_tiles.div_ceil(self.tiles_a_block)
    }

    /// Numbers of the units of a warp among all, tile after tile.
    fn units(&self, block: usize, warp: usize) -> std::ops::Range<usize> {
        let end = ((block + 1) * self.tiles_a_block).min(self.n_tiles) * self.n_units;
        let first = block * self.tiles_a_block * self.n_units + warp * self.units_a_warp;
        first.min(end)..(first + self.units_a_warp).min(end)
    }
}

/// Words of a unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Unit {
    codes: usize,
    scales: usize,
    zeros: usize,
}

impl Unit {
    /// One group a row has its scales beside the stream, and so has a symmetric layout its zero.
    pub(super) fn new(format: Format, group: Group, has_zeros: bool) -> Unit {
        let groups = 8usize.checked_div(group_steps(group)).unwrap_or(0);
        let (scales, zeros) = match format {
            Format::Affine(bits) => (8 * groups, if has_zeros { zero_words(bits) * groups } else { 0 }),
            Format::Codebook(_) => (8 * groups, 0),
            Format::Dense(_) => (0, 0),
        };
        Unit { codes: 32 * format.lane_words(), scales, zeros }
    }

    fn words(&self) -> usize {
        self.codes + self.scales + self.zeros
    }

    pub(super) fn bytes(&self) -> usize {
        4 * self.words()
    }

    /// Units of a stage.
    fn in_stage(&self) -> usize {
        (STAGE_CODES / (4 * self.codes)).max(1)
    }

    fn stage_words(&self, n: usize) -> usize {
        (n * self.words()).next_multiple_of(WORDS_A_PIECE)
    }

    /// Bytes of a whole stage.
    pub(super) fn stage_bytes(&self) -> usize {
        4 * self.stage_words(self.in_stage())
    }

    /// Words of the stages of `n` units.
    fn stream_words(&self, n: usize) -> usize {
        n / self.in_stage() * self.stage_words(self.in_stage()) + self.stage_words(n % self.in_stage())
    }
}

/// Where things lie: bytes from one warp's stream to the next's, and from one block's.
pub(super) fn strides(plan: &Plan, unit: &Unit) -> (usize, usize) {
    let warp = 4 * unit.stream_words(plan.units_a_warp);
    (warp, warp * plan.n_warps)
}

/// The streams of all warps of all blocks, from codes, scales and zeros unit after unit.
pub(super) fn interleave(plan: &Plan, unit: &Unit, codes: &[u32], scales: &[u32], zeros: &[u32]) -> Vec<u32> {
    let (warp_words, block_words) = (strides(plan, unit).0 / 4, strides(plan, unit).1 / 4);
    let mut all = vec![0u32; plan.n_blocks() * block_words];
    let parts = [(codes, unit.codes), (scales, unit.scales), (zeros, unit.zeros)];
    all.par_chunks_mut(warp_words.max(1)).enumerate().for_each(|(i, out)| {
        let units = plan.units(i / plan.n_warps, i % plan.n_warps);
        let mut at = 0;
        for first in units.clone().step_by(unit.in_stage()) {
            let n = unit.in_stage().min(units.end - first);
            let start = at;
            for (from, words) in parts {
                out[at..at + n * words].copy_from_slice(&from[first * words..(first + n) * words]);
                at += n * words;
            }
            at = start + unit.stage_words(n);
        }
    });
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use tailorq_tensor::Bits;

    const SHAPES: [(usize, usize); 9] =
        [(1, 1), (2, 5), (56, 38), (304, 7), (512, 224), (256, 112), (1184, 28), (1376, 32), (9496, 28)];

    #[test]
    fn every_unit_is_read_once_and_has_its_place() {
        for (n_tiles, n_units) in SHAPES {
            for has_corrections in [false, true] {
                let plan = Plan::new(n_tiles, n_units, has_corrections, 132);
                let mut next = 0;
                for block in 0..plan.n_blocks() {
                    let mut slots = Vec::new();
                    let first_tile = block * plan.tiles_a_block;
                    for warp in 0..plan.n_warps {
                        let units = plan.units(block, warp);
                        assert_eq!(units.start, next, "{plan:?}: block {block}, warp {warp}");
                        next = units.end;
                        // Partial sums of a warp and a tile lie at the sum of both numbers.
                        let tiles = units.start / n_units..units.end.div_ceil(n_units);
                        slots.extend(tiles.map(|tile| warp + tile - first_tile).filter(|_| !units.is_empty()));
                    }
                    assert!(slots.windows(2).all(|s| s[0] < s[1]), "{plan:?}: {slots:?}");
                    assert!(slots.iter().all(|&s| s < plan.tiles_a_block + plan.n_warps));
                }
                assert_eq!(next, n_tiles * n_units);
            }
        }
    }

    #[test]
    fn streams_hold_all_words_in_order() {
        for (bits, has_zeros) in [(Bits::Two, true), (Bits::Three, true), (Bits::Four, false), (Bits::Eight, true)] {
            for group in Group::SIZES.map(Group::Inputs) {
                let plan = Plan::new(7, 13, false, 3);
                let unit = Unit::new(Format::Affine(bits), group, has_zeros);
                let n = plan.n_tiles * plan.n_units;
                let numbers = |words: usize, top: u32| (0..(n * words) as u32).map(|i| top | i).collect::<Vec<_>>();
                let (codes, scales, zeros) =
                    (numbers(unit.codes, 1 << 30), numbers(unit.scales, 2 << 30), numbers(unit.zeros, 3 << 30));
                let all = interleave(&plan, &unit, &codes, &scales, &zeros);
                for (part, top) in [(&codes, 1), (&scales, 2), (&zeros, 3)] {
                    let found: Vec<u32> = all.iter().copied().filter(|w| w >> 30 == top).collect();
                    assert_eq!(&found, part, "{bits:?}, {group:?}");
                }
                // The first stage: codes of its units, then scales.
                let scale = all.iter().position(|w| w >> 30 == 2).unwrap();
                assert_eq!(scale, unit.in_stage().min(plan.units_a_warp) * unit.codes);
                assert_eq!(strides(&plan, &unit).0 % 16, 0);
            }
        }
    }
}
