//! A matrix on the device, and its product with a few vectors.

use super::launch::{Launch, MOST_SHARED};
use super::layout::{self, DenseWeights, Format, TILE_ROWS, Tiles};
use crate::error::CudaError;
use crate::gpu::{Buffer, Gpu, Grid, Source};
use std::sync::Arc;
use tailorq_tensor::{Bits, Group, Weight};

macro_rules! source {
    ($name:literal, $format:literal, $codebook:literal) => {
        Source {
            name: $name,
            code: concat!(
                include_str!("../kernels/decode_parts.cuh"),
                "#define FORMAT ",
                $format,
                "\n#define CODEBOOK ",
                $codebook,
                "\n",
                include_str!("../kernels/decode_gemv.cu")
            ),
        }
    };
}

/// The kernels of every format, each compiled when it is first needed: affine grids of 2, 3, 4, 6 and 8 bits, codebooks of 2, 3
/// and 4, dense.
pub(crate) static SOURCES: [Source; 10] = [
    source!("decode_affine_2", "2", "0"),
    source!("decode_affine_3", "3", "0"),
    source!("decode_affine_4", "4", "0"),
    source!("decode_affine_6", "6", "0"),
    source!("decode_affine_8", "8", "0"),
    source!("decode_codebook_2", "2", "1"),
    source!("decode_codebook_3", "3", "1"),
    source!("decode_codebook_4", "4", "1"),
    source!("decode_f16", "16", "0"),
    source!("decode_bf16", "17", "0"),
];

/// Warps that a processor holds at the registers which the kernels take.
const WARPS_A_PROCESSOR: u32 = 28;

/// Warps of a block at most.
const WARPS_A_BLOCK: u32 = 14;

/// Warps that add corrections while the others multiply.
const SPARSE_WARPS: u32 = 4;

/// What it costs a block to begin and to end, in units of a warp.
const BLOCK_COST: u32 = 3;

/// The most vectors of a product.
pub(super) const MOST_ROWS: usize = 8;

/// The argument of the kernels, as `Gemv` in `decode_gemv.cu`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Gemv {
    codes: u64,
    scales: u64,
    zeros: u64,
    element_starts: u64,
    elements: u64,
    tile_starts: u64,
    tile_heads: u64,
    tile_codes: u64,
    x: u64,
    sums: u64,
    plain: u64,
    bias: u64,
    y: u64,
    out: u64,
    out_sums: u64,
    levels: [u32; 8],
    zero_step: u32,
    rows: u32,
    n_tiles: u32,
    n_units: u32,
    n_groups: u32,
    tiles_a_block: u32,
    n_warps: u32,
    n_sparse: u32,
    n: u32,
    y_stride: u32,
    mode: u32,
    wide: u32,
    stages: u32,
}

/// Activations on the device: fragments and the sums of 16 each, for `n` tokens.
#[derive(Clone, Copy, Debug)]
pub(super) struct Fragments {
    pub(super) data: u64,
    pub(super) sums: u64,
}

/// What a product does with its numbers.
#[derive(Clone, Copy, Debug)]
pub(super) enum Output {
    /// `y[i, row] = ` the product; rows of `y` are `stride` apart.
    Store { y: u64, stride: usize },
    /// `y[i, row] +=` the product.
    Add { y: u64, stride: usize },
    /// Of a paired matrix: `silu(gate) up` as fragments, and where `y` is not null as numbers.
    SwiGlu { out: Fragments, y: u64, stride: usize },
}

/// An input transform on the device.
pub(super) struct DeviceTransform {
    signs: Buffer,
    width: usize,
    block: usize,
}

/// One matrix, or several whose rows are computed together.
pub(super) struct DeviceMatrix {
    gpu: Arc<Gpu>,
    format: Format,
    group: Group,
    rows: usize,
    cols: usize,
    n_tiles: usize,
    n_groups: usize,
    is_paired: bool,
    codes: Buffer,
    scales: Option<Buffer>,
    zeros: Option<Buffer>,
    zero_step: usize,
    levels: [u32; 8],
    elements: Option<[Buffer; 2]>,
    is_wide: bool,
    tiles: Option<[Buffer; 3]>,
    bias: Option<Buffer>,
    transform: Option<DeviceTransform>,
}

impl DeviceMatrix {
    /// Matrices with their biases, one under the other. All but the last have a multiple of 16 rows, and they agree
    /// ([`Tiles::agree`]).
    pub(super) fn stacked(
        gpu: &Arc<Gpu>,
        parts: &[(&Weight, Option<&[f32]>)],
        dense: DenseWeights,
    ) -> Result<Self, CudaError> {
        let rows = parts.iter().map(|p| p.0.rows()).sum();
        DeviceMatrix::new(gpu, &Tiles::stacked(parts.iter().map(|p| p.0).collect()), parts, rows, dense)
    }

    /// A gate and what it gates, which agree.
    pub(super) fn paired(
        gpu: &Arc<Gpu>,
        parts: &[(&Weight, Option<&[f32]>); 2],
        dense: DenseWeights,
    ) -> Result<Self, CudaError> {
        let tiles = Tiles::paired(parts[0].0, parts[1].0);
        let rows = tiles.order.len() * TILE_ROWS;
        Ok(DeviceMatrix { is_paired: true, ..DeviceMatrix::new(gpu, &tiles, parts, rows, dense)? })
    }

    fn new(
        gpu: &Arc<Gpu>,
        tiles: &Tiles<'_>,
        parts: &[(&Weight, Option<&[f32]>)],
        rows: usize,
        dense: DenseWeights,
    ) -> Result<Self, CudaError> {
        let first = tiles.matrices[0];
        let format = Format::of(first, dense);
        let packed = match (first, format) {
            (Weight::Packed(m), Format::Affine(_) | Format::Codebook(_)) => Some(m.as_ref()),
            _ => None,
        };
        let group = packed.map_or(Group::Row, |m| m.layout().group);
        let steps = layout::group_steps(group);
        let n_groups = (tiles.chunks() * 8).checked_div(steps).unwrap_or(1);
        let (mut zeros, mut zero_step) = (None, 0);
        if let (Some(m), Format::Affine(bits)) = (packed, format) {
            let symmetric = m.layout().symmetric;
            zeros = Some(gpu.upload(&tiles.zeros(n_groups, bits, symmetric)));
            let groups_a_unit = 8usize.checked_div(steps).unwrap_or(1);
            zero_step = if symmetric { 0 } else { layout::zero_words(bits) * groups_a_unit };
        }
        let elements = tiles.elements();
        let biases: Vec<_> = parts.iter().map(|p| p.1).collect();
        let transform = packed.and_then(|m| m.transform());
        if let Some(t) = transform
            && t.width() % t.block() != 0
            && t.width() * 4 > MOST_SHARED as usize
        {
            let what = format!("an input transform of {} inputs in blocks of {}", t.width(), t.block());
            return Err(CudaError::Unsupported { what });
        }
        Ok(DeviceMatrix {
            gpu: gpu.clone(),
            format,
            group,
            rows,
            cols: tiles.cols(),
            n_tiles: tiles.order.len(),
            n_groups,
            is_paired: false,
            codes: gpu.upload(&tiles.codes(format)),
            scales: packed.map(|_| gpu.upload(&tiles.scales(n_groups))),
            zeros,
            zero_step,
            levels: packed.and_then(|m| m.levels()).map_or([0; 8], layout::level_words),
            is_wide: elements.as_ref().is_some_and(|e| e.is_wide),
            elements: elements.map(|e| [gpu.upload(&e.starts), gpu.upload(&e.words)]),
            tiles: tiles.tile_corrections().map(|t| [t.starts, t.heads, t.codes].map(|part| gpu.upload(&part))),
            bias: biases.iter().any(Option::is_some).then(|| gpu.upload(&tiles.per_row(&biases))),
            transform: transform.map(|t| DeviceTransform {
                signs: gpu.upload(t.signs()),
                width: t.width(),
                block: t.block(),
            }),
        })
    }

    /// The same matrix in memory of its own.
    pub(super) fn duplicate(&self) -> Self {
        let copy = Buffer::duplicate;
        DeviceMatrix {
            gpu: self.gpu.clone(),
            codes: copy(&self.codes),
            scales: self.scales.as_ref().map(copy),
            zeros: self.zeros.as_ref().map(copy),
            elements: self.elements.as_ref().map(|e| e.each_ref().map(copy)),
            tiles: self.tiles.as_ref().map(|t| t.each_ref().map(copy)),
            bias: self.bias.as_ref().map(copy),
            transform: self.transform.as_ref().map(|t| DeviceTransform { signs: copy(&t.signs), ..*t }),
            ..*self
        }
    }

    /// Outputs; of a paired matrix twice as many as there are, in whole tiles.
    pub(super) fn rows(&self) -> usize {
        self.rows
    }

    /// Inputs.
    pub(super) fn cols(&self) -> usize {
        self.cols
    }

    /// Whether the base meets rotated inputs.
    pub(super) fn is_rotated(&self) -> bool {
        self.transform.is_some()
    }

    /// Bytes that a product reads of the matrix.
    pub(super) fn bytes(&self) -> usize {
        let one = [Some(&self.codes), self.scales.as_ref(), self.zeros.as_ref(), self.bias.as_ref()];
        let sparse = self.elements.iter().flatten().chain(self.tiles.iter().flatten());
        one.into_iter().flatten().chain(sparse).map(Buffer::bytes).sum()
    }

    fn n_units(&self) -> usize {
        self.cols.div_ceil(layout::CHUNK) * layout::CHUNK / self.format.unit_columns()
    }

    /// The product with `n` vectors. `x` is what the base meets, `plain` what corrections meet.
    pub(super) fn product(&self, n: usize, x: Fragments, plain: Fragments, output: Output) -> Launch {
        assert!((1..=MOST_ROWS).contains(&n), "a product with 1 to {MOST_ROWS} vectors");
        let ptr = |b: Option<&Buffer>| b.map_or(0, Buffer::ptr);
        let part = |b: Option<&[Buffer; 2]>, i: usize| b.map_or(0, |b| b[i].ptr());
        let tile = |i: usize| self.tiles.as_ref().map_or(0, |t| t[i].ptr());
        let (mode, y, stride, out) = match output {
            Output::Store { y, stride } => (0, y, stride, None),
            Output::Add { y, stride } => (1, y, stride, None),
            Output::SwiGlu { out, y, stride } => (2, y, stride, Some(out)),
        };
        assert_eq!(out.is_some(), self.is_paired, "pairs become hidden numbers, and nothing else does");
        let n_sparse = if self.elements.is_some() || self.tiles.is_some() { SPARSE_WARPS } else { 0 };
        let width = if n == 1 { 1 } else { MOST_ROWS };
        let shape = Shape {
            n_tiles: self.n_tiles as u32,
            n_units: self.n_units() as u32,
            is_paired: self.is_paired,
            n_sparse,
            stages: self.stage_bytes(),
            sums: 4 * self.n_sums() as u32,
        };
        let (tiles_a_block, n_warps) = share(&shape, self.gpu.n_processors);
        let stages = shape.before_stages(tiles_a_block, n_warps, width as u32);
        let shared = stages + n_warps * shape.stages;
        let args = Gemv {
            codes: self.codes.ptr(),
            scales: ptr(self.scales.as_ref()),
            zeros: ptr(self.zeros.as_ref()),
            element_starts: part(self.elements.as_ref(), 0),
            elements: part(self.elements.as_ref(), 1),
            tile_starts: tile(0),
            tile_heads: tile(1),
            tile_codes: tile(2),
            x: x.data,
            sums: x.sums,
            plain: plain.data,
            bias: ptr(self.bias.as_ref()),
            y,
            out: out.map_or(0, |o| o.data),
            out_sums: out.map_or(0, |o| o.sums),
            levels: self.levels,
            zero_step: self.zero_step as u32,
            rows: self.rows as u32,
            n_tiles: self.n_tiles as u32,
            n_units: self.n_units() as u32,
            n_groups: self.n_groups as u32,
            tiles_a_block,
            n_warps,
            n_sparse,
            n: n as u32,
            y_stride: stride as u32,
            mode,
            wide: u32::from(self.is_wide),
            stages,
        };
        let grid = Grid {
            blocks: ((self.n_tiles as u32).div_ceil(tiles_a_block), 1, 1),
            threads: 32 * (n_warps + n_sparse),
            shared,
        };
        Launch::new(&self.gpu, self.source(), self.kernel(n), grid, args)
    }

    /// The rotation of `n` vectors `x` (`[n, cols]`, numbers), where there is a transform.
    pub(super) fn rotation(&self, n: usize, x: u64, out: Fragments) -> Option<Launch> {
        let t = self.transform.as_ref()?;
        // A block of threads has whole blocks of inputs and whole steps; with a second pass it has all inputs.
        let part =
            if t.width.is_multiple_of(t.block) { t.block.max(512).min(t.width.next_multiple_of(16)) } else { t.width };
        let args = Rotate {
            x,
            signs: t.signs.ptr(),
            out: out.data,
            out_sums: out.sums,
            width: t.width as u32,
            block: t.block as u32,
            part: part as u32,
            n: n as u32,
        };
        let grid = Grid { blocks: (t.width.div_ceil(part) as u32, n as u32, 1), threads: 512, shared: 4 * part as u32 };
        Some(Launch::new(&self.gpu, &super::step::SOURCE, "rotate", grid, args))
    }

    /// Sums of a token's inputs that a block holds.
    fn n_sums(&self) -> usize {
        match (self.format, self.group) {
            (Format::Affine(_), Group::Row) => 1,
            (Format::Affine(_), Group::Inputs(_)) => self.n_groups,
            (Format::Codebook(_) | Format::Dense(_), _) => 0,
        }
    }

    /// Bytes of shared memory in which a warp has the units that are under way, see `Stage` in `decode_gemv.cu`.
    fn stage_bytes(&self) -> u32 {
        let groups = 8u32.checked_div(layout::group_steps(self.group) as u32).unwrap_or(0);
        let planes = match self.format {
            Format::Affine(_) => 2 * groups,
            Format::Codebook(_) => groups,
            Format::Dense(_) => 0,
        };
        let one = 128 * (self.format.lane_words() as u32 + planes);
        one * (4096 / one).clamp(2, 4)
    }

    fn source(&self) -> &'static Source {
        let at = |bits: Bits| Bits::ALL.iter().position(|b| *b == bits).expect("one of all");
        &SOURCES[match self.format {
            Format::Affine(bits) => at(bits),
            // Codebooks have at most 4 bits.
            Format::Codebook(bits) => 5 + at(bits),
            Format::Dense(DenseWeights::F16) => 8,
            Format::Dense(DenseWeights::Bf16) => 9,
        }]
    }

    fn kernel(&self, n: usize) -> &'static str {
        match (self.group, n) {
            (Group::Inputs(32), 1) => "gemv_32_one",
            (Group::Inputs(32), _) => "gemv_32_many",
            (Group::Inputs(64), 1) => "gemv_64_one",
            (Group::Inputs(64), _) => "gemv_64_many",
            (Group::Inputs(_), 1) => "gemv_128_one",
            (Group::Inputs(_), _) => "gemv_128_many",
            (Group::Row, 1) => "gemv_row_one",
            (Group::Row, _) => "gemv_row_many",
        }
    }
}

/// The argument of `rotate` in `decode_step.cu`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Rotate {
    x: u64,
    signs: u64,
    out: u64,
    out_sums: u64,
    width: u32,
    block: u32,
    part: u32,
    n: u32,
}

/// What decides how a product is shared out.
#[derive(Clone, Copy)]
struct Shape {
    n_tiles: u32,
    n_units: u32,
    is_paired: bool,
    n_sparse: u32,
    /// Bytes of the stages of a warp.
    stages: u32,
    /// Bytes of the sums of a token.
    sums: u32,
}

impl Shape {
    /// Bytes of shared memory for outputs and sums, with `width` tokens.
    fn before_stages(&self, tiles: u32, warps: u32, width: u32) -> u32 {
        ((warps + 1) * tiles * TILE_ROWS as u32 * width * 4 + self.sums * width).next_multiple_of(16)
    }
}

/// Tiles of a block and its warps, such that all processors are busy to the end. The shape alone decides, so that a token's
/// numbers do not depend on those beside it.
fn share(shape: &Shape, n_processors: u32) -> (u32, u32) {
    let mut best = (f64::INFINITY, (if shape.is_paired { 2 } else { 1 }, 1));
    for tiles in [1, 2, 4] {
        if shape.is_paired && tiles == 1 {
            continue;
        }
        for warps in 1..=WARPS_A_BLOCK - shape.n_sparse {
            let shared = shape.before_stages(tiles, warps, MOST_ROWS as u32) + warps * shape.stages;
            if shared > MOST_SHARED {
                continue;
            }
            let on_one = WARPS_A_PROCESSOR / (warps + shape.n_sparse);
            let (blocks, at_once) = (shape.n_tiles.div_ceil(tiles), on_one * n_processors);
            let units = (tiles * shape.n_units).div_ceil(warps) + BLOCK_COST;
            // Fewer blocks than fit share the same bandwidth, but less than half as many cannot use all of it.
            let last = f64::from(blocks % at_once) / f64::from(at_once);
            let rounds = f64::from(blocks / at_once) + if last > 0.0 { last.max(0.5) } else { 0.0 };
            let cost = rounds * f64::from(units) * f64::from(on_one * warps + WARPS_A_PROCESSOR / 2);
            if cost < best.0 {
                best = (cost, (tiles, warps));
            }
        }
    }
    best.1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_have_tiles_and_warps() {
        for (n_tiles, n_units) in [(1, 1), (2, 5), (56, 38), (304, 7), (512, 224), (256, 112), (1184, 28)] {
            for is_paired in [false, true] {
                for n_sparse in [0, 4] {
                    let shape = Shape { n_tiles, n_units, is_paired, n_sparse, stages: 4608, sums: 4 * 4 * n_units };
                    let (tiles, warps) = share(&shape, 132);
                    assert!(warps >= 1 && warps + n_sparse <= WARPS_A_BLOCK && tiles >= 1);
                    assert!(!is_paired || tiles % 2 == 0);
                    assert!(shape.before_stages(tiles, warps, 8) + warps * shape.stages <= MOST_SHARED);
                }
            }
        }
    }
}
