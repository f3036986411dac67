//! The Hessians of a block's inputs while they are summed, and what else is summed with them: a part of the sequences held
//! out, and the drift from the original model.

use super::drift::{Drift, DriftCorrection, DriftSums};
use super::tokens::{TokenWeight, add_hessian};
use crate::quantize::{HeldOut, LayerStats, Note, OfHessian, SharedWork};
use std::ops::Range;
use tailorq_kernels::Device;
use tailorq_tensor::{Matrix, Slot};

/// The Hessians of one input: one for all linears that read it, or one for each when gradients weigh the tokens.
pub(super) struct InputHessians {
    kind: TokenWeight,
    list: Vec<OneHessian>,
    /// Tokens summed so far.
    n_tokens: usize,
    /// Sequences summed so far.
    n_seen: usize,
    /// Sequences of the whole calibration.
    n_sequences: usize,
}

pub(super) struct OneHessian {
    slots: Vec<Slot>,
    /// One a token of the whole calibration.
    energies: Option<Vec<f32>>,
    hessian: Matrix,
    /// Of the Hessian, once it is summed.
    work: SharedWork,
    more: Option<MoreHessians>,
    drift: Option<DriftSums>,
}

/// For methods that choose: see [`crate::Needs`] of quantizers, `held_out`.
struct MoreHessians {
    held_out: Matrix,
    /// Tokens in `held_out`.
    n_held: usize,
    /// Of the sequences that are not held out.
    normalised: Matrix,
}

/// One of so many sequences is held out; of fewer, the last one.
const HELD_OUT: usize = 8;

/// Whether a sequence is held out. One alone is not.
fn is_held_out(sequence_idx: usize, n_sequences: usize) -> bool {
    let every = HELD_OUT.min(n_sequences);
    n_sequences > 1 && sequence_idx % every == every - 1
}

/// The rows of some spans, laid end to end, with the energies of their tokens.
fn rows_of(x: &Matrix, energies: Option<&[f32]>, spans: &[Range<usize>]) -> (Matrix, Option<Vec<f32>>) {
    let n = spans.iter().map(Range::len).sum();
    let rows = spans.iter().flat_map(|s| &x.data()[s.start * x.cols()..s.end * x.cols()]).copied().collect();
    let energies = energies.map(|e| spans.iter().flat_map(|s| &e[s.clone()]).copied().collect());
    (Matrix::from_vec(n, x.cols(), rows), energies)
}

impl OneHessian {
    /// Nothing summed yet, for an input of that width: whose Hessian it is, and the energies of all tokens for kinds that
    /// read them. `wants_more` holds sequences out.
    pub(super) fn new(width: usize, (slots, energies): (Vec<Slot>, Option<Vec<f32>>), wants_more: bool) -> Self {
        let square = || Matrix::zeros(width, width);
        let more = wants_more.then(|| MoreHessians { held_out: square(), n_held: 0, normalised: square() });
        OneHessian { slots, energies, hessian: square(), work: SharedWork::default(), more, drift: None }
    }

    /// Takes in a micro-batch whose first sequence is number `first` of `n_sequences`.
    fn add(
        &mut self,
        device: &dyn Device,
        (x, energies, kind): (&Matrix, Option<&[f32]>, TokenWeight),
        spans: &[Range<usize>],
        (first, n_sequences): (usize, usize),
    ) {
        let Some(more) = &mut self.more else {
            add_hessian(device, (x, energies), (kind, false, spans), &mut self.hessian);
            return;
        };
        let numbered = spans.iter().enumerate();
        let (held, seen): (Vec<_>, Vec<_>) = numbered.partition(|(i, _)| is_held_out(first + i, n_sequences));
        let sum = |spans: Vec<(usize, &Range<usize>)>, into: &mut [(&mut Matrix, TokenWeight)]| {
            let spans: Vec<Range<usize>> = spans.into_iter().map(|(_, s)| s.clone()).collect();
            let (rows, energies) = rows_of(x, energies, &spans);
            let moved: Vec<Range<usize>> = spans
                .iter()
                .scan(0, |end, span| {
                    let start = std::mem::replace(end, *end + span.len());
                    Some(start..*end)
                })
                .collect();
            for (hessian, kind) in into {
                add_hessian(device, (&rows, energies.as_deref()), (*kind, false, &moved), hessian);
            }
            rows.rows()
        };
        let normalised =
            if kind.reads_gradients() { TokenWeight::GradientInverseNorm } else { TokenWeight::InverseNorm };
        sum(seen, &mut [(&mut self.hessian, kind), (&mut more.normalised, normalised)]);
        more.n_held += sum(held, &mut [(&mut more.held_out, kind)]);
    }

    /// Takes in what a peer of `device` has summed of other tokens.
    fn merge(&mut self, device: &dyn Device, other: &OneHessian) {
        device.add_from_peer(&other.hessian, &mut self.hessian);
        if let (Some(more), Some(other)) = (&mut self.more, &other.more) {
            device.add_from_peer(&other.held_out, &mut more.held_out);
            device.add_from_peer(&other.normalised, &mut more.normalised);
            more.n_held += other.n_held;
        }
        if let (Some(drift), Some(other)) = (&mut self.drift, &other.drift) {
            drift.merge(device, other);
        }
    }

    fn stats(&self, n_tokens: usize) -> LayerStats<'_> {
        let more = self.more.as_ref().filter(|m| m.n_held > 0);
        LayerStats {
            hessian: Some(&self.hessian),
            shared: (self.slots.len() > 1).then_some(OfHessian { hessian: &self.hessian, work: &self.work }),
            n_tokens: n_tokens - more.map_or(0, |m| m.n_held),
            held_out: more.map(|m| HeldOut { hessian: &m.held_out, n_tokens: m.n_held }),
            normalised: more.map(|m| &m.normalised),
            ..LayerStats::default()
        }
    }
}

impl InputHessians {
    /// Nothing summed yet, of a calibration of `n_sequences`.
    pub(super) fn new(kind: TokenWeight, list: Vec<OneHessian>, n_sequences: usize) -> Self {
        InputHessians { kind, list, n_tokens: 0, n_seen: 0, n_sequences }
    }

    /// Takes in the tokens that follow those of the last call.
    pub(super) fn add(&mut self, device: &dyn Device, x: &Matrix, spans: &[Range<usize>]) {
        for one in &mut self.list {
            let energies = one.energies.take();
            let of_batch = energies.as_ref().map(|e| &e[self.n_tokens..self.n_tokens + x.rows()]);
            one.add(device, (x, of_batch, self.kind), spans, (self.n_seen, self.n_sequences));
            one.energies = energies;
        }
        self.n_tokens += x.rows();
        self.n_seen += spans.len();
    }

    /// Passes over tokens that another device takes in.
    pub(super) fn pass(&mut self, n_tokens: usize, n_sequences: usize) {
        self.n_tokens += n_tokens;
        self.n_seen += n_sequences;
    }

    /// The sums of a device and its peers, each of which took in some of the same calibration and passed over the rest; in this
    /// order.
    pub(super) fn together(device: &dyn Device, mut all: Vec<InputHessians>) -> InputHessians {
        let mut first = all.remove(0);
        for other in &all {
            first.list.iter_mut().zip(&other.list).for_each(|(one, other)| one.merge(device, other));
        }
        first
    }

    /// Sums the drift of the inputs too, and that of a stream of width `hidden`.
    pub(super) fn follow_drift(&mut self, hidden: Option<usize>) {
        self.list.iter_mut().for_each(|one| one.drift = Some(DriftSums::new(one.hessian.cols(), hidden)));
    }

    /// Takes in the drift of the tokens that the next [`InputHessians::add`] takes in.
    pub(super) fn add_drift(&mut self, device: &dyn Device, drift: &Drift<'_>, spans: &[Range<usize>]) {
        for one in &mut self.list {
            let n = drift.quantized.rows();
            let energies = one.energies.as_ref().map(|e| &e[self.n_tokens..self.n_tokens + n]);
            if let Some(sums) = &mut one.drift {
                sums.add(device, drift, (self.kind, energies, spans));
            }
        }
    }

    /// See [`BlockQuantizer::shrink`]; once, after the last tokens.
    pub(super) fn shrink(&mut self, share: f32) {
        // Not the held-out one: it judges.
        let all = self.list.iter_mut().flat_map(|one| {
            [Some(&mut one.hessian), one.more.as_mut().map(|m| &mut m.normalised)].into_iter().flatten()
        });
        for hessian in all.filter(|_| share > 0.0) {
            for i in 0..hessian.rows() {
                hessian.row_mut(i)[..i].iter_mut().for_each(|h| *h *= 1.0 - share);
            }
        }
    }

    /// Moves the weights of one layer to where they make up for the drift; says so when that cannot be done.
    pub(super) fn correct(
        &self,
        device: &dyn Device,
        slot: Slot,
        correction: (DriftCorrection, f64),
        weights: &mut Matrix,
    ) -> Option<Note> {
        let one = self.list.iter().find(|one| one.slots.contains(&slot))?;
        match one.drift.as_ref()?.targets(device, weights, &one.hessian, correction) {
            Some(targets) => {
                *weights = targets;
                None
            }
            None => Some(Note::DriftIgnored),
        }
    }

    /// What was summed for one linear, when it reads this input.
    pub(super) fn of(&self, slot: Slot) -> Option<LayerStats<'_>> {
        self.list.iter().find(|one| one.slots.contains(&slot)).map(|one| one.stats(self.n_tokens))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tailorq_kernels::cpu;
    use tailorq_tensor::Rng;

    /// First tokens a thousand times as large as others, which a Hessian without them does not see, held out or not.
    #[test]
    fn first_tokens_are_left_out_of_every_hessian() {
        let (device, mut rng) = (cpu(), Rng::new(5));
        let spans: Vec<Range<usize>> = (0..9).map(|i| 6 * i..6 * (i + 1)).collect();
        let normal = |_| rng.normal();
        let mut x = Matrix::from_vec(54, 4, (0..54 * 4).map(normal).collect());
        let mut rest = x.clone();
        for span in &spans {
            x.row_mut(span.start).fill(1000.0);
            rest.row_mut(span.start).fill(0.0);
        }
        let sum = |kind: TokenWeight, x: &Matrix, more: bool| {
            let mut one = OneHessian::new(4, (vec![Slot::Q], None), more);
            one.add(device.as_ref(), (x, None, kind), &spans, (0, spans.len()));
            let held = one.more.as_ref().map(|m| m.held_out.data().to_vec());
            (one.hessian.data().to_vec(), held)
        };
        for more in [false, true] {
            let left_out = sum(TokenWeight::WithoutFirst, &x, more);
            assert_eq!(left_out, sum(TokenWeight::Uniform, &rest, more), "held out: {more}");
            assert_ne!(left_out, sum(TokenWeight::Uniform, &x, more));
        }
    }
}
