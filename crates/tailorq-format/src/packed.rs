//! Packed matrices as named tensors: `<layer>.codes`, `.codes_high`, `.scales`, `.zeros`.

use crate::error::DAMAGED;
use crate::{FormatError, Result, StoredType, TensorSet, TensorSpec};
use tailorq_tensor::{Bits, Layout, PackedMatrix, PackedParts, SharedBytes, TILE};

/// Version of the tensors that [`packed_specs`] names; a configuration carries it, and readers refuse others.
pub const FORMAT_VERSION: u32 = 1;

/// The tensors of a packed `[rows, cols]` matrix, in the order in which they are written:
///
/// | tensor | type | shape | when |
/// | --- | --- | --- | --- |
/// | `codes` | U32 | `[rows, tiles * words_per_tile]` | always |
/// | `codes_high` | U16 | `[rows, tiles]` | 3 bits |
/// | `scales` | F16 | `[rows, groups]` | always |
/// | `zeros` | U8 | `[rows, zero_bytes_per_row]` | asymmetric |
pub fn packed_specs(layer: &str, rows: usize, cols: usize, layout: Layout) -> Vec<TensorSpec> {
    let tiles = cols.div_ceil(TILE);
    // A hostile width must end as a wrong shape, not as an overflow.
    let words = tiles.saturating_mul(layout.bits.words_per_tile());
    let mut specs = vec![TensorSpec::new(format!("{layer}.codes"), StoredType::U32, &[rows, words])];
    if layout.bits == Bits::Three {
        specs.push(TensorSpec::new(format!("{layer}.codes_high"), StoredType::U16, &[rows, tiles]));
    }
    specs.push(TensorSpec::new(format!("{layer}.scales"), StoredType::F16, &[rows, layout.group.count(cols)]));
    if !layout.symmetric {
        let zeros = [rows, layout.zero_bytes_per_row(cols)];
        specs.push(TensorSpec::new(format!("{layer}.zeros"), StoredType::U8, &zeros));
    }
    specs
}

/// The tensors of `matrix` with their bytes, as [`packed_specs`] orders them; nothing is copied.
pub fn packed_tensors(layer: &str, matrix: &PackedMatrix) -> Vec<(TensorSpec, SharedBytes)> {
    let parts = matrix.parts();
    let bytes = [Some(&parts.codes), parts.codes_high.as_ref(), Some(&parts.scales), parts.zeros.as_ref()];
    packed_specs(layer, matrix.rows(), matrix.cols(), matrix.layout())
        .into_iter()
        .zip(bytes.into_iter().flatten().cloned())
        .collect()
}

/// Reads the packed matrix of `layer`, validated once; its parts stay in the memory map.
pub fn read_packed(set: &TensorSet, layer: &str, rows: usize, cols: usize, layout: Layout) -> Result<PackedMatrix> {
    let part = |name: &str, spec: Option<&TensorSpec>| -> Result<Option<SharedBytes>> {
        let full = format!("{layer}.{name}");
        let Some(spec) = spec else {
            return match set.get(&full) {
                None => Ok(None),
                Some(view) => {
                    let problem = format!("is not part of a {}-bit layout like this one", layout.bits.count());
                    Err(FormatError::tensor(view.file, &full, problem, MISMATCH))
                }
            };
        };
        let view = set.get(&full).ok_or_else(|| FormatError::tensor(set.place(), &full, "is missing", MISMATCH))?;
        view.expect(spec.dtype, &spec.shape)?;
        Ok(Some(view.bytes))
    };
    let specs = packed_specs(layer, rows, cols, layout);
    let find = |name: &str| specs.iter().find(|s| s.name.strip_prefix(layer).is_some_and(|n| n[1..] == *name));
    let always = |name: &str| -> Result<SharedBytes> {
        let bytes = part(name, find(name))?;
        Ok(bytes.expect("codes and scales are in every layout, and a missing tensor is an error"))
    };
    let parts = PackedParts {
        codes: always("codes")?,
        codes_high: part("codes_high", find("codes_high"))?,
        scales: always("scales")?,
        zeros: part("zeros", find("zeros"))?,
    };
    PackedMatrix::new(rows, cols, layout, parts).map_err(|e| {
        let codes = format!("{layer}.codes");
        let file = set.get(&codes).map_or(set.place(), |view| view.file);
        FormatError::tensor(file, layer, format!("is no valid packed matrix: {e}"), DAMAGED)
    })
}

const MISMATCH: &str = "the tensors do not match the layout in config.json: quantize again or fetch the model again";
