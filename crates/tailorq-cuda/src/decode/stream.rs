//! How a product is shared out, and the order in which its weights lie for it.
//!
//! Some units of a tile are a stage, which is copied as one: of its units the codes, then the scales, then the zeros. A block of
//! threads computes some tiles, and its warps have their stages in equal shares, one after the other. The shape alone decides, so
//! that a token's numbers do not depend on those beside it.

use super::launch::BLOCK_THREADS;
use super::layout::{Format, group_steps, zero_words};
use rayon::prelude::*;
use tailorq_tensor::Group;

/// Warps of a block that may work: as many as have room for their stages.
pub(super) const WARPS: [usize; 2] = [BLOCK_THREADS as usize / 32, 8];

/// Tiles of a block at most: their partial sums lie in shared memory.
const MOST_TILES: usize = 64;

/// Bytes of codes that a stage has, unless a unit has more.
const STAGE_CODES: usize = 2048;

/// 16 bytes, of which copies have a whole number.
const WORDS_A_PIECE: usize = 4;

/// Which stages each warp of each block has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Plan {
    pub(super) n_tiles: usize,
    pub(super) stages_a_tile: usize,
    pub(super) tiles_a_block: usize,
    pub(super) stages_a_warp: usize,
    pub(super) n_warps: usize,
}

impl Plan {
    /// For so many tiles of so many stages: as few tiles a block as let all blocks run at once. `n_warps` of them work.
    pub(super) fn new(n_tiles: usize, stages_a_tile: usize, n_warps: usize, n_processors: usize) -> Plan {
        let rounds = n_tiles.div_ceil(n_processors * MOST_TILES).max(1);
        let tiles_a_block = n_tiles.div_ceil(n_processors * rounds).max(1);
        let stages_a_warp = (tiles_a_block * stages_a_tile).div_ceil(n_warps).max(1);
        Plan { n_tiles, stages_a_tile, tiles_a_block, stages_a_warp, n_warps }
    }

    pub(super) fn n_blocks(&self) -> usize {
        self.n_tiles.div_ceil(self.tiles_a_block)
    }

    /// Stages of a warp in a block of so many tiles.
    pub(super) fn stages_of(&self, warp: usize, n_tiles: usize) -> usize {
        (n_tiles * self.stages_a_tile).saturating_sub(warp * self.stages_a_warp).min(self.stages_a_warp)
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

    /// Stages of so many units of a tile.
    pub(super) fn stages(&self, n_units: usize) -> usize {
        n_units.div_ceil(self.in_stage())
    }

    fn stage_words(&self) -> usize {
        (self.in_stage() * self.words()).next_multiple_of(WORDS_A_PIECE)
    }

    /// Bytes of a stage.
    pub(super) fn stage_bytes(&self) -> usize {
        4 * self.stage_words()
    }
}

/// The stages of all tiles of `n_units` units, from codes, scales and zeros unit after unit. The last stage of a tile may have
/// fewer units, which lie side by side as in others.
pub(super) fn interleave(n_units: usize, unit: &Unit, codes: &[u32], scales: &[u32], zeros: &[u32]) -> Vec<u32> {
    let (words, stages) = (unit.stage_words(), unit.stages(n_units));
    let n_tiles = codes.len() / (n_units * unit.codes).max(1);
    let mut all = vec![0u32; n_tiles * stages * words];
    let parts = [(codes, unit.codes), (scales, unit.scales), (zeros, unit.zeros)];
    all.par_chunks_mut(words).enumerate().for_each(|(i, out)| {
        let in_tile = i % stages * unit.in_stage();
        let (first, n) = (i / stages * n_units + in_tile, unit.in_stage().min(n_units - in_tile));
        let mut at = 0;
        for (from, words) in parts {
            out[at..at + n * words].copy_from_slice(&from[first * words..(first + n) * words]);
            at += n * words;
        }
    });
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use tailorq_tensor::Bits;

    #[test]
    fn partial_sums_have_places_of_their_own() {
        let shapes = [(1, 1), (2, 5), (56, 38), (304, 7), (512, 56), (256, 112), (1184, 7), (1376, 8), (9496, 28)];
        for (n_tiles, stages) in shapes {
            for n_warps in WARPS {
                let plan = Plan::new(n_tiles, stages, n_warps, 132);
                assert!(plan.n_blocks() * plan.tiles_a_block >= n_tiles && plan.tiles_a_block <= MOST_TILES);
                let all = plan.tiles_a_block * stages;
                assert!(plan.n_warps * plan.stages_a_warp >= all);
                // Those of a warp and a tile lie at the sum of both numbers.
                let mut slots = Vec::new();
                for warp in 0..plan.n_warps {
                    let (first, end) = (warp * plan.stages_a_warp, (warp + 1) * plan.stages_a_warp);
                    let (first, end) = (first.min(all), end.min(all));
                    slots
                        .extend((first / stages..end.div_ceil(stages)).filter(|_| first < end).map(|tile| warp + tile));
                }
                assert!(slots.windows(2).all(|s| s[0] < s[1]), "{plan:?}: {slots:?}");
                assert!(slots.iter().all(|&s| s < plan.tiles_a_block + plan.n_warps));
            }
        }
    }

    #[test]
    fn stages_hold_all_words_in_order() {
        for (bits, has_zeros) in [(Bits::Two, true), (Bits::Three, true), (Bits::Four, false), (Bits::Eight, true)] {
            for group in Group::SIZES.map(Group::Inputs) {
                let (n_tiles, n_units) = (3, 13);
                let unit = Unit::new(Format::Affine(bits), group, has_zeros);
                let n = n_tiles * n_units;
                let numbers = |words: usize, top: u32| (0..(n * words) as u32).map(|i| top | i).collect::<Vec<_>>();
                let (codes, scales, zeros) =
                    (numbers(unit.codes, 1 << 30), numbers(unit.scales, 2 << 30), numbers(unit.zeros, 3 << 30));
                let all = interleave(n_units, &unit, &codes, &scales, &zeros);
                for (part, top) in [(&codes, 1), (&scales, 2), (&zeros, 3)] {
                    let found: Vec<u32> = all.iter().copied().filter(|w| w >> 30 == top).collect();
                    assert_eq!(&found, part, "{bits:?}, {group:?}");
                }
                // The first stage: codes of its units, then scales. A tile begins with a stage of its own.
                let scale = all.iter().position(|w| w >> 30 == 2).unwrap();
                assert_eq!(scale, unit.in_stage() * unit.codes);
                assert_eq!(all[unit.stages(n_units) * unit.stage_words()], codes[n_units * unit.codes]);
                assert_eq!(unit.stage_bytes() % 16, 0);
            }
        }
    }
}
