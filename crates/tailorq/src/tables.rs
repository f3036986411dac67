//! Embedding and head: large tables that no Hessian describes, rounded to 8 or 4 bits panel by panel, or kept at 16.

use crate::error::PipelineError;
use crate::report::{LayerReport, rounded};
use tailorq_kernels::Device;
use tailorq_quant::quantize::Rtn;
use tailorq_quant::{Clip, LayerSettings, LayerStats, Quantizer};
use tailorq_tensor::{Bits, DType, Layout, Matrix, PackedMatrix, Weight};

/// Rows in work at a time: bounds memory and lets threads share a panel.
const PANEL_ROWS: usize = 4096;

/// Rounds a `[vocab, hidden]` table to `layout`; at these widths a search for the range gains nothing measurable.
pub fn pack_table(
    device: &dyn Device,
    name: &str,
    table: &Weight,
    layout: Layout,
) -> Result<(PackedMatrix, LayerReport), PipelineError> {
    let settings = LayerSettings {
        layout,
        clip: if layout.bits < Bits::Six { Clip::Magnitude } else { Clip::None },
        damping: 0.0,
        ..LayerSettings::new(layout.bits, layout.group)
    };
    let (mut panels, mut notes) = (Vec::new(), Vec::new());
    let (mut squares, mut lost) = (0.0, 0.0);
    for_each_panel(table, |first_row, panel| {
        let quantized = Rtn
            .quantize(device, panel, &LayerStats::default(), &settings.into())
            .map_err(|e| PipelineError::Table(format!("{name}.weight, counted from row {first_row}: {e}")))?;
        let norm: f64 = panel.data().iter().map(|&w| f64::from(w) * f64::from(w)).sum();
        squares += norm;
        lost += norm * quantized.relative_error * quantized.relative_error;
        notes.extend(quantized.notes.iter().map(ToString::to_string));
        panels.push(quantized.weight.packed().cloned().expect("rounding packs"));
        Ok(())
    })?;
    let matrix = PackedMatrix::stack(&panels);
    let report = LayerReport {
        name: name.to_string(),
        rows: matrix.rows(),
        cols: matrix.cols(),
        layout: Some(layout),
        dtype: None,
        codebook: false,
        transform: None,
        corrections: matrix.spec().corrections,
        bytes: matrix.bytes(),
        relative_error: rounded(if squares > 0.0 { (lost / squares).sqrt() } else { 0.0 }),
        proxy_loss: None,
        notes,
        simulated: false,
        counted_bits: None,
    };
    Ok((matrix, report))
}

/// A table at 16 bits: bfloat16 when that is exact (the checkpoint was), else half precision. Returns the dtype and the
/// little-endian bytes.
pub fn half_precision_table(name: &str, table: &Weight) -> Result<(DType, Vec<u8>), PipelineError> {
    let (mut exact, mut largest) = (true, 0f32);
    for_each_panel(table, |first_row, panel| {
        if let Some(at) = panel.data().iter().position(|w| !w.is_finite()) {
            let (row, value) = (first_row + at / panel.cols(), panel.data()[at]);
            let problem = format!("{name}.weight, row {row} holds {value}: the checkpoint is damaged, fetch it again");
            return Err(PipelineError::Table(problem));
        }
        exact &= panel.data().iter().all(|w| w.to_bits() & 0xffff == 0);
        largest = panel.data().iter().fold(largest, |m, w| m.max(w.abs()));
        Ok(())
    })?;
    if !exact && largest > 65504.0 {
        let problem = format!("{name}.weight holds {largest}, beyond half precision: use 8 bits for it");
        return Err(PipelineError::Table(problem));
    }
    let dtype = if exact { DType::BF16 } else { DType::F16 };
    let mut bytes = Vec::with_capacity(table.rows() * table.cols() * 2);
    for_each_panel(table, |_, panel| {
        bytes.extend_from_slice(&dtype.encode(panel.data()));
        Ok(())
    })?;
    Ok((dtype, bytes))
}

fn for_each_panel(
    table: &Weight,
    mut visit: impl FnMut(usize, &Matrix) -> Result<(), PipelineError>,
) -> Result<(), PipelineError> {
    let mut first = 0;
    while first < table.rows() {
        let rows = PANEL_ROWS.min(table.rows() - first);
        let mut panel = Matrix::zeros(rows, table.cols());
        table.reader().read_rows(first, panel.data_mut());
        visit(first, &panel)?;
        first += rows;
    }
    Ok(())
}
