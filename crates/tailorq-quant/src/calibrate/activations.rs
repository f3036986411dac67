//! The residual stream of all calibration sequences between two blocks.

use crate::QuantError;
use std::ops::Range;
use tailorq_kernels::Device;
use tailorq_model::{Batch, Model};
use tailorq_tensor::Matrix;

/// Sequences are laid together until a micro-batch holds about so many tokens; a longer one stands alone.
pub const MICRO_BATCH_TOKENS: usize = 2048;

/// Some whole sequences laid end to end.
#[derive(Clone, Debug)]
pub struct MicroBatch {
    /// `[tokens, hidden]`.
    pub residual: Matrix,
    /// That of the original model, for those who ask how far the quantized one has drifted from it.
    pub original: Option<Matrix>,
    /// Rows of each sequence.
    pub spans: Vec<Range<usize>>,
    /// Which device of the group ([`Device::peers`]) it is on.
    pub place: usize,
}

/// The residual stream of the calibration data. It is cut into micro-batches by the sequences' lengths alone, so the
/// same samples always give the same batches and, block for block, the same bits.
#[derive(Clone, Debug)]
pub struct Activations {
    /// The micro-batches, in the order of the samples.
    pub batches: Vec<MicroBatch>,
}

impl Activations {
    /// Embeds tokenized samples, on the device and its peers in turn. Empty samples are passed over; it is an error when nothing is
    /// left.
    pub fn embed(device: &dyn Device, model: &Model, samples: &[Vec<u32>]) -> Result<Self, QuantError> {
        let group = device.group();
        let embedded = |(i, batch): (usize, Batch)| {
            let place = i % group.len();
            MicroBatch { residual: model.embed(group[place], &batch.ids), original: None, spans: batch.spans, place }
        };
        let batches: Vec<MicroBatch> = micro_batches(samples).into_iter().enumerate().map(embedded).collect();
        if batches.is_empty() { Err(QuantError::NoCalibration) } else { Ok(Activations { batches }) }
    }

    /// [`Activations::embed`] with the stream of `original`, the model before quantization, beside it.
    pub fn embed_beside(
        device: &dyn Device,
        model: &Model,
        original: &Model,
        samples: &[Vec<u32>],
    ) -> Result<Self, QuantError> {
        let mut activations = Activations::embed(device, model, samples)?;
        let beside = Activations::embed(device, original, samples)?;
        for (batch, other) in activations.batches.iter_mut().zip(beside.batches) {
            batch.original = Some(other.residual);
        }
        Ok(activations)
    }

    /// Tokens of all sequences.
    pub fn n_tokens(&self) -> usize {
        self.batches.iter().map(|b| b.residual.rows()).sum()
    }

    /// Bytes of the residual streams.
    pub fn bytes(&self) -> usize {
        let beside = |b: &MicroBatch| b.original.as_ref().map_or(0, Matrix::bytes);
        self.batches.iter().map(|b| b.residual.bytes() + beside(b)).sum()
    }
}

/// Lays sequences together in order, up to [`MICRO_BATCH_TOKENS`].
pub(crate) fn micro_batches(samples: &[Vec<u32>]) -> Vec<Batch> {
    let mut batches = Vec::new();
    let mut open: Vec<&[u32]> = Vec::new();
    let mut n_tokens = 0;
    for sample in samples.iter().filter(|s| !s.is_empty()) {
        if !open.is_empty() && n_tokens + sample.len() > MICRO_BATCH_TOKENS {
            batches.push(Batch::new(open.drain(..)));
            n_tokens = 0;
        }
        open.push(sample);
        n_tokens += sample.len();
    }
    if !open.is_empty() {
        batches.push(Batch::new(open));
    }
    batches
}

/// Ranges of samples of these lengths, in order, of about as many tokens each: one for each of `n` devices, fewer where there are
/// fewer samples.
pub(crate) fn shares(lengths: &[usize], n: usize) -> Vec<Range<usize>> {
    let n = n.clamp(1, lengths.len().max(1));
    let mut left: usize = lengths.iter().sum();
    let (mut shares, mut start) = (Vec::new(), 0);
    for i in 0..n {
        // An even share of what is left; each of those that follow gets a sample, too.
        let (most, last) = (left / (n - i), lengths.len() - (n - 1 - i));
        let (mut end, mut taken) = (start, 0);
        while end < last && (end == start || i + 1 == n || taken + lengths[end] / 2 < most) {
            taken += lengths[end];
            end += 1;
        }
        left -= taken;
        shares.push(start..end);
        start = end;
    }
    shares
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_in_order_and_about_alike() {
        assert_eq!(shares(&[7; 6], 3), [0..2, 2..4, 4..6]);
        assert_eq!(shares(&[1, 1, 1, 1, 100], 2), [0..4, 4..5]);
        assert_eq!(shares(&[100, 1, 1, 1, 1], 3), [0..1, 1..3, 3..5]);
        assert_eq!(shares(&[5, 5], 4), [0..1, 1..2]);
        assert!(shares(&[], 3).iter().all(Range::is_empty));
        let mut rng = tailorq_tensor::Rng::new(2);
        for n_samples in 1..40 {
            let lengths: Vec<usize> = (0..n_samples).map(|_| 1 + rng.below(300)).collect();
            for n in 1..6 {
                let found = shares(&lengths, n);
                assert_eq!(found.len(), n.min(n_samples));
                assert_eq!((found[0].start, found[found.len() - 1].end), (0, n_samples));
                assert!(found.windows(2).all(|p| p[0].end == p[1].start) && found.iter().all(|r| !r.is_empty()));
                let sizes = found.iter().map(|r| lengths[r.clone()].iter().sum::<usize>());
                let (total, longest) = (lengths.iter().sum::<usize>(), lengths.iter().max().unwrap());
                assert!(sizes.max().unwrap() <= total / found.len() + 2 * longest);
            }
        }
    }

    #[test]
    fn whole_sequences_up_to_the_limit() {
        let lengths = [1000, 1000, 100, 0, 5000, 48, 2000, 1];
        let samples: Vec<Vec<u32>> = lengths.iter().map(|&n| vec![n as u32; n]).collect();
        let batches = micro_batches(&samples);
        let sizes: Vec<usize> = batches.iter().map(|b| b.ids.len()).collect();
        assert_eq!(sizes, [2000, 100, 5000, 2048, 1]);
        assert_eq!(batches[0].spans, [0..1000, 1000..2000]);
        assert_eq!(batches[3].spans, [0..48, 48..2048]);
        assert!(micro_batches(&[vec![]]).is_empty());
    }
}
