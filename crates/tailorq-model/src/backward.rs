//! The backward pass of a decoder, block by block.
//!
//! Nothing of a block is kept from the forward pass but its input: [`BlockStage::backward`] computes the block again,
//! shows every linear's input and output gradient to a visitor, and turns the gradient of the block's output into that of
//! its input. Biases and norms get no gradients of their own; nobody quantizes them.

use crate::forward::{BlockStage, positions};
use crate::model::Model;
use std::ops::Range;
use tailorq_kernels::{Device, LogSumExp};
use tailorq_tensor::{InputGroup, Matrix, Slot};

/// Words of the vocabulary whose logits are held at once: with 2048 target tokens, 16 MiB.
const WORDS: usize = 2048;

/// What the linears that share an input saw: the input and, for each of them, the gradient of its output.
#[derive(Clone, Copy)]
pub struct Tap<'a> {
    /// Which input.
    pub group: InputGroup,
    /// `[tokens, in]`.
    pub input: &'a Matrix,
    /// `[tokens, out]` of each linear, in the order of [`InputGroup::slots`].
    pub gradients: &'a [(Slot, &'a Matrix)],
}

/// A row of the batch that shall predict a token.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Target {
    /// Row of the residual stream whose logits are judged.
    pub row: usize,
    /// The token that follows.
    pub token: u32,
    /// Factor of this row's loss in the sum that is differentiated.
    pub weight: f32,
}

/// Losses of target rows and the gradient of their weighted sum.
#[derive(Clone, Debug)]
pub struct LossGradient {
    /// The loss of each target, unweighted, in nats.
    pub losses: Vec<f64>,
    /// With respect to the residual stream after the last block: `[tokens, hidden]`.
    pub gradient: Matrix,
}

/// The targets of a sequence of tokens that lies from row `first` on: every token but the first, or of those the ones that
/// `scored` (one flag a token) names, each with weight `1 / number of targets`, so that their sum is a mean.
pub fn next_token_targets(ids: &[u32], scored: Option<&[bool]>, first: usize) -> Vec<Target> {
    let chosen = |t: &usize| scored.is_none_or(|s| s.get(*t).copied().unwrap_or(false));
    let places: Vec<usize> = (1..ids.len()).filter(chosen).collect();
    let weight = 1.0 / places.len().max(1) as f32;
    places.into_iter().map(|t| Target { row: first + t - 1, token: ids[t], weight }).collect()
}

impl BlockStage<'_> {
    /// Replaces `gradient`, that of the block's output, by that of its `input` (both `[tokens, hidden]`), and shows
    /// `visit` every linear on the way, the last one first. Positions start at 0 in every span.
    pub fn backward(
        &self,
        input: &Matrix,
        spans: &[Range<usize>],
        gradient: &mut Matrix,
        visit: &mut dyn FnMut(Tap<'_>),
    ) {
        let attention_input = self.attention_input(input);
        let positions = positions(input.rows(), spans, |_| 0);
        let (heads, plain) = self.heads(&attention_input, &positions);
        let mixed = self.mix(&heads, spans);
        let mut middle = input.clone();
        self.add_attention(&mixed, &mut middle);
        self.mlp_backward(&middle, gradient, visit);
        drop(middle);
        visit(Tap { group: InputGroup::AttentionOutput, input: &mixed, gradients: &[(Slot::O, gradient)] });
        let d_mixed = self.pull_back(&[(Slot::O, gradient)], mixed.cols());
        drop(mixed);
        let [dq, dk, dv] = self.heads_backward(&heads, plain, &d_mixed, spans);
        let gradients = [(Slot::Q, &dq), (Slot::K, &dk), (Slot::V, &dv)];
        visit(Tap { group: InputGroup::Attention, input: &attention_input, gradients: &gradients });
        let d_input = self.pull_back(&gradients, input.cols());
        let norm = &self.block.attention_norm;
        self.device.rms_norm_backward_matrix(input, norm, self.model.config.rms_eps, &d_input, gradient);
    }

    /// From the gradient of the block's output to that of the stream before the feed-forward.
    fn mlp_backward(&self, residual: &Matrix, gradient: &mut Matrix, visit: &mut dyn FnMut(Tap<'_>)) {
        let input = self.mlp_input(residual);
        let (mut gate, mut up) = (self.apply(Slot::Gate, &input), self.apply(Slot::Up, &input));
        let mut hidden = gate.clone();
        self.device.swiglu_matrix(&mut hidden, &up);
        visit(Tap { group: InputGroup::MlpOutput, input: &hidden, gradients: &[(Slot::Down, gradient)] });
        let width = hidden.cols();
        drop(hidden);
        let d_hidden = self.pull_back(&[(Slot::Down, gradient)], width);
        self.device.swiglu_backward_matrix(&d_hidden, &mut gate, &mut up);
        drop(d_hidden);
        let gradients = [(Slot::Gate, &gate), (Slot::Up, &up)];
        visit(Tap { group: InputGroup::Mlp, input: &input, gradients: &gradients });
        let d_input = self.pull_back(&gradients, input.cols());
        let norm = &self.block.mlp_norm;
        self.device.rms_norm_backward_matrix(residual, norm, self.model.config.rms_eps, &d_input, gradient);
    }

    /// The gradient of the input that these linears share.
    fn pull_back(&self, gradients: &[(Slot, &Matrix)], width: usize) -> Matrix {
        let n_rows = gradients.first().map_or(0, |(_, dy)| dy.rows());
        let mut dx = Matrix::zeros(n_rows, width);
        for (slot, dy) in gradients {
            let weight = &self.block.linear(*slot).weight;
            self.device.linear_backward_matrix(dy, weight, 0..weight.rows(), &mut dx);
        }
        dx
    }

    /// Gradients of the outputs of q, k and v. `plain` are queries and keys before their norms, where there are any.
    fn heads_backward(
        &self,
        heads: &[Matrix; 3],
        plain: Option<[Matrix; 2]>,
        d_mixed: &Matrix,
        spans: &[Range<usize>],
    ) -> [Matrix; 3] {
        let [q, k, v] = heads;
        let mut gradients = self.device.attention_backward_matrix(self.attention_shape(), [q, k, v], spans, d_mixed);
        let [dq, dk, _] = &mut gradients;
        let positions = positions(d_mixed.rows(), spans, |_| 0);
        let table = self.rope_table(&positions);
        for d in [&mut *dq, &mut *dk] {
            self.device.rope_backward_matrix(d, &table, &positions);
        }
        if let (Some((q_norm, k_norm)), Some([plain_q, plain_k])) = (&self.block.qk_norm, plain) {
            for (d, norm, before) in [(dq, q_norm, plain_q), (dk, k_norm, plain_k)] {
                let mut pulled = Matrix::zeros(d.rows(), d.cols());
                let eps = self.model.config.rms_eps;
                self.device.rms_norm_backward_matrix(&before, norm, eps, d, &mut pulled);
                *d = pulled;
            }
        }
        gradients
    }
}

impl Model {
    /// Cross-entropy at the targets and the gradient of its weighted sum with respect to the residual stream
    /// `[tokens, hidden]` after the last block. Logits are seen in chunks of the vocabulary, twice: once for the sums of
    /// exponentials, once for the gradient.
    pub fn cross_entropy_backward(&self, device: &dyn Device, residual: &Matrix, targets: &[Target]) -> LossGradient {
        let chosen = device.rows(residual, &rows_of(targets));
        let hidden = self.final_norm(device, &chosen);
        let (log_sums, at_target) = self.log_sums(device, &hidden, targets);
        let weights: Vec<f32> = targets.iter().map(|t| t.weight).collect();
        let mut d_hidden = Matrix::zeros(hidden.rows(), hidden.cols());
        self.for_each_words(device, &hidden, &mut |words, logits| {
            device.softmax_weighted_matrix(&weights, &log_sums, logits);
            let (at, values): (Vec<_>, Vec<f32>) =
                among(targets, &words).map(|(r, column)| ((r, column), -targets[r].weight)).unzip();
            device.add_at(logits, &at, &values);
            device.linear_backward_matrix(logits, &self.head, words, &mut d_hidden);
        });
        let losses = log_sums.iter().zip(at_target).map(|(sum, logit)| sum - logit).collect();
        self.scatter(device, residual, (targets, &chosen, &d_hidden), losses)
    }

    /// The Kullback-Leibler divergence from a reference model at the targets, whose tokens are not looked at, and the
    /// gradient of its weighted sum. `reference_residual` is the reference's own stream after its last block, row for row
    /// of the same tokens; the vocabularies are the same. The gradient is 0 where both models say the same.
    pub fn divergence_backward(
        &self,
        device: &dyn Device,
        residual: &Matrix,
        (reference, reference_residual): (&Model, &Matrix),
        targets: &[Target],
    ) -> LossGradient {
        assert_eq!(self.head.rows(), reference.head.rows(), "models of the same vocabulary");
        let chosen = device.rows(residual, &rows_of(targets));
        let hidden = self.final_norm(device, &chosen);
        let reference_hidden = reference.final_norm(device, &device.rows(reference_residual, &rows_of(targets)));
        let (log_sums, _) = self.log_sums(device, &hidden, targets);
        let (reference_sums, _) = reference.log_sums(device, &reference_hidden, targets);
        let weights: Vec<f32> = targets.iter().map(|t| t.weight).collect();
        let mut d_hidden = Matrix::zeros(hidden.rows(), hidden.cols());
        let mut losses = vec![0.0; targets.len()];
        self.for_each_words(device, &hidden, &mut |words, logits| {
            let expected = device.linear_matrix(&reference_hidden, &reference.head, None, words.clone());
            let reference = (&expected, reference_sums.as_slice());
            device.divergence_backward_matrix(&weights, reference, (&mut *logits, &log_sums), &mut losses);
            device.linear_backward_matrix(logits, &self.head, words, &mut d_hidden);
        });
        self.scatter(device, residual, (targets, &chosen, &d_hidden), losses)
    }

    /// Log-sums of exponentials over the vocabulary, and the logits at the targets' tokens.
    fn log_sums(&self, device: &dyn Device, hidden: &Matrix, targets: &[Target]) -> (Vec<f64>, Vec<f64>) {
        let mut sums = vec![LogSumExp::default(); targets.len()];
        let mut at_target = vec![f64::NAN; targets.len()];
        self.for_each_words(device, hidden, &mut |words, logits| {
            device.log_sum_exp_matrix(logits, &mut sums);
            let at: Vec<(usize, usize)> = among(targets, &words).collect();
            for (&(r, _), logit) in at.iter().zip(device.pick(logits, &at)) {
                at_target[r] = f64::from(logit);
            }
        });
        (sums.into_iter().map(LogSumExp::value).collect(), at_target)
    }

    /// Logits in chunks of [`WORDS`] that the visitor may overwrite.
    fn for_each_words(&self, device: &dyn Device, hidden: &Matrix, visit: &mut dyn FnMut(Range<usize>, &mut Matrix)) {
        let n_words = self.head.rows();
        let mut room = Vec::new();
        for start in (0..n_words).step_by(WORDS) {
            let words = start..(start + WORDS).min(n_words);
            if device.resident().is_some() {
                visit(words.clone(), &mut device.linear_matrix(hidden, &self.head, None, words));
                continue;
            }
            // One buffer for all chunks, as where logits are only read.
            room.resize(hidden.rows() * words.len(), 0.0);
            device.linear_rows(hidden.data(), &self.head, None, words.clone(), &mut room);
            let mut logits = Matrix::from_vec(hidden.rows(), words.len(), room);
            visit(words, &mut logits);
            room = logits.into_vec();
        }
    }

    /// Through the final norm, and back to the rows of the batch.
    fn scatter(
        &self,
        device: &dyn Device,
        residual: &Matrix,
        (targets, chosen, d_hidden): (&[Target], &Matrix, &Matrix),
        losses: Vec<f64>,
    ) -> LossGradient {
        let mut d_chosen = Matrix::zeros(chosen.rows(), chosen.cols());
        let eps = self.config.rms_eps;
        device.rms_norm_backward_matrix(chosen, &self.norm, eps, d_hidden, &mut d_chosen);
        let mut gradient = Matrix::zeros(residual.rows(), residual.cols());
        device.add_rows(&d_chosen, &rows_of(targets), &mut gradient);
        LossGradient { losses, gradient }
    }
}

/// The rows of the residual stream that predict.
fn rows_of(targets: &[Target]) -> Vec<usize> {
    targets.iter().map(|t| t.row).collect()
}

/// Of the targets whose token is among `words`: their number, and their column among these words.
fn among(targets: &[Target], words: &Range<usize>) -> impl Iterator<Item = (usize, usize)> {
    let numbered = targets.iter().enumerate().filter(|(_, t)| words.contains(&(t.token as usize)));
    numbered.map(|(r, t)| (r, t.token as usize - words.start))
}
