//! What several linears make of the one Hessian of the input that they read: its factor, its rotation. Made for the first of
//! them, it serves the others with the same settings.

use super::Note;
use super::feedback::Factor;
use super::rotated::Rotation;
use crate::{LayerSettings, QuantError};
use std::fmt;
use std::sync::{Arc, Mutex};
use tailorq_kernels::Device;
use tailorq_tensor::{InputTransform, Matrix, TransformSpec};

/// See the module. Empty at first; [`SharedWork::clear`] gives the memory back.
#[derive(Default)]
pub struct SharedWork(Mutex<Made>);

#[derive(Default)]
struct Made {
    factor: Option<FactorOf>,
    rotation: Option<(TransformSpec, Arc<Rotation>)>,
}

/// A factor, or that there is none, and what was noted on the way.
struct FactorOf {
    damping: f64,
    act_order: bool,
    factor: Option<Arc<Factor>>,
    notes: Vec<Note>,
}

impl SharedWork {
    /// Forgets everything.
    pub fn clear(&self) {
        *self.made() = Made::default();
    }

    fn made(&self) -> std::sync::MutexGuard<'_, Made> {
        self.0.lock().expect("no thread panics while it holds what is shared")
    }
}

impl fmt::Debug for SharedWork {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SharedWork")
    }
}

/// Work shared over one Hessian, and which one that is: a method that reads another one shares nothing.
#[derive(Clone, Copy, Debug)]
pub struct OfHessian<'a> {
    /// The Hessian of [`super::LayerStats::hessian`] for all who share.
    pub hessian: &'a Matrix,
    /// What was made of it so far.
    pub work: &'a SharedWork,
}

impl<'a> OfHessian<'a> {
    fn of(shared: Option<OfHessian<'a>>, hessian: &Matrix) -> Option<&'a SharedWork> {
        shared.filter(|s| std::ptr::eq(s.hessian, hessian)).map(|s| s.work)
    }
}

/// [`Factor::new`], unless another layer had it made.
pub(super) fn factor(
    device: &dyn Device,
    (hessian, shared): (&Matrix, Option<OfHessian<'_>>),
    settings: &LayerSettings,
    notes: &mut Vec<Note>,
) -> Option<Arc<Factor>> {
    let Some(work) = OfHessian::of(shared, hessian) else {
        return Factor::new(device, hessian, settings, notes).map(Arc::new);
    };
    let mut made = work.made();
    let fits = |f: &FactorOf| f.damping.to_bits() == settings.damping.to_bits() && f.act_order == settings.act_order;
    if !made.factor.as_ref().is_some_and(fits) {
        // The old one goes before there are two.
        made.factor = None;
        let mut notes = Vec::new();
        let factor = Factor::new(device, hessian, settings, &mut notes).map(Arc::new);
        made.factor = Some(FactorOf { damping: settings.damping, act_order: settings.act_order, factor, notes });
    }
    let found = made.factor.as_ref().expect("made above");
    notes.extend(found.notes.iter().cloned());
    found.factor.clone()
}

/// [`Rotation::new`], unless another layer had it made.
pub(super) fn rotation(
    device: &dyn Device,
    (hessian, shared): (&Matrix, Option<OfHessian<'_>>),
    transform: &InputTransform,
) -> Result<Arc<Rotation>, QuantError> {
    let Some(work) = OfHessian::of(shared, hessian) else {
        return Rotation::new(device, hessian, transform).map(Arc::new);
    };
    let mut made = work.made();
    if let Some((_, rotation)) = made.rotation.as_ref().filter(|(spec, _)| *spec == transform.spec()) {
        return Ok(rotation.clone());
    }
    made.rotation = None;
    let rotation = Arc::new(Rotation::new(device, hessian, transform)?);
    made.rotation = Some((transform.spec(), rotation.clone()));
    Ok(rotation)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quantize::{Gptq, LayerStats, Quantized, Quantizer};
    use crate::{LayerPlan, TransformSettings};
    use tailorq_tensor::{Bits, Group, Rng};

    fn hessian(seed: u64, n: usize) -> Matrix {
        let mut rng = Rng::new(seed);
        let x = Matrix::from_vec(3 * n, n, (0..3 * n * n).map(|_| rng.normal()).collect());
        let mut h = Matrix::zeros(n, n);
        tailorq_kernels::cpu().gram(x.data(), &mut h);
        // An input that was never active, and one that always is: both have notes of their own.
        (0..n).for_each(|i| h.row_mut(i.max(5))[i.min(5)] = 0.0);
        h
    }

    /// Layers that share come out as layers that do not, whatever the others asked for before.
    #[test]
    fn what_is_shared_changes_nothing() {
        let (n, device, mut rng) = (128, tailorq_kernels::cpu(), Rng::new(4));
        let (hessian, other) = (hessian(1, n), hessian(2, n));
        let work = SharedWork::default();
        let plain = LayerSettings::new(Bits::Two, Group::Inputs(64));
        let settings = [
            plain,
            plain,
            LayerSettings { act_order: true, ..plain },
            LayerSettings { damping: 0.1, ..plain },
            LayerSettings { transform: Some(TransformSettings::hadamard(0)), ..plain },
            LayerSettings { transform: Some(TransformSettings::hadamard(0)), damping: 0.1, ..plain },
            LayerSettings { transform: Some(TransformSettings::hadamard(7)), ..plain },
        ];
        let same = |a: &Quantized, b: &Quantized| {
            assert_eq!(a.weight.to_matrix(), b.weight.to_matrix());
            assert_eq!((&a.notes, a.proxy_loss, a.relative_error), (&b.notes, b.proxy_loss, b.relative_error));
        };
        for settings in settings {
            for rows in [9, 32] {
                let weights = Matrix::from_vec(rows, n, (0..rows * n).map(|_| rng.normal()).collect());
                let plan = LayerPlan::from(settings);
                let quantize = |hessian, shared| {
                    let stats = LayerStats { hessian: Some(hessian), n_tokens: 3 * n, shared, ..LayerStats::default() };
                    Gptq.quantize(&*device, &weights, &stats, &plan).unwrap()
                };
                let shared = Some(OfHessian { hessian: &hessian, work: &work });
                let alone = quantize(&hessian, None);
                assert!(!alone.notes.is_empty());
                same(&quantize(&hessian, shared), &alone);
                // Statistics of something else beside it.
                same(&quantize(&other, shared), &quantize(&other, None));
            }
        }
        assert!(work.made().factor.is_some() && work.made().rotation.is_some());
        work.clear();
        assert!(work.made().factor.is_none() && work.made().rotation.is_none());
    }
}
