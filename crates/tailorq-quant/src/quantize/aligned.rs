//! Memory-aligned mixed precision ("the memory-aligned paper", DOI 10.11996/JG.j.2095-302X.2026010039): a low-bit base in which
//! some tiles, sixteen consecutive inputs of one output, hold something finer. One bit a tile says which.
//!
//! The loop is that of GPTQ (see [`super::Gptq`]), block by block of 128 columns over all rows, because the tiles of a block
//! are ranked over all rows by the weights as earlier blocks have left them. A salient tile's error in the loop is that of
//! what it finally holds, so later columns make up for no more than that.
//!
//! Measured on 21 linears of a 135M model (`docs/results.md`), the loss of the output over that of plain GPTQ at 2 bits: means
//! of four 10.4 (K = 50) and 14.8 (K = 100), their mean-square error 1.8 and 2.2 of the weights' own; true 8 bit 0.235 and
//! 0.042 at 4.7 and 7.1 bits; corrections of 5 % of the tiles with 4 bits 0.633 at 2.48 bits.
//!
//! What the paper leaves open is decided so:
//!
//! - Means of four: the mean is taken, and rounded, when the first of the four columns comes, from the four weights as they
//!   are then; each of the four leaves its own error when its own column comes. Means and 8-bit values have one symmetric scale
//!   a row and group, from the largest salient weight of the group at its first column (8-bit values with
//!   a fifth of the range left for what the errors of earlier columns will add).
//! - The first K salient columns of 128 are the share K / 128 of the tiles of a block.
//! - The base's grid is fitted without the salient tiles, also where they are corrections of it (unless all of a group are):
//!   on layers of a 135M model that took the loss at 5 % of tiles from 0.637 to 0.633 of plain GPTQ's, at 19 % from 0.410
//!   to 0.404.
//! - True 8 bit is stored as corrections of 8 bits over a base of 0, which wastes the base's words there;
//!   [`Quantized::counted_bits`] says what it would take without.
//! - Without grouping, single weights are salient. Those at 8 bits are stored as 16-bit elements; with corrections they keep
//!   their value at 16 bits.

mod columns;
mod settings;

pub use settings::{AlignedSettings, Saliency, Salient, Scope, Unit};

use super::feedback::{BLOCK, Factor, check_hessian};
use super::grid::{Grid, GridRule, Line, ScaleOverflow};
use super::rows::{ROWS_PER_TASK, Rows, assemble, at_group, check_finite, check_mask, fit_without, kept_within};
use super::{LayerStats, Needs, Quantized, Quantizer, Rtn, check_settings, refuse_transform};
use crate::simd::Simd;
use crate::{Clip, ElementMask, LayerPlan, LayerSettings, QuantError};
use columns::{BYTE_MAX, FactorBlock, RUN, Rounding, RowBlock, scale_for};
use half::f16;
use rayon::prelude::*;
use settings::share_of;
use std::ops::Range;
use tailorq_kernels::{Device, Strided, StridedMut};
use tailorq_tensor::{Group, Matrix, MeanTile, PackedMatrix, Rng, TILE, TileBits, TileCorrection, TileCorrections};

/// By how much the range of 8-bit values exceeds the largest of them.
const BYTE_HEADROOM: f32 = 1.25;

/// GPTQ with salient tiles, in the natural order of columns.
#[derive(Clone, Copy, Debug)]
pub struct Aligned {
    /// Saliency counts errors by the squared gradients of the task's loss instead of the factor of the Hessian.
    pub by_task: bool,
}

impl Quantizer for Aligned {
    fn name(&self) -> &'static str {
        if self.by_task { "aligned-task" } else { "aligned" }
    }

    fn needs(&self) -> Needs {
        Needs { hessian: true, square: self.by_task, ..Needs::default() }
    }

    /// With the units that the share comes to.
    fn counted_bits(&self, (rows, cols): (usize, usize), settings: &LayerSettings) -> Option<u64> {
        let aligned = settings.aligned.unwrap_or_default();
        aligned.counted_bits(settings.layout, (rows, cols), (aligned.n_salient(rows, cols), None))
    }

    fn quantize(
        &self,
        device: &dyn Device,
        weights: &Matrix,
        stats: &LayerStats<'_>,
        plan: &LayerPlan,
    ) -> Result<Quantized, QuantError> {
        let settings = &plan.settings;
        check_settings(settings)?;
        refuse_transform(self.name(), settings)?;
        check_mask(weights, plan)?;
        let aligned = settings.aligned.unwrap_or_default();
        aligned.check(settings.layout)?;
        if settings.act_order {
            return Err(QuantError::Settings("tiles are neighbours: aligned has no act-order".into()));
        }
        let hessian = stats.hessian.ok_or(QuantError::HessianMissing { quantizer: self.name() })?;
        let cols = weights.cols();
        assert_eq!((hessian.rows(), hessian.cols()), (cols, cols), "the Hessian belongs to another input");
        check_hessian(hessian)?;
        let square = self.by_task.then(|| stats.square.ok_or(QuantError::SquareMissing { quantizer: self.name() }));
        let square = square.transpose()?;
        let fits = square.is_none_or(|s| (s.rows(), s.cols()) == (weights.rows(), cols));
        assert!(fits, "the squared gradients belong to another layer");
        let mut notes = Vec::new();
        let Some(factor) = Factor::new(device, hessian, settings, &mut notes) else {
            let mut rounded = Rtn.quantize(device, weights, stats, plan)?;
            rounded.notes.splice(0..0, notes);
            return Ok(rounded);
        };
        let job = Job::new(device, (weights, square), plan, aligned, &factor);
        let tasks = job.run()?;
        let (mut quantized, loss) = job.pack(tasks, notes)?;
        quantized.proxy_loss = Some(loss.max(0.0) / stats.n_tokens.max(1) as f64);
        Ok(quantized)
    }
}

/// What all tasks of one layer share.
struct Job<'a> {
    device: &'a dyn Device,
    weights: &'a Matrix,
    /// Squared gradients of the task's loss, where they decide.
    square: Option<&'a Matrix>,
    plan: &'a LayerPlan,
    settings: &'a LayerSettings,
    aligned: AlignedSettings,
    kept: Option<&'a ElementMask>,
    factor: &'a Factor,
    rule: GridRule,
    /// One factor an input for the clip search; empty without one by the Hessian.
    importance: Vec<f32>,
    group_len: usize,
    simd: Simd,
}

/// Some rows on their way.
struct Task {
    first: usize,
    n: usize,
    rows: Rows,
    /// `[n, cols]`: original weights minus the errors spread so far.
    current: Vec<f32>,
    /// `[n, BLOCK]`: see [`RowBlock::errors`].
    errors: Vec<f32>,
    /// By row: grid and byte scale of a group that is the whole row.
    whole_rows: Vec<(Grid, f16)>,
    /// By row, ascending.
    tiles: Vec<Vec<TileCorrection>>,
    /// By row, ascending.
    means: Vec<Vec<MeanTile>>,
    /// `[n, groups]`.
    mean_scales: Vec<f16>,
}

/// The block in work.
struct Block<'a> {
    cols: Range<usize>,
    factor: FactorBlock<'a>,
}

impl Block<'_> {
    fn len(&self) -> usize {
        self.cols.len()
    }

    /// Salient units that a row can have here.
    fn units(&self, unit: Unit) -> usize {
        self.len().div_ceil(unit.weights())
    }
}

impl<'a> Job<'a> {
    fn new(
        device: &'a dyn Device,
        (weights, square): (&'a Matrix, Option<&'a Matrix>),
        plan: &'a LayerPlan,
        aligned: AlignedSettings,
        factor: &'a Factor,
    ) -> Self {
        let settings = &plan.settings;
        Job {
            device,
            weights,
            square,
            plan,
            settings,
            aligned,
            kept: plan.kept.as_deref(),
            factor,
            rule: GridRule::new(settings.layout, settings.clip),
            importance: if settings.clip == Clip::Hessian { factor.importance() } else { Vec::new() },
            group_len: settings.layout.group.len(weights.cols()),
            simd: Simd::detect(),
        }
    }

    fn run(&self) -> Result<Vec<Task>, QuantError> {
        let chosen = match self.aligned.scope {
            Scope::Matrix if self.aligned.share > 0.0 => Some(self.choose_in_matrix()?),
            _ => None,
        };
        let mut tasks = self.tasks()?;
        let mut from = 0;
        self.each_block(|block| {
            let n = self.weights.rows() * block.units(self.aligned.unit);
            let salient = match &chosen {
                Some(all) => all[from..from + n].to_vec(),
                None if self.aligned.share > 0.0 => top(&self.scores(&tasks, block)?, self.aligned.share),
                None => vec![false; n],
            };
            from += n;
            self.block(&mut tasks, block, &salient)
        })?;
        Ok(tasks)
    }

    /// The salient units of all blocks, block after block, ranked over the whole matrix.
    fn choose_in_matrix(&self) -> Result<Vec<bool>, QuantError> {
        let mut tasks = self.tasks()?;
        let mut scores = Vec::new();
        self.each_block(|block| {
            scores.extend(self.scores(&tasks, block)?);
            if self.aligned.saliency == Saliency::Gain {
                self.block(&mut tasks, block, &vec![false; self.weights.rows() * block.units(self.aligned.unit)])?;
            }
            Ok(())
        })?;
        Ok(top(&scores, self.aligned.share))
    }

    /// Visits the blocks of columns with their part of the factor.
    fn each_block(&self, mut visit: impl FnMut(&Block<'_>) -> Result<(), QuantError>) -> Result<(), QuantError> {
        let cols = self.weights.cols();
        let mut upper = vec![0.0; BLOCK * BLOCK];
        for start in (0..cols).step_by(BLOCK) {
            let range = start..(start + BLOCK).min(cols);
            upper.fill(0.0);
            for (j, row) in upper.chunks_exact_mut(BLOCK).take(range.len()).enumerate() {
                row[j + 1..range.len()].copy_from_slice(&self.factor.upper.row(start + j)[start + j + 1..range.end]);
            }
            let inverse_diagonal = &self.factor.inverse_diagonal[range.clone()];
            visit(&Block { cols: range, factor: FactorBlock { upper: &upper, inverse_diagonal } })?;
        }
        Ok(())
    }

    fn tasks(&self) -> Result<Vec<Task>, QuantError> {
        let (n_rows, cols) = (self.weights.rows(), self.weights.cols());
        let groups = self.settings.layout.group.count(cols);
        let one = |t: usize| {
            let (first, n) = (t * ROWS_PER_TASK, ROWS_PER_TASK.min(n_rows - t * ROWS_PER_TASK));
            check_finite(self.weights, first, n)?;
            let mut task = Task {
                first,
                n,
                rows: Rows::new(n, cols, self.settings),
                current: self.weights.data()[first * cols..(first + n) * cols].to_vec(),
                errors: vec![0.0; n * BLOCK],
                whole_rows: Vec::new(),
                tiles: vec![Vec::new(); n],
                means: vec![Vec::new(); n],
                mean_scales: vec![f16::ZERO; n * groups],
            };
            if self.settings.layout.group == Group::Row {
                for r in 0..n {
                    let fitted = self.fit_row(first + r)?;
                    task.rows.set_grid(r, 0, fitted.0);
                    task.mean_scales[r * groups..(r + 1) * groups].fill(fitted.1);
                    task.whole_rows.push(fitted);
                }
            }
            Ok(task)
        };
        first_error((0..n_rows.div_ceil(ROWS_PER_TASK)).into_par_iter().map(one).collect())
    }

    /// Grid and byte scale of a whole row. Which of its tiles will be salient is not known yet.
    fn fit_row(&self, row: usize) -> Result<(Grid, f16), QuantError> {
        let weights = self.weights.row(row);
        let kept = kept_within(self.kept, row, 0..weights.len());
        let importance = (!self.importance.is_empty()).then_some(&self.importance[..]);
        let grid = fit_without(&self.rule, (weights, importance), kept).map_err(at_group(row, 0))?;
        let scale = byte_scale(self.aligned.salient, weights.iter().copied()).map_err(at_group(row, 0))?;
        Ok((grid, scale))
    }

    /// The saliency of every unit of a block, row after row.
    fn scores(&self, tasks: &[Task], block: &Block<'_>) -> Result<Vec<f32>, QuantError> {
        let of_task = |task: &Task| -> Result<Vec<f32>, QuantError> {
            let mut scores = Vec::with_capacity(task.n * block.units(self.aligned.unit));
            for r in 0..task.n {
                if self.aligned.saliency == Saliency::Random {
                    let mut rng = self.draw(task.first + r, block.cols.start);
                    scores.extend((0..block.units(self.aligned.unit)).map(|_| rng.uniform() as f32));
                    continue;
                }
                let weights = self.weight_scores(task, r, block)?;
                let units = weights[..block.len()].chunks(self.aligned.unit.weights());
                scores.extend(units.map(|unit| unit.iter().sum::<f32>()));
            }
            Ok(scores)
        };
        Ok(first_error(tasks.par_iter().map(of_task).collect())?.concat())
    }

    /// Where the draws of one row's part of a block begin: another place in each layer, as its weights are others.
    fn draw(&self, row: usize, first_col: usize) -> Rng {
        let of_layer = self
            .weights
            .row(0)
            .iter()
            .fold(self.aligned.seed, |hash, w| Rng::new(hash ^ u64::from(w.to_bits())).next_u64());
        Rng::new(Rng::new(of_layer ^ ((row as u64) << 32 | first_col as u64)).next_u64())
    }

    /// The saliency of every weight of one row's part of a block.
    fn weight_scores(&self, task: &Task, r: usize, block: &Block<'_>) -> Result<[f32; BLOCK], QuantError> {
        let mut state = self.state(task, r, block);
        let mut scores = [0.0; BLOCK];
        let cost: Vec<f32> = match self.square {
            Some(square) => square.row(task.first + r)[block.cols.clone()].to_vec(),
            None => block.factor.inverse_diagonal.iter().map(|d| d * d).collect(),
        };
        if self.aligned.saliency == Saliency::Hessian {
            for (j, cost) in cost.iter().enumerate() {
                scores[j] = state.weights[j] * state.weights[j] * cost;
            }
            return Ok(scores);
        }
        let salient = [false; BLOCK];
        for group in self.groups(block) {
            let fitted = self.fit(task, r, block, &state, (group.clone(), &salient))?;
            let line = Line::new(fitted.0, self.settings.layout.bits);
            // Nothing is salient yet, so the scale of bytes is that of all weights.
            let bytes = byte_scale(self.aligned.salient, state.weights[group.clone()].iter().copied());
            let bytes = bytes.map_err(at_group(task.first + r, (block.cols.start + group.start) / self.group_len))?;
            for tile in tiles(group) {
                state.columns(self.simd, tile.clone(), (Rounding::Base, line), block.factor);
                let gains = state.gains(tile.clone(), self.aligned.salient, self.tile_bits(), bytes.to_f32());
                for j in tile.clone() {
                    scores[j] = gains[j - tile.start] * cost[j];
                }
            }
        }
        Ok(scores)
    }

    fn tile_bits(&self) -> TileBits {
        if self.aligned.salient == Salient::Corrections { self.aligned.tile_bits } else { TileBits::Eight }
    }

    fn state(&self, task: &Task, r: usize, block: &Block<'_>) -> RowBlock {
        let cols = self.weights.cols();
        let mut state = RowBlock::new(&task.current[r * cols..][block.cols.clone()]);
        kept_within(self.kept, task.first + r, block.cols.clone()).for_each(|j| state.kept[j] = true);
        state
    }

    /// The parts of a block that share a grid.
    fn groups(&self, block: &Block<'_>) -> impl Iterator<Item = Range<usize>> + use<> {
        let (len, group_len) = (block.len(), self.group_len.min(BLOCK));
        (0..len).step_by(group_len).map(move |start| start..(start + group_len).min(len))
    }

    /// Grid and byte scale of a group when its first column comes.
    fn fit(
        &self,
        task: &Task,
        r: usize,
        block: &Block<'_>,
        state: &RowBlock,
        (group, salient): (Range<usize>, &[bool; BLOCK]),
    ) -> Result<(Grid, f16), QuantError> {
        if let Some(fitted) = task.whole_rows.get(r) {
            return Ok(*fitted);
        }
        let inputs = block.cols.start + group.start..block.cols.start + group.end;
        let place = at_group(task.first + r, inputs.start / self.group_len);
        let importance = (!self.importance.is_empty()).then(|| &self.importance[inputs]);
        // Corrections start from the base, which must not be left without a grid.
        let uses_base = self.aligned.salient == Salient::Corrections && self.aligned.unit == Unit::Tile;
        let all_use_it = uses_base && group.clone().all(|j| state.kept[j] || salient[j]);
        let is_out = |j: &usize| state.kept[*j] || (salient[*j] && !all_use_it);
        let out: Vec<usize> = group.clone().filter(is_out).map(|j| j - group.start).collect();
        let weights = &state.weights[group.clone()];
        let grid = fit_without(&self.rule, (weights, importance), out.into_iter()).map_err(&place)?;
        let loud = group.clone().filter(|&j| salient[j]).map(|j| state.weights[j]);
        Ok((grid, byte_scale(self.aligned.salient, loud).map_err(&place)?))
    }

    /// Rounds the columns of a block in all rows, `salient` naming units row after row, and spreads the errors.
    fn block(&self, tasks: &mut [Task], block: &Block<'_>, salient: &[bool]) -> Result<(), QuantError> {
        let units = block.units(self.aligned.unit);
        let one = |task: &mut Task| {
            for r in 0..task.n {
                let of_row = &salient[(task.first + r) * units..(task.first + r + 1) * units];
                self.block_of_row(task, r, block, of_row)?;
            }
            self.update_rest(task, block);
            Ok(())
        };
        first_error(tasks.par_iter_mut().map(one).collect()).map(|_: Vec<()>| ())
    }

    fn block_of_row(&self, task: &mut Task, r: usize, block: &Block<'_>, units: &[bool]) -> Result<(), QuantError> {
        let mut state = self.state(task, r, block);
        let salient: [bool; BLOCK] =
            std::array::from_fn(|j| units.get(j / self.aligned.unit.weights()).copied().unwrap_or(false));
        let groups = self.settings.layout.group.count(self.weights.cols());
        for group in self.groups(block) {
            let group_idx = (block.cols.start + group.start) / self.group_len;
            let place = at_group(task.first + r, group_idx);
            let (grid, bytes) = self.fit(task, r, block, &state, (group.clone(), &salient))?;
            task.rows.set_grid(r, group_idx, grid);
            task.mean_scales[r * groups + group_idx] = bytes;
            let line = Line::new(grid, self.settings.layout.bits);
            for tile in tiles(group) {
                let rounding = match (self.aligned.unit, salient[tile.start], self.aligned.salient) {
                    (Unit::Tile, true, Salient::Corrections) => {
                        state.correct_tile(tile.clone(), line, self.aligned.tile_bits).map_err(&place)?
                    }
                    (Unit::Tile, true, Salient::Mean4) => Rounding::Means { scale: bytes.to_f32() },
                    (Unit::Tile, true, Salient::EightBit) => Rounding::Byte { scale: bytes.to_f32() },
                    (Unit::Tile, false, _) => Rounding::Base,
                    (Unit::Weight, _, form) => {
                        let marked = if form == Salient::Corrections { &mut state.kept } else { &mut state.bytes };
                        tile.clone().for_each(|j| marked[j] |= salient[j]);
                        Rounding::Base
                    }
                };
                if !matches!(rounding, Rounding::Corrected { .. }) {
                    state.tile_scales[tile.start / TILE] = bytes;
                }
                state.columns(self.simd, tile, (rounding, line), block.factor);
            }
        }
        task.errors[r * BLOCK..(r + 1) * BLOCK].copy_from_slice(&state.errors);
        self.settle(task, r, block, &state, &salient);
        Ok(())
    }

    /// Notes what the row's part of a block has become, and adds up energies and loss as GPTQ does.
    fn settle(&self, task: &mut Task, r: usize, block: &Block<'_>, state: &RowBlock, salient: &[bool; BLOCK]) {
        let start = block.cols.start;
        task.rows.codes_mut(r)[block.cols.clone()].copy_from_slice(&state.codes[..block.len()]);
        for tile in tiles(0..block.len()).filter(|t| self.aligned.unit == Unit::Tile && salient[t.start]) {
            let (idx, codes) = ((start + tile.start) / TILE, &state.tile_codes[tile.clone()]);
            if self.aligned.salient == Salient::Mean4 {
                let means = std::array::from_fn(|i| codes.get(RUN * i).copied().unwrap_or(0));
                task.means[r].push(MeanTile { tile: idx, means });
            } else {
                let codes = std::array::from_fn(|i| codes.get(i).copied().unwrap_or(0));
                let scale = state.tile_scales[tile.start / TILE];
                task.tiles[r].push(TileCorrection { tile: idx, scale, codes });
            }
        }
        let (mut weight_energy, mut error_energy, mut loss) = (0.0f64, 0.0f64, 0.0f64);
        for (j, &weight) in self.weights.row(task.first + r)[block.cols.clone()].iter().enumerate() {
            if state.kept[j] || state.bytes[j] {
                task.rows.correct(r, start + j, state.element_codes[j]);
            }
            let weight = f64::from(weight);
            let difference = weight - f64::from(state.values[j]);
            weight_energy += weight * weight;
            error_energy += difference * difference;
            if !self.factor.dead[start + j] {
                loss += f64::from(state.errors[j]).powi(2) - self.factor.added * difference * difference;
            }
        }
        task.rows.weight_energy += weight_energy;
        task.rows.error_energy += error_energy;
        task.rows.loss += loss;
    }

    /// Spreads the errors of a block over all columns behind it.
    fn update_rest(&self, task: &mut Task, block: &Block<'_>) {
        let cols = self.weights.cols();
        let rest = cols - block.cols.end;
        if rest == 0 {
            return;
        }
        let upper = &self.factor.upper.data()[block.cols.start * cols + block.cols.end..];
        self.device.matmul_sequential(
            -1.0,
            Strided { data: &task.errors, rows: task.n, cols: block.len(), stride: BLOCK },
            Strided { data: upper, rows: block.len(), cols: rest, stride: cols },
            1.0,
            StridedMut { data: &mut task.current[block.cols.end..], rows: task.n, cols: rest, stride: cols },
        );
    }

    fn pack(&self, tasks: Vec<Task>, notes: Vec<super::Note>) -> Result<(Quantized, f64), QuantError> {
        let (mut rows, mut tiles, mut means, mut scales) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for task in tasks {
            rows.push(task.rows);
            tiles.extend(task.tiles);
            means.extend(task.means);
            scales.extend(task.mean_scales);
        }
        let n_salient = match self.aligned.unit {
            Unit::Tile => tiles.iter().map(Vec::len).sum(),
            Unit::Weight => rows.iter().map(Rows::n_corrections).sum::<usize>() - self.kept.map_or(0, ElementMask::len),
        };
        let finish = |matrix: PackedMatrix| match (self.aligned.unit, self.aligned.salient) {
            _ if self.aligned.share == 0.0 => Ok(matrix),
            (Unit::Weight, _) => Ok(matrix),
            (Unit::Tile, Salient::Mean4) => matrix.pack_mean4(&scales, &means),
            (Unit::Tile, _) => {
                matrix.with_tiles(TileCorrections::from_rows(self.weights.cols(), self.tile_bits(), &tiles)?)
            }
        };
        let (quantized, loss) = assemble(self.weights, self.plan, notes, rows, finish)?;
        let (shape, kept) = ((self.weights.rows(), self.weights.cols()), self.kept.map(ElementMask::len));
        let counted_bits = self.aligned.counted_bits(self.settings.layout, shape, (n_salient, kept));
        Ok((Quantized { counted_bits, ..quantized }, loss))
    }
}

/// The tiles of a range that begins with one.
fn tiles(range: Range<usize>) -> impl Iterator<Item = Range<usize>> {
    range.clone().step_by(TILE).map(move |start| start..(start + TILE).min(range.end))
}

/// The scale of means or 8-bit values for the salient weights of a group. No mean is beyond the largest weight.
fn byte_scale(salient: Salient, weights: impl Iterator<Item = f32>) -> Result<f16, ScaleOverflow> {
    let largest = weights.map(f32::abs).fold(0.0, f32::max);
    let headroom = if salient == Salient::EightBit { BYTE_HEADROOM } else { 1.0 };
    scale_for(largest * headroom, BYTE_MAX)
}

/// Marks the `share` of `scores` that is largest; of equals the first.
fn top(scores: &[f32], share: f64) -> Vec<bool> {
    let n = share_of(share, scores.len());
    let mut order: Vec<usize> = (0..scores.len()).collect();
    let mut marked = vec![false; scores.len()];
    if n > 0 && n < order.len() {
        order.select_nth_unstable_by(n - 1, |&a, &b| scores[b].total_cmp(&scores[a]).then(a.cmp(&b)));
    }
    order[..n].iter().for_each(|&i| marked[i] = true);
    marked
}

/// All results, or the error of the first that failed.
fn first_error<T>(results: Vec<Result<T, QuantError>>) -> Result<Vec<T>, QuantError> {
    results.into_iter().collect()
}
