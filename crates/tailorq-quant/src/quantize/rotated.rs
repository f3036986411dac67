//! Quantizing in the rotated domain of an input transform `T`: `W = B T + C`, with the base `B` on a grid and the kept
//! elements `C` at 16 bits in the original domain.
//!
//! With `x' = T x` the layer is `W x = (W T^T) x'`, so the base is any method's result for the weights `W' = W T^T` and the
//! Hessian `H' = T H T^T`: grids, clip search and error feedback see nothing else. `T` is orthonormal, so the squared error of
//! weights and outputs is the same in both domains; what is reported is measured in the original one, on what is stored.
//!
//! Kept elements are chosen before, and taken out of the weights before they are rotated, since a rotation would spread these
//! outliers over their row. What is stored for them is not their value but what is left to it by the base: a rotated base
//! gives every element some value, those places too. And where there is a Hessian, not the difference to the original weight but
//! the correction that makes the error of the whole row's output least, given the base: they can make up for errors of
//! other weights, as the kept weights of plain GPTQ do, which take in the errors of earlier columns.

use super::feedback::check_hessian_on;
use super::kept::least_error;
use super::rows::{check_finite, check_mask};
use super::stored::relative_error;
use super::{LayerStats, Note, OfHessian, Quantized, QuantizedWeight, SharedWork, proxy_loss, shared};
use crate::{LayerPlan, LayerSettings, QuantError, TransformSettings};
use half::f16;
use rayon::prelude::*;
use tailorq_kernels::Device;
use tailorq_tensor::{ElementCorrections, InputTransform, Matrix, PackedMatrix};

/// Rows and columns of a tile in which a matrix is mirrored.
const TILE: usize = 32;

/// Quantizes as `quantize` does, which gets rotated weights, statistics with the rotated Hessian (none unless
/// `reads_hessian`) and a plan without transform and kept elements.
pub(super) fn in_rotation(
    device: &dyn Device,
    (weights, stats, plan): (&Matrix, &LayerStats<'_>, &LayerPlan),
    (settings, reads_hessian): (TransformSettings, bool),
    quantize: impl FnOnce(&Matrix, &LayerStats<'_>, &LayerPlan) -> Result<Quantized, QuantError>,
) -> Result<Quantized, QuantError> {
    let cols = weights.cols();
    check_mask(weights, plan)?;
    if !device.is_finite(weights) {
        check_finite(weights, 0, weights.rows())?;
    }
    let transform = InputTransform::new(cols, settings.spec(cols))?;
    let rotation = match stats.hessian.filter(|_| reads_hessian) {
        Some(hessian) => Some(shared::rotation(device, (hessian, stats.shared), &transform)?),
        None => None,
    };
    let rotated_stats = LayerStats {
        hessian: rotation.as_ref().map(|r| &r.rotated),
        shared: rotation.as_ref().map(|r| OfHessian { hessian: &r.rotated, work: &r.work }),
        n_tokens: stats.n_tokens,
        slot: stats.slot,
        ..LayerStats::default()
    };
    let rotated_plan = LayerPlan::from(LayerSettings { transform: None, ..plan.settings });
    let rotated = rotated_rest(device, &transform, weights, plan);
    let mut quantized = quantize(&rotated, &rotated_stats, &rotated_plan)?;
    drop(rotated);
    let QuantizedWeight::Packed(base) = quantized.weight else {
        return Err(QuantError::Settings(
            "an input transform needs a method with a packed base: use rtn or gptq".into(),
        ));
    };
    let matrix = with_kept(base.with_transform(transform)?, weights, plan, rotation.as_ref().map(|r| &r.complete))?;
    quantized.relative_error = relative_error(weights, &matrix);
    quantized.proxy_loss = stats.hessian.map(|h| proxy_loss(device, weights, &matrix, h, stats.n_tokens));
    quantized.weight = matrix.into();
    quantized.notes.splice(0..0, rotation.iter().flat_map(|r| r.notes.iter().cloned()));
    Ok(quantized)
}

/// A Hessian in both domains.
pub(super) struct Rotation {
    /// All of it, in the original domain.
    complete: Matrix,
    rotated: Matrix,
    notes: Vec<Note>,
    /// What is made of the rotated one.
    work: SharedWork,
}

impl Rotation {
    /// Of a lower triangle.
    pub(super) fn new(device: &dyn Device, hessian: &Matrix, transform: &InputTransform) -> Result<Self, QuantError> {
        let cols = transform.width();
        assert_eq!((hessian.rows(), hessian.cols()), (cols, cols), "the Hessian belongs to another input");
        check_hessian_on(device, hessian)?;
        let mut notes = Vec::new();
        let complete = completed(device, hessian, &mut notes);
        let rotated = rotate_both(device, transform, &complete);
        Ok(Rotation { complete, rotated, notes, work: SharedWork::default() })
    }
}

/// The whole Hessian of its lower triangle. Inputs that were never active get the mean of the others' diagonals, so that their
/// weights are not given away for nothing: the task's own prompts may use them.
fn completed(device: &dyn Device, hessian: &Matrix, notes: &mut Vec<Note>) -> Matrix {
    let n = hessian.rows();
    let on_diagonal: Vec<(usize, usize)> = (0..n).map(|i| (i, i)).collect();
    let diagonal = device.pick(hessian, &on_diagonal);
    let dead: Vec<(usize, usize)> = on_diagonal.into_iter().filter(|&(i, _)| diagonal[i] == 0.0).collect();
    if !dead.is_empty() {
        notes.push(Note::DeadColumns { count: dead.len() });
    }
    let sum: f64 = diagonal.iter().map(|d| f64::from(*d)).sum();
    let mean = if sum > 0.0 { sum / (n - dead.len()) as f64 } else { 1.0 };
    let mut whole = hessian.clone();
    match device.resident() {
        Some(resident) => resident.complete_upper(&mut whole),
        None => {
            let data = whole.data_mut();
            for_each_pair(n, |above, below| data[above] = data[below]);
        }
    }
    device.add_at(&mut whole, &dead, &vec![mean as f32; dead.len()]);
    whole
}

/// `T H T^T` of a symmetric matrix.
fn rotate_both(device: &dyn Device, transform: &InputTransform, hessian: &Matrix) -> Matrix {
    let mut rotated = hessian.clone();
    rotate_rows(device, transform, &mut rotated);
    match device.resident() {
        Some(resident) => resident.transpose(&mut rotated),
        None => transpose(&mut rotated),
    }
    rotate_rows(device, transform, &mut rotated);
    rotated
}

fn rotate_rows(device: &dyn Device, transform: &InputTransform, matrix: &mut Matrix) {
    if let Some(resident) = device.resident() {
        resident.rotate_rows(matrix, transform);
        return;
    }
    let cols = matrix.cols();
    matrix.data_mut().par_chunks_exact_mut(cols.max(1)).for_each(|row| transform.forward(row));
}

/// Transposes a square matrix in place.
fn transpose(matrix: &mut Matrix) {
    let (n, data) = (matrix.rows(), matrix.data_mut());
    for_each_pair(n, |above, below| data.swap(above, below));
}

/// Places above the diagonal of an `[n, n]` matrix with their mirror images below it, tile by tile, since one of the two is far
/// from the one before it.
fn for_each_pair(n: usize, mut visit: impl FnMut(usize, usize)) {
    for top in (0..n).step_by(TILE) {
        for left in (top..n).step_by(TILE) {
            for r in top..(top + TILE).min(n) {
                for c in left.max(r + 1)..(left + TILE).min(n) {
                    visit(r * n + c, c * n + r);
                }
            }
        }
    }
}

/// The weights without the kept ones, rotated.
fn rotated_rest(device: &dyn Device, transform: &InputTransform, weights: &Matrix, plan: &LayerPlan) -> Matrix {
    let mut rest = weights.clone();
    if let Some(mask) = plan.kept.as_deref() {
        for r in 0..rest.rows() {
            let row = rest.row_mut(r);
            mask.row(r).iter().for_each(|&c| row[c as usize] = 0.0);
        }
    }
    rotate_rows(device, transform, &mut rest);
    rest
}

/// The base with what is stored for the kept elements; as it is when nothing is kept.
fn with_kept(
    base: PackedMatrix,
    weights: &Matrix,
    plan: &LayerPlan,
    hessian: Option<&Matrix>,
) -> Result<PackedMatrix, QuantError> {
    let Some(mask) = plan.kept.as_deref() else { return Ok(base) };
    let cols = weights.cols();
    let mean = hessian.map_or(0.0, |h| (0..cols).map(|i| f64::from(h.row(i)[i])).sum::<f64>() / cols.max(1) as f64);
    let added = plan.settings.damping * mean;
    let corrections: Vec<Vec<(usize, f16)>> = (0..weights.rows())
        .into_par_iter()
        .map(|r| {
            let kept = mask.row(r);
            if kept.is_empty() {
                return Vec::new();
            }
            let mut errors = vec![0.0f32; cols];
            base.unpack_row(r, &mut errors);
            errors.iter_mut().zip(weights.row(r)).for_each(|(e, w)| *e = w - *e);
            let values = match hessian {
                None => kept.iter().map(|&c| f16::from_f32(errors[c as usize])).collect(),
                Some(hessian) => least_error(hessian, added, kept, errors),
            };
            kept.iter().map(|&c| c as usize).zip(values).collect()
        })
        .collect();
    Ok(base.with_elements(ElementCorrections::from_rows(cols, &corrections)?)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tailorq_tensor::Rng;

    #[test]
    fn transposing_and_completing_a_triangle() {
        for n in [1, 31, 32, 70] {
            let mut rng = Rng::new(n as u64);
            let m = Matrix::from_vec(n, n, (0..n * n).map(|_| rng.normal()).collect());
            let (mut transposed, mut notes) = (m.clone(), Vec::new());
            transpose(&mut transposed);
            let whole = completed(&*tailorq_kernels::cpu(), &m, &mut notes);
            for (r, c) in (0..n * n).map(|i| (i / n, i % n)) {
                assert_eq!(transposed.row(r)[c], m.row(c)[r]);
                assert_eq!(whole.row(r)[c], m.row(r.max(c))[r.min(c)]);
            }
            assert!(notes.is_empty());
        }
    }
}
