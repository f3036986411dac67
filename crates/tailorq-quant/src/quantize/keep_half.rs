//! The layer as it is, at 16 bits: for layers that a plan does not quantize.

use super::rows::check_mask;
use super::stored::stored_at_half;
use super::{LayerStats, Needs, Quantized, Quantizer, check_settings};
use crate::{LayerPlan, QuantError};
use tailorq_kernels::Device;
use tailorq_tensor::Matrix;

/// Keeps every weight at 16 bits: 2 bytes each, whatever the layout of the settings. Elements that the plan keeps are no
/// exception from that.
#[derive(Clone, Copy, Debug)]
pub struct Half;

impl Quantizer for Half {
    fn name(&self) -> &'static str {
        "half"
    }

    fn needs(&self) -> Needs {
        Needs::default()
    }

    fn stores_half(&self) -> bool {
        true
    }

    fn quantize(
        &self,
        device: &dyn Device,
        weights: &Matrix,
        stats: &LayerStats<'_>,
        plan: &LayerPlan,
    ) -> Result<Quantized, QuantError> {
        check_settings(&plan.settings)?;
        check_mask(weights, plan)?;
        stored_at_half(device, weights, weights, stats, (Vec::new(), None))
    }
}
