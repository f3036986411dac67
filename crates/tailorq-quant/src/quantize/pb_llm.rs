//! PB-LLM (Shang et al. 2024, arXiv 2310.00034): the tenth of the weights that matters most has 8 bits, all others one, with
//! error feedback. Simulated.
//!
//! As the authors' code does it, where that is not what the paper says: a weight matters by `w^2 / U_jj^2` of the original
//! weights, chosen within each group of columns over all rows; the mean and the size of the binary weights count the salient
//! ones as zeros; the 8-bit grid is one a row, over all of its weights. Inputs that were never active keep their weights
//! (the code zeroes them), and parameters are f16.

use super::feedback::{Factor, Feedback, RoundColumn};
use super::grid::{GridRule, Line};
use super::rows::at_group;
use super::simulated::{as_half, check_simulated, factored, rounded_instead, simulate_rows};
use super::stored::stored_at_half;
use super::{LayerStats, Needs, Quantized, Quantizer};
use crate::simd::round_within;
use crate::{Clip, LayerPlan, LayerSettings, QuantError};
use tailorq_kernels::Device;
use tailorq_tensor::{Bits, Group, Layout, Matrix};

/// Share of the weights with 8 bits.
const SALIENT: f64 = 0.1;

/// Partial binarization; of the settings it reads group and damping. The width is its own, and the columns' order natural.
#[derive(Clone, Copy, Debug)]
pub struct PbLlm;

impl Quantizer for PbLlm {
    fn name(&self) -> &'static str {
        "pb-llm"
    }

    fn needs(&self) -> Needs {
        Needs { hessian: true, ..Needs::default() }
    }

    fn stores_half(&self) -> bool {
        true
    }

    /// A bitmap, 8 bits a salient weight and 1 any other, mean and size (16 bits each) for each row and group, and scale
    /// (16) and zero (8) of the 8-bit grid for each row.
    fn counted_bits(&self, (rows, cols): (usize, usize), settings: &LayerSettings) -> Option<u64> {
        let (group_len, n_groups) = (settings.layout.group.len(cols), settings.layout.group.count(cols));
        let widths = (0..cols).step_by(group_len.max(1)).map(|start| group_len.min(cols - start));
        let n_salient: usize = widths.map(|width| n_salient(rows * width)).sum();
        Some((2 * rows * cols + 7 * n_salient + rows * (32 * n_groups + 24)) as u64)
    }

    fn quantize(
        &self,
        device: &dyn Device,
        weights: &Matrix,
        stats: &LayerStats<'_>,
        plan: &LayerPlan,
    ) -> Result<Quantized, QuantError> {
        check_simulated(self.name(), weights, plan)?;
        let (mut notes, settings) = (Vec::new(), LayerSettings { act_order: false, ..plan.settings });
        let (_, factor) = factored(device, self.name(), (weights, stats, &settings), &mut notes)?;
        let Some(factor) = factor else { return rounded_instead(device, (weights, stats, plan), notes) };
        let (rows, cols) = (weights.rows(), weights.cols());
        let group_len = settings.layout.group.len(cols);
        let salient = salient(weights, &factor, group_len);
        let feedback = Feedback::new(device, weights, &factor);
        let job = Job { feedback, weights, salient: &salient, group_len };
        let (values, _) = simulate_rows(weights, |first, n| Ok((job.rows(first, n)?, 0)))?;
        stored_at_half(device, weights, &values, stats, (notes, self.counted_bits((rows, cols), &settings)))
    }
}

/// Of so many weights.
fn n_salient(n: usize) -> usize {
    (SALIENT * n as f64).floor() as usize
}

/// `[out, in]`: the tenth of every group of columns with the largest `w^2 / U_jj^2`, ties to the first.
fn salient(weights: &Matrix, factor: &Factor, group_len: usize) -> Vec<bool> {
    let (rows, cols) = (weights.rows(), weights.cols());
    let mut salient = vec![false; rows * cols];
    for start in (0..cols).step_by(group_len) {
        let width = group_len.min(cols - start);
        let place = |k: usize| (k / width, start + k % width);
        let scores: Vec<f32> = (0..rows * width)
            .map(|k| {
                let (r, c) = place(k);
                (weights.row(r)[c] * factor.inverse_diagonal[c]).abs()
            })
            .collect();
        let count = n_salient(scores.len());
        if count == 0 {
            continue;
        }
        let mut order: Vec<usize> = (0..scores.len()).collect();
        order.select_nth_unstable_by(count - 1, |&a, &b| scores[b].total_cmp(&scores[a]).then(a.cmp(&b)));
        for &k in &order[..count] {
            let (r, c) = place(k);
            salient[r * cols + c] = true;
        }
    }
    salient
}

struct Job<'a> {
    feedback: Feedback<'a>,
    weights: &'a Matrix,
    salient: &'a [bool],
    group_len: usize,
}

impl Job<'_> {
    fn rows(&self, first: usize, n: usize) -> Result<Vec<f32>, QuantError> {
        let cols = self.weights.cols();
        let rule = GridRule::new(Layout::new(Bits::Eight, Group::Row), Clip::None);
        let mut lines = Vec::with_capacity(n);
        for r in first..first + n {
            lines.push(Line::new(rule.fit(self.weights.row(r), None).map_err(at_group(r, 0))?, Bits::Eight));
        }
        let signs: Vec<Vec<(f32, f32)>> = (first..first + n).map(|r| self.signs(r)).collect();
        let mut values = vec![0.0; n * cols];
        let mut rows = self.feedback.start(first, n)?;
        for block in self.feedback.blocks() {
            self.feedback.begin_block(&mut rows, &block);
            for r in 0..n {
                let mut row = rows.row(r, &block);
                let salient = &self.salient[(first + r) * cols..][block.clone()];
                let (group_len, start) = (self.group_len, block.start);
                let mut round = Mixed { salient, line: lines[r], signs: &signs[r], group_len, start };
                self.feedback.columns(&rows, (&mut row, &mut round), 0..block.len(), &block);
                rows.finish_row(r, &row);
                self.feedback.write_values(&row, &block, &mut values[r * cols..(r + 1) * cols]);
            }
            self.feedback.end_block(&mut rows, &block);
        }
        Ok(values)
    }

    /// Mean and size of the binary weights of row `r`, group by group, from the original weights.
    fn signs(&self, r: usize) -> Vec<(f32, f32)> {
        let cols = self.weights.cols();
        let salient = &self.salient[r * cols..(r + 1) * cols];
        let groups = self.weights.row(r).chunks(self.group_len).zip(salient.chunks(self.group_len));
        let sign = |(weights, salient): (&[f32], &[bool])| {
            let rest = || weights.iter().zip(salient).map(|(w, s)| if *s { 0.0 } else { f64::from(*w) });
            let mean = rest().sum::<f64>() / weights.len() as f64;
            let size = rest().map(|w| (w - mean).abs()).sum::<f64>() / weights.len() as f64;
            (as_half(mean as f32), as_half(size as f32))
        };
        groups.map(sign).collect()
    }
}

/// One row's part of a block: 8 bits or one.
struct Mixed<'a> {
    salient: &'a [bool],
    line: Line,
    signs: &'a [(f32, f32)],
    group_len: usize,
    start: usize,
}

impl RoundColumn for Mixed<'_> {
    #[inline(always)]
    fn round(&mut self, j: usize, weight: f32) -> f32 {
        if self.salient[j] {
            return round_within(weight * self.line.inverse, self.line.low, self.line.high) * self.line.scale;
        }
        let (mean, size) = self.signs[(self.start + j) / self.group_len];
        if weight < mean { mean - size } else { mean + size }
    }
}
