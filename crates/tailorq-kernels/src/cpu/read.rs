//! Reading and nothing else: what the memory gives when no arithmetic is in the way.

use super::simd::{Isa, LANES, Simd, per_isa};
use rayon::prelude::*;

/// Elements a task: far more than a second-level cache, so that tasks do not meet in it.
const TASK: usize = 1 << 20;

/// Reads all of `data` with every thread of the current pool. The result is of no use but to whoever wants to be sure that
/// the reading took place.
pub(super) fn read_all(isa: Isa, data: &[f32]) -> u32 {
    data.par_chunks(TASK).map(|part| sum(isa, part).to_bits()).reduce(|| 0, |a, b| a ^ b)
}

per_isa! {
    /// The sum in some order.
    fn sum(data: &[f32]) -> f32 = sum_body
}

#[inline(always)]
fn sum_body<S: Simd>(simd: S, data: &[f32]) -> f32 {
    let mut sums = [simd.splat(0.0); 8];
    let (vectors, tail) = data.as_chunks::<LANES>();
    let (eights, rest) = vectors.as_chunks::<8>();
    for eight in eights {
        for (sum, vector) in sums.iter_mut().zip(eight) {
            *sum = simd.add(*sum, simd.load(vector));
        }
    }
    for vector in rest {
        sums[0] = simd.add(sums[0], simd.load(vector));
    }
    let total = sums.into_iter().fold(simd.splat(0.0), |a, b| simd.add(a, b));
    simd.sum(total) + tail.iter().sum::<f32>()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_element_is_read() {
        for n in [0, 1, 15, 16, 17, 127, 128, 300] {
            for isa in Isa::available() {
                assert_eq!(sum(isa, &vec![1.0; n]), n as f32, "{} {n}", isa.name());
                for i in 0..n {
                    let mut one = vec![0.0; n];
                    one[i] = 2.0;
                    assert_eq!(read_all(isa, &one), 2.0f32.to_bits(), "{} {i} of {n}", isa.name());
                }
            }
        }
    }
}
