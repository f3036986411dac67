//! Packed matrices as named tensors: `<layer>.codes`, `.scales` and what else the matrix has.

use crate::error::DAMAGED;
use crate::{FormatError, Result, StoredType, TensorSet, TensorSpec};
use tailorq_tensor::{
    Bits, ElementCorrections, ElementParts, InputTransform, Mean4, PackError, PackedMatrix, PackedParts, PackedSpec,
    ScaleBits, SharedBytes, TILE, TileBits, TileCorrections, TileMap, TileParts, TileSpec,
};

/// The newest version of the tensors that [`packed_specs`] names. A configuration carries the version, and readers refuse
/// those above their own.
pub const FORMAT_VERSION: u32 = 4;

/// The version that a configuration of `matrices` carries, the lowest that has all they need, so that readers which know
/// nothing of the rest go on reading them, and refuse the others: 1 for nothing but a base, 2 with corrections, 3 with an input
/// transform, a codebook or 6 bits, 4 with scales of 8 bits.
pub fn format_version<'a>(matrices: impl IntoIterator<Item = &'a PackedSpec>) -> u32 {
    let needed = |m: &PackedSpec| match (m.layout.scales, m.is_plain(), m.corrections.is_none()) {
        (ScaleBits::Eight, ..) => 4,
        (_, false, _) => 3,
        (_, true, false) => 2,
        (_, true, true) => 1,
    };
    matrices.into_iter().map(needed).max().unwrap_or(1)
}

/// Every part that a packed matrix may have.
const PARTS: [&str; 12] = [
    "codes",
    "codes_high",
    "scales",
    "zeros",
    "levels",
    "tilemap",
    "mean_scales",
    "tile_codes",
    "tile_scales",
    "element_counts",
    "element_cols",
    "element_values",
];

/// The tensors of a packed `[rows, cols]` matrix, in the order in which they are written:
///
/// | tensor | type | shape | when |
/// | --- | --- | --- | --- |
/// | `codes` | U32 | `[rows, tiles * words_per_tile]` | always |
/// | `codes_high` | U16, for 6 bits U32 | `[rows, tiles]` | 3 and 6 bits |
/// | `scales` | F16, for scales of 8 bits U8 | `[rows, groups]` | always |
/// | `zeros` | U8 | `[rows, zero_bytes_per_row]` | asymmetric |
/// | `levels` | F16 | `[2^bits]` | codebook |
/// | `tilemap` | U8 | `[rows, ceil(tiles / 8)]` | means of four or tile corrections |
/// | `mean_scales` | F16 | `[rows, groups]` | means of four |
/// | `tile_codes` | I8 `[count, 16]` or U8 `[count, 8]` | 8 or 4 bits a code | tile corrections |
/// | `tile_scales` | F16 | `[count]` | tile corrections |
/// | `element_counts` | U16, above 65,535 columns U32 | `[rows]` | element corrections |
/// | `element_cols` | as `element_counts` | `[elements]` | element corrections |
/// | `element_values` | F16 | `[elements]` | element corrections |
pub fn packed_specs(layer: &str, spec: &PackedSpec) -> Vec<TensorSpec> {
    let &PackedSpec { layout, rows, cols, corrections, codebook, transform: _ } = spec;
    let tiles = cols.div_ceil(TILE);
    // A hostile width must end as a wrong shape, not as an overflow.
    let words = tiles.saturating_mul(layout.bits.words_per_tile());
    let mut specs = Vec::new();
    let mut part = |name: &str, dtype, shape: &[usize]| {
        specs.push(TensorSpec::new(format!("{layer}.{name}"), dtype, shape));
    };
    part("codes", StoredType::U32, &[rows, words]);
    match layout.bits {
        Bits::Three => part("codes_high", StoredType::U16, &[rows, tiles]),
        Bits::Six => part("codes_high", StoredType::U32, &[rows, tiles]),
        Bits::Two | Bits::Four | Bits::Eight => {}
    }
    let scale = if layout.scales == ScaleBits::Eight { StoredType::U8 } else { StoredType::F16 };
    part("scales", scale, &[rows, layout.group.count(cols)]);
    if !layout.symmetric {
        part("zeros", StoredType::U8, &[rows, layout.zero_bytes_per_row(cols)]);
    }
    if codebook {
        part("levels", StoredType::F16, &[1 << layout.bits.count()]);
    }
    if corrections.mean4.is_some() || corrections.tiles.is_some() {
        part("tilemap", StoredType::U8, &[rows, TileMap::row_bytes(cols)]);
    }
    if corrections.mean4.is_some() {
        part("mean_scales", StoredType::F16, &[rows, layout.group.count(cols)]);
    }
    if let Some(TileSpec { bits, count }) = corrections.tiles {
        let dtype = if bits == TileBits::Eight { StoredType::I8 } else { StoredType::U8 };
        part("tile_codes", dtype, &[count, bits.tile_bytes()]);
        part("tile_scales", StoredType::F16, &[count]);
    }
    if let Some(n) = corrections.elements {
        let index = if ElementCorrections::index_bytes(cols) == 2 { StoredType::U16 } else { StoredType::U32 };
        part("element_counts", index, &[rows]);
        part("element_cols", index, &[n]);
        part("element_values", StoredType::F16, &[n]);
    }
    specs
}

/// The tensors of `matrix` with their bytes, as [`packed_specs`] orders them; nothing is copied.
pub fn packed_tensors(layer: &str, matrix: &PackedMatrix) -> Vec<(TensorSpec, SharedBytes)> {
    let parts = matrix.parts();
    let mut bytes = vec![Some(&parts.codes), parts.codes_high.as_ref(), Some(&parts.scales), parts.zeros.as_ref()];
    bytes.push(matrix.level_bytes());
    if let Some(mean4) = matrix.mean4() {
        bytes.extend([mean4.map().bytes(), mean4.scale_bytes()].map(Some));
    }
    if let Some(tiles) = matrix.tiles() {
        let TileParts { tilemap, codes, scales } = tiles.parts();
        bytes.extend([tilemap, codes, scales].map(Some));
    }
    if let Some(elements) = matrix.elements() {
        let ElementParts { counts, cols, values } = elements.parts();
        bytes.extend([counts, cols, values].map(Some));
    }
    packed_specs(layer, &matrix.spec()).into_iter().zip(bytes.into_iter().flatten().cloned()).collect()
}

/// Reads the packed matrix of `layer`, validated once; its parts stay in the memory map. A part that `spec` does not
/// have is an error as much as a missing one.
pub fn read_packed(set: &TensorSet, layer: &str, spec: &PackedSpec) -> Result<PackedMatrix> {
    let mut parts = Parts::default();
    let specs = packed_specs(layer, spec);
    for name in PARTS {
        let full = format!("{layer}.{name}");
        let view = set.get(&full);
        match (specs.iter().find(|s| s.name == full), view) {
            (None, None) => {}
            (None, Some(view)) => {
                let problem = format!("is there, but the configuration announces a matrix without it ({spec})");
                return Err(FormatError::tensor(view.file, &full, problem, MISMATCH));
            }
            (Some(_), None) => return Err(FormatError::tensor(set.place(), &full, "is missing", MISMATCH)),
            (Some(part), Some(view)) => {
                view.expect(part.dtype, &part.shape)?;
                parts.0.push((name, view.bytes));
            }
        }
    }
    let codes = format!("{layer}.codes");
    let damaged = |problem: String| {
        let file = set.get(&codes).map_or(set.place(), |view| view.file);
        FormatError::tensor(file, layer, format!("is no valid packed matrix: {problem}"), DAMAGED)
    };
    let matrix = assemble(spec, &parts).map_err(|e| damaged(e.to_string()))?;
    // The only count that no shape holds.
    let (found, announced) = (matrix.spec().corrections.mean4, spec.corrections.mean4);
    if found != announced {
        let [found, announced] = [found, announced].map(Option::unwrap_or_default);
        return Err(damaged(format!("its tilemap marks {found} tiles, the configuration announces {announced}")));
    }
    Ok(matrix)
}

fn assemble(spec: &PackedSpec, parts: &Parts) -> Result<PackedMatrix, PackError> {
    let base = PackedParts {
        codes: parts.get("codes"),
        codes_high: parts.find("codes_high"),
        scales: parts.get("scales"),
        zeros: parts.find("zeros"),
    };
    let mut matrix = PackedMatrix::new(spec.rows, spec.cols, spec.layout, base)?;
    if spec.codebook {
        matrix = matrix.with_levels(parts.get("levels"))?;
    }
    if let Some(transform) = spec.transform {
        matrix = matrix.with_transform(InputTransform::new(spec.cols, transform)?)?;
    }
    if spec.corrections.mean4.is_some() {
        let (map, scales) = (parts.get("tilemap"), parts.get("mean_scales"));
        matrix = matrix.with_mean4(Mean4::new(spec.rows, spec.cols, spec.layout.group, map, scales)?)?;
    }
    if let Some(TileSpec { bits, .. }) = spec.corrections.tiles {
        let tiles = TileParts {
            tilemap: parts.get("tilemap"),
            codes: parts.get("tile_codes"),
            scales: parts.get("tile_scales"),
        };
        matrix = matrix.with_tiles(TileCorrections::new(spec.rows, spec.cols, bits, tiles)?)?;
    }
    if spec.corrections.elements.is_some() {
        let elements = ElementParts {
            counts: parts.get("element_counts"),
            cols: parts.get("element_cols"),
            values: parts.get("element_values"),
        };
        matrix = matrix.with_elements(ElementCorrections::new(spec.rows, spec.cols, elements)?)?;
    }
    Ok(matrix)
}

/// The parts of one matrix that the file has, by name.
#[derive(Default)]
struct Parts(Vec<(&'static str, SharedBytes)>);

impl Parts {
    fn find(&self, name: &str) -> Option<SharedBytes> {
        self.0.iter().find(|p| p.0 == name).map(|p| p.1.clone())
    }

    fn get(&self, name: &str) -> SharedBytes {
        self.find(name).expect("a part of the spec that is missing was an error before")
    }
}

const MISMATCH: &str = "the tensors do not match the layout in config.json: quantize again or fetch the model again";
