//! GPTQ (Frantar et al. 2022, arXiv 2210.17323): columns are rounded to the group's grid one after another, with error
//! feedback (see `feedback`).
//!
//! Three deviations from the reference code. The clip search weighs the error of column `j` with `1 / U_jj^2`, what it will
//! cost, where the reference weighs all alike ([`Clip::Magnitude`] does as the reference). Inputs that were never active have no say in `H`; their weights are rounded,
//! not zeroed, because the task's own prompts may use them where the calibration sample did not. And these inputs do not
//! enter the mean of the diagonal that the damping is a fraction of.

use super::feedback::{BLOCK, Factor, Feedback, FeedbackRows, RoundColumn, RowBlock, check_hessian_on, original};
use super::grid::{Grid, GridRule, Line};
use super::levels::Levels;
use super::on_device::round_on_device;
use super::rotated::in_rotation;
use super::rows::{Rows, at_group, check_mask, codebook, corrected, fit_without, kept_within, quantize_rows};
use super::{LayerStats, Needs, Quantized, Quantizer, Rtn, check_settings, shared};
use crate::{Clip, ElementMask, LayerPlan, LayerSettings, QuantError};
use half::f16;
use std::ops::Range;
use tailorq_kernels::Device;
use tailorq_tensor::{Group, Matrix};

/// GPTQ with grids fitted as the columns come (natural order) or beforehand (by falling diagonal).
#[derive(Clone, Copy, Debug)]
pub struct Gptq;

impl Quantizer for Gptq {
    fn name(&self) -> &'static str {
        "gptq"
    }

    fn needs(&self) -> Needs {
        Needs { hessian: true, ..Needs::default() }
    }

    fn rotates(&self) -> bool {
        true
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
        check_mask(weights, plan)?;
        let hessian = stats.hessian.ok_or(QuantError::HessianMissing { quantizer: self.name() })?;
        if let Some(transform) = settings.transform {
            let rotated = |w: &Matrix, s: &LayerStats<'_>, p: &LayerPlan| self.quantize(device, w, s, p);
            return in_rotation(device, (weights, stats, plan), (transform, true), rotated);
        }
        let cols = weights.cols();
        assert_eq!((hessian.rows(), hessian.cols()), (cols, cols), "the Hessian belongs to another input");
        check_hessian_on(device, hessian)?;
        let mut notes = Vec::new();
        let Some(factor) = shared::factor(device, (hessian, stats.shared), settings, &mut notes) else {
            let mut rounded = Rtn.quantize(device, weights, stats, plan)?;
            rounded.notes.splice(0..0, notes);
            return Ok(rounded);
        };
        let on_diagonal: Vec<(usize, usize)> = (0..cols).map(|i| (i, i)).collect();
        let levels = codebook(weights, plan, Some(&device.pick(hessian, &on_diagonal)))?;
        let job = Job::new(device, weights, (plan, levels), &factor);
        let fit = (&job.rule, job.importance(0..cols));
        let (mut quantized, loss) = match round_on_device(device, (weights, plan), fit, Some(&factor), notes) {
            Ok(rounded) => rounded?,
            Err(notes) => quantize_rows(weights, plan, (notes, levels), |first, n| job.rows(first, n))?,
        };
        // The sum of differences of rounded numbers may end a hair below zero.
        quantized.proxy_loss = Some(loss.max(0.0) / stats.n_tokens.max(1) as f64);
        Ok(quantized)
    }
}

/// What all tasks of one layer share.
struct Job<'a> {
    feedback: Feedback<'a>,
    weights: &'a Matrix,
    settings: &'a LayerSettings,
    kept: Option<&'a ElementMask>,
    rule: GridRule,
    /// One factor an input, in the original order, for the clip search; empty without one by the Hessian.
    importance: Vec<f32>,
    group_len: usize,
    /// Grids are fitted on the original weights before any column is rounded.
    static_grids: bool,
}

impl<'a> Job<'a> {
    fn new(
        device: &'a dyn Device,
        weights: &'a Matrix,
        (plan, levels): (&'a LayerPlan, Option<Levels>),
        factor: &'a Factor,
    ) -> Self {
        let settings = &plan.settings;
        Job {
            feedback: Feedback::new(device, weights, factor),
            weights,
            settings,
            kept: plan.kept.as_deref(),
            rule: GridRule { levels, ..GridRule::new(settings.layout, settings.clip) },
            importance: if settings.clip == Clip::Hessian { factor.importance() } else { Vec::new() },
            group_len: settings.layout.group.len(weights.cols()),
            // A group that is a whole row starts before anything has changed, so both ways give the same grid.
            static_grids: settings.act_order || settings.layout.group == Group::Row,
        }
    }

    /// The factors of some inputs for the clip search.
    fn importance(&self, inputs: Range<usize>) -> Option<&[f32]> {
        (!self.importance.is_empty()).then(|| &self.importance[inputs])
    }

    /// Quantizes the rows `first..first + n`.
    fn rows(&self, first: usize, n: usize) -> Result<Rows, QuantError> {
        let mut task = Task {
            on_the_way: self.feedback.start(first, n)?,
            rows: Rows::new(n, self.weights.cols(), self.settings),
            kept: self.feedback.kept_steps(self.kept, first, n),
            grids: Vec::new(),
        };
        if self.static_grids {
            self.fit_static(&mut task)?;
        }
        for block in self.feedback.blocks() {
            self.feedback.begin_block(&mut task.on_the_way, &block);
            for r in 0..n {
                self.block_of_row(&mut task, r, &block)?;
            }
            self.feedback.end_block(&mut task.on_the_way, &block);
        }
        Ok(task.rows)
    }

    fn fit_static(&self, task: &mut Task) -> Result<(), QuantError> {
        for r in 0..task.on_the_way.n {
            for (g, group) in self.weights.row(task.on_the_way.first + r).chunks(self.group_len).enumerate() {
                let inputs = g * self.group_len..g * self.group_len + group.len();
                let kept = kept_within(self.kept, task.on_the_way.first + r, inputs.clone());
                let grid = fit_without(&self.rule, (group, self.importance(inputs)), kept)
                    .map_err(at_group(task.on_the_way.first + r, g))?;
                task.rows.set_grid(r, g, grid);
                task.grids.push(grid);
            }
        }
        Ok(())
    }

    /// Rounds the columns of one block in row `r` of the task, and leaves their errors for the rest of the row.
    fn block_of_row(&self, task: &mut Task, r: usize, block: &Range<usize>) -> Result<(), QuantError> {
        let cols = self.weights.cols();
        let mut row = task.on_the_way.row(r, block);
        let mut round = GridRound::new(self.rule.levels.as_ref());
        if let Some(steps) = task.kept.get(r) {
            round.keep(steps, block);
        }
        if self.static_grids {
            let grids = &task.grids[r * self.settings.layout.group.count(cols)..];
            for j in 0..block.len() {
                let column = self.feedback.column(block.start + j);
                round.set_grid(j..j + 1, Line::new(grids[column / self.group_len], self.settings.layout.bits));
            }
            self.feedback.columns(&task.on_the_way, (&mut row, &mut round), 0..block.len(), block);
        } else {
            for start in (0..block.len()).step_by(self.group_len) {
                let group = start..(start + self.group_len).min(block.len());
                let group_idx = (block.start + start) / self.group_len;
                // Grids are fitted on the way only in the natural order, where steps are inputs.
                let inputs = block.start + group.start..block.start + group.end;
                let kept = kept_within(self.kept, task.on_the_way.first + r, inputs.clone());
                let grid: Grid = fit_without(&self.rule, (&row.weights[group.clone()], self.importance(inputs)), kept)
                    .map_err(at_group(task.on_the_way.first + r, group_idx))?;
                task.rows.set_grid(r, group_idx, grid);
                round.set_grid(group.clone(), Line::new(grid, self.settings.layout.bits));
                self.feedback.columns(&task.on_the_way, (&mut row, &mut round), group, block);
            }
        }
        task.on_the_way.finish_row(r, &row);
        self.settle(task, (r, block), &row, &round);
        Ok(())
    }

    /// Writes the codes to their original columns and adds up energies and loss.
    ///
    /// `W - Q = err U` with the errors as rows, hence `E (H + a I) E^T = err err^T`; what the damping `a` and the dead
    /// inputs contributed is taken off again.
    fn settle(&self, task: &mut Task, (r, block): (usize, &Range<usize>), row: &RowBlock, round: &GridRound<'_>) {
        let factor = self.feedback.factor;
        let weights = self.weights.row(task.on_the_way.first + r);
        let (mut weight_energy, mut error_energy, mut loss) = (0.0f64, 0.0f64, 0.0f64);
        let mut corrections = Vec::new();
        let codes = task.rows.codes_mut(r);
        for j in 0..block.len() {
            let column = original(factor.order.as_deref(), block.start + j);
            codes[column] = round.codes[j];
            if round.kept[j] {
                corrections.push((column, round.corrections[j]));
            }
            let weight = f64::from(weights[column]);
            let difference = weight - f64::from(row.values[j]);
            weight_energy += weight * weight;
            error_energy += difference * difference;
            if !factor.dead[block.start + j] {
                let error = f64::from(row.errors[j]);
                loss += error * error - factor.added * difference * difference;
            }
        }
        corrections.into_iter().for_each(|(column, correction)| task.rows.correct(r, column, correction));
        task.rows.weight_energy += weight_energy;
        task.rows.error_energy += error_energy;
        task.rows.loss += loss;
    }
}

/// One task's rows on their way.
struct Task {
    on_the_way: FeedbackRows,
    rows: Rows,
    /// See [`Feedback::kept_steps`].
    kept: Vec<Vec<usize>>,
    /// `[n, groups]` when grids are static.
    grids: Vec<Grid>,
}

/// The grids and codes of one row's part of a block.
struct GridRound<'a> {
    levels: Option<&'a Levels>,
    codes: [u8; BLOCK],
    grids: [Line; BLOCK],
    /// Columns whose value stays at 16 bits, and what is added to their base value.
    kept: [bool; BLOCK],
    corrections: [f16; BLOCK],
}

impl<'a> GridRound<'a> {
    fn new(levels: Option<&'a Levels>) -> Self {
        let no_grid = Line { scale: 0.0, inverse: 0.0, low: 0.0, high: 0.0 };
        let (kept, corrections) = ([false; BLOCK], [f16::ZERO; BLOCK]);
        GridRound { levels, codes: [0; BLOCK], grids: [no_grid; BLOCK], kept, corrections }
    }

    fn set_grid(&mut self, columns: Range<usize>, line: Line) {
        self.grids[columns].fill(line);
    }

    /// Marks those of the row's kept `steps` (ascending) that lie in the block.
    fn keep(&mut self, steps: &[usize], block: &Range<usize>) {
        let from = steps.partition_point(|&s| s < block.start);
        steps[from..].iter().take_while(|&&s| s < block.end).for_each(|&s| self.kept[s - block.start] = true);
    }
}

impl RoundColumn for GridRound<'_> {
    #[inline(always)]
    fn round(&mut self, j: usize, weight: f32) -> f32 {
        let (code, mut value) = self.grids[j].round(self.levels, weight);
        if self.kept[j] {
            // The value as it is now, with the errors of earlier columns taken in, and not the original one: that is
            // what TACQ's authors keep.
            (self.corrections[j], value) = corrected(weight, value);
        }
        self.codes[j] = code;
        value
    }
}
