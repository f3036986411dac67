//! A matrix on the device, and its product with a few vectors.

use super::corrections::{Corrections, Shape};
use super::launch::{self, Launch, Sharing};
use super::layout::{self, DenseWeights, Format, TILE_ROWS, Tiles};
use super::step::MOST_SHARED;
use super::stream::{self, Plan, Unit, WARPS};
use crate::error::CudaError;
use crate::gpu::{Buffer, Gpu, Source};
use std::sync::Arc;
use tailorq_tensor::{Bits, Group, Weight};

macro_rules! source {
    ($name:literal, $format:literal, $codebook:literal, $corrected:literal) => {
        Source {
            name: $name,
            code: concat!(
                include_str!("../kernels/decode_parts.cuh"),
                include_str!("../kernels/decode_ring.cuh"),
                "#define FORMAT ",
                $format,
                "\n#define CODEBOOK ",
                $codebook,
                "\n#define CORRECTED ",
                $corrected,
                "\n",
                include_str!("../kernels/decode_codes.cuh"),
                include_str!("../kernels/decode_corrections.cuh"),
                include_str!("../kernels/decode_gemv.cu")
            ),
        }
    };
}

/// The kernels of every format, each compiled when it is first needed: affine grids of 2, 3, 4, 6 and 8 bits, codebooks of 2, 3
/// and 4, dense; all but the dense ones again with corrections.
pub(crate) static SOURCES: [Source; 18] = [
    source!("decode_affine_2", "2", "0", "0"),
    source!("decode_affine_3", "3", "0", "0"),
    source!("decode_affine_4", "4", "0", "0"),
    source!("decode_affine_6", "6", "0", "0"),
    source!("decode_affine_8", "8", "0", "0"),
    source!("decode_codebook_2", "2", "1", "0"),
    source!("decode_codebook_3", "3", "1", "0"),
    source!("decode_codebook_4", "4", "1", "0"),
    source!("decode_f16", "16", "0", "0"),
    source!("decode_bf16", "17", "0", "0"),
    source!("decode_affine_2_corrected", "2", "0", "1"),
    source!("decode_affine_3_corrected", "3", "0", "1"),
    source!("decode_affine_4_corrected", "4", "0", "1"),
    source!("decode_affine_6_corrected", "6", "0", "1"),
    source!("decode_affine_8_corrected", "8", "0", "1"),
    source!("decode_codebook_2_corrected", "2", "1", "1"),
    source!("decode_codebook_3_corrected", "3", "1", "1"),
    source!("decode_codebook_4_corrected", "4", "1", "1"),
];

/// Where those with corrections begin.
const CORRECTED: usize = 10;

/// The most vectors of a product.
pub(super) const MOST_ROWS: usize = 8;

/// Stages of a warp: two at least, so that one is filled while another is read.
const DEPTHS: [usize; 2] = [2, 8];

/// Bytes of shared memory that the kernels take beside what they are given.
const OWN_SHARED: usize = 128;

/// The argument of the kernels, as `Gemv` in `decode_gemv.cu`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Gemv {
    stages: u64,
    scales: u64,
    zeros: u64,
    rounds: u64,
    shares: u64,
    places: u64,
    stream_in: u64,
    norm: u64,
    x: u64,
    sums: u64,
    plain: u64,
    bias: u64,
    y: u64,
    out: u64,
    out_sums: u64,
    levels: [u32; 8],
    middle: u32,
    rows: u32,
    n_tiles: u32,
    n_units: u32,
    n_groups: u32,
    stages_a_tile: u32,
    tiles_a_block: u32,
    stages_a_warp: u32,
    n_warps: u32,
    round_bytes: [u32; 2],
    rounds_a_piece: [u32; 2],
    n: u32,
    y_stride: u32,
    mode: u32,
    wide: u32,
    columns: u32,
    eps: f32,
    depth: u32,
    at_stages: u32,
    at_x: u32,
    at_eighths: u32,
    at_sums: u32,
    at_parts: u32,
    at_plain: u32,
    at_corrections: u32,
    at_places: u32,
    x_is_shared: u32,
    plain_is_shared: u32,
}

/// Activations on the device: fragments and the sums of 8 each, for `n` tokens.
#[derive(Clone, Copy, Debug)]
pub(super) struct Fragments {
    pub(super) data: u64,
    pub(super) sums: u64,
}

/// What a product multiplies.
#[derive(Clone, Copy, Debug)]
pub(super) enum Input {
    /// What the base meets, and what corrections meet.
    Fragments { x: Fragments, plain: Fragments },
    /// The norm of one vector of numbers, which each block takes for itself; see [`DeviceMatrix::takes_norms`].
    Norm { stream: u64, weight: u64, eps: f32 },
}

/// An RMS norm that is taken before a rotation: its weight, and where the norm goes as it is.
#[derive(Clone, Copy, Debug)]
pub(super) struct RotatedNorm {
    pub(super) weight: u64,
    pub(super) eps: f32,
    pub(super) plain: Option<Fragments>,
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
    n_groups: usize,
    is_paired: bool,
    /// Of a tile.
    n_units: usize,
    plan: Plan,
    unit: Unit,
    stages: Buffer,
    /// Of one group a row; else they are in the stages.
    scales: Option<Buffer>,
    zeros: Option<Buffer>,
    /// The zero of a symmetric layout, see [`layout::middle_word`]; else 0.
    middle: u32,
    levels: [u32; 8],
    /// What there is of corrections, and the parts of [`Corrections`].
    shape: Option<Shape>,
    corrections: Option<[Buffer; 3]>,
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
        let rows = tiles.len() * TILE_ROWS;
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
        let n_groups = (tiles.chunks() * 8).checked_div(layout::group_steps(group)).unwrap_or(1);
        let scales = packed.map_or(Vec::new(), |_| tiles.scales(n_groups));
        let (mut zeros, mut middle) = (Vec::new(), 0);
        if let (Some(m), Format::Affine(bits)) = (packed, format) {
            match m.layout().symmetric {
                true => middle = layout::middle_word(bits),
                false => zeros = tiles.zeros(n_groups, bits),
            }
        }
        // Dense values hold their corrections already.
        let shape = packed.and_then(|_| Shape::of(tiles));
        let n_units = tiles.chunks() * layout::CHUNK / format.unit_columns();
        let unit = Unit::new(format, group, !zeros.is_empty());
        let plan = |n_warps: usize| {
            let n_stages = unit.stages(n_units);
            Plan::new(tiles.len(), n_stages, n_warps, gpu.n_processors as usize)
        };
        let stages = stream::interleave(n_units, &unit, &tiles.codes(format), &scales, &zeros);
        let beside = |words: &[u32]| (group == Group::Row && !words.is_empty()).then(|| gpu.upload(words));
        let biases: Vec<_> = parts.iter().map(|p| p.1).collect();
        let mut matrix = DeviceMatrix {
            gpu: gpu.clone(),
            format,
            group,
            rows,
            cols: tiles.cols(),
            n_groups,
            is_paired: false,
            n_units,
            plan: plan(WARPS[0]),
            unit,
            stages: gpu.upload(&stages),
            scales: beside(&scales),
            zeros: beside(&zeros),
            middle,
            levels: packed.and_then(|m| m.levels()).map_or([0; 8], layout::level_words),
            shape,
            corrections: None,
            bias: biases.iter().any(Option::is_some).then(|| gpu.upload(&tiles.per_row(&biases))),
            transform: packed.and_then(|m| m.transform()).map(|t| DeviceTransform {
                signs: gpu.upload(t.signs()),
                width: t.width(),
                block: t.block(),
            }),
        };
        // One plan serves a single vector and several: a token's numbers do not depend on those beside it.
        let has_room =
            |matrix: &DeviceMatrix| [Kernel::ONE, Kernel::MANY].map(|k| matrix.shared(k)).iter().all(Option::is_some);
        for n_warps in WARPS {
            matrix.plan = plan(n_warps);
            if has_room(&matrix) {
                break;
            }
        }
        matrix.check()?;
        matrix.corrections = shape.map(|shape| {
            let all = Corrections::new(tiles, shape, &matrix.plan);
            [gpu.upload(&all.rounds), gpu.upload(&all.shares), gpu.upload(&all.rows)]
        });
        Ok(matrix)
    }

    /// Whether the kernels have room for such a matrix.
    fn check(&self) -> Result<(), CudaError> {
        let refused = |what: String| Err(CudaError::Unsupported { what });
        if let Some(t) = &self.transform
            && t.width % t.block != 0
            && t.width * 4 > MOST_SHARED as usize
        {
            return refused(format!("an input transform of {} inputs in blocks of {}", t.width, t.block));
        }
        match self.shared(Kernel::MANY) {
            Some(_) => Ok(()),
            None => refused(format!("products of {} inputs in groups of {} on this device", self.cols, self.group)),
        }
    }

    /// The same matrix in memory of its own.
    pub(super) fn duplicate(&self) -> Self {
        let copy = Buffer::duplicate;
        DeviceMatrix {
            gpu: self.gpu.clone(),
            stages: copy(&self.stages),
            scales: self.scales.as_ref().map(copy),
            zeros: self.zeros.as_ref().map(copy),
            corrections: self.corrections.as_ref().map(|c| c.each_ref().map(copy)),
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

    /// Whether a product with one vector can take its norm.
    pub(super) fn takes_norms(&self) -> bool {
        !self.is_rotated() && self.shared(Kernel::One { with_norm: true, with_plain: false }).is_some()
    }

    /// Bytes that a product reads of the matrix.
    pub(super) fn bytes(&self) -> usize {
        let one = [self.scales.as_ref(), self.zeros.as_ref(), self.bias.as_ref()];
        let corrections = self.corrections.iter().flatten();
        let beside: usize = one.into_iter().flatten().chain(corrections).map(Buffer::bytes).sum();
        self.plan.n_tiles * self.n_units * self.unit.bytes() + beside
    }

    /// The product with `n` vectors.
    pub(super) fn product(&self, n: usize, input: Input, output: Output) -> Launch {
        assert!((1..=MOST_ROWS).contains(&n), "a product with 1 to {MOST_ROWS} vectors");
        let with_norm = matches!(input, Input::Norm { .. });
        let kernels = self.kernels(n, with_norm);
        // One vector: beside another kernel where that leaves room.
        let rooms = [launch::half(&self.gpu).filter(|_| n == 1), Some(launch::whole(&self.gpu))];
        let in_room = |kernel, room| self.shared_in(kernel, room).map(|shared| (kernel, shared));
        let with_room = |kernel| rooms.into_iter().flatten().find_map(|room| in_room(kernel, room));
        let found = kernels.into_iter().find_map(with_room);
        let (kernel, shared) = found.expect("checked when the matrix was made");
        let plan = &self.plan;
        let of = |b: Option<&Buffer>| b.map_or(0, Buffer::ptr);
        let corrections = |i: usize| self.corrections.as_ref().map_or(0, |c| c[i].ptr());
        let round_bytes = self.shape.map_or([0; 2], Shape::round_bytes);
        let (mode, y, stride, out) = match output {
            Output::Store { y, stride } => (0, y, stride, None),
            Output::Add { y, stride } => (1, y, stride, None),
            Output::SwiGlu { out, y, stride } => (2, y, stride, Some(out)),
        };
        assert_eq!(out.is_some(), self.is_paired, "pairs become hidden numbers, and nothing else does");
        let (x, plain, (stream_in, norm, eps)) = match input {
            Input::Fragments { x, plain } if x.data == plain.data => (x, 0, (0, 0, 0.0)),
            Input::Fragments { x, plain } => (x, plain.data, (0, 0, 0.0)),
            Input::Norm { stream, weight, eps } => (Fragments { data: 0, sums: 0 }, 0, (stream, weight, eps)),
        };
        let args = Gemv {
            stages: self.stages.ptr(),
            scales: of(self.scales.as_ref()),
            zeros: of(self.zeros.as_ref()),
            rounds: corrections(0),
            shares: corrections(1),
            places: corrections(2),
            stream_in,
            norm,
            x: x.data,
            sums: x.sums,
            plain,
            bias: of(self.bias.as_ref()),
            y,
            out: out.map_or(0, |o| o.data),
            out_sums: out.map_or(0, |o| o.sums),
            levels: self.levels,
            middle: self.middle,
            rows: self.rows as u32,
            n_tiles: plan.n_tiles as u32,
            n_units: self.n_units as u32,
            n_groups: self.n_groups as u32,
            stages_a_tile: plan.stages_a_tile as u32,
            tiles_a_block: plan.tiles_a_block as u32,
            stages_a_warp: plan.stages_a_warp as u32,
            n_warps: plan.n_warps as u32,
            round_bytes: round_bytes.map(|b| b as u32),
            rounds_a_piece: round_bytes.map(|b| self.unit.stage_bytes().checked_div(b).unwrap_or(0) as u32),
            n: n as u32,
            y_stride: stride as u32,
            mode,
            wide: u32::from(self.shape.is_some_and(|s| s.is_wide)),
            columns: self.cols as u32,
            eps,
            depth: shared.depth as u32,
            at_stages: shared.stages as u32,
            at_x: shared.x as u32,
            at_eighths: shared.eighths as u32,
            at_sums: shared.sums as u32,
            at_parts: shared.parts as u32,
            at_plain: shared.plain as u32,
            at_corrections: shared.corrections as u32,
            at_places: shared.places as u32,
            x_is_shared: u32::from(kernel != Kernel::MANY),
            plain_is_shared: u32::from(kernel.with_plain()),
        };
        let kernel =
            (self.source(), self.kernel(kernel), if kernel.has_one() { Sharing::Shared } else { Sharing::Alone });
        Launch::new(&self.gpu, kernel, shared.end as u32, args).blocks(plan.n_blocks())
    }

    /// Whether corrections meet the inputs as they are, beside a base that meets something else.
    pub(super) fn is_corrected(&self) -> bool {
        self.shape.is_some()
    }

    /// The rotation of `n` vectors `x` (`[n, cols]`, numbers), where there is a transform; of their norm, if that is given.
    pub(super) fn rotation(&self, n: usize, x: u64, norm: Option<RotatedNorm>, out: Fragments) -> Option<Launch> {
        let t = self.transform.as_ref()?;
        // A block of threads has whole blocks of inputs and whole steps; with a second pass it has all inputs.
        let part =
            if t.width.is_multiple_of(t.block) { t.block.max(512).min(t.width.next_multiple_of(16)) } else { t.width };
        let plain = norm.and_then(|norm| norm.plain);
        let args = Rotate {
            x,
            norm: norm.map_or(0, |norm| norm.weight),
            signs: t.signs.ptr(),
            out: out.data,
            out_sums: out.sums,
            plain: plain.map_or(0, |plain| plain.data),
            plain_sums: plain.map_or(0, |plain| plain.sums),
            eps: norm.map_or(0.0, |norm| norm.eps),
            width: t.width as u32,
            block: t.block as u32,
            part: part as u32,
            n: n as u32,
            end: 0,
        };
        Some(Launch::new(&self.gpu, (&super::step::SOURCE, "rotate", Sharing::Shared), 4 * part as u32, args))
    }

    /// Sums of a token's inputs that a block holds.
    fn n_sums(&self) -> usize {
        match (self.format, self.group) {
            (Format::Affine(_), Group::Row) => 1,
            (Format::Affine(_), Group::Inputs(_)) => self.n_groups,
            (Format::Codebook(_) | Format::Dense(_), _) => 0,
        }
    }

    /// The shared memory of a block that has a processor for itself.
    fn shared(&self, kernel: Kernel) -> Option<Shared> {
        self.shared_in(kernel, launch::whole(&self.gpu))
    }

    /// The shared memory of a block that may have `room` bytes.
    fn shared_in(&self, kernel: Kernel, room: u32) -> Option<Shared> {
        let room = room as usize;
        let padded = self.cols.next_multiple_of(layout::CHUNK);
        let vectors = 2 * padded;
        let (x, plain, eighths, width) = match kernel {
            Kernel::Many { n_shared, with_plain } => {
                (n_shared * vectors, n_shared * vectors * usize::from(with_plain), 0, MOST_ROWS)
            }
            Kernel::One { with_norm, with_plain } => {
                (vectors, vectors * usize::from(with_plain), if with_norm { 4 * padded / 8 } else { 0 }, 1)
            }
        };
        let plan = &self.plan;
        let parts = (plan.tiles_a_block + plan.n_warps) * 4 * TILE_ROWS * width;
        let sums = (4 * self.n_sums() * width).next_multiple_of(16);
        let corrections = self.shape.map_or(0, |s| s.places(plan).iter().sum::<usize>() * 4 * width);
        // Also which rounds each warp has, five words.
        let places = if self.shape.is_some() { plan.tiles_a_block * TILE_ROWS * 4 + 20 * WARPS[0] } else { 0 };
        let sizes = [x, plain, eighths, sums, parts, corrections.next_multiple_of(16), places];
        // A stage with its barrier.
        let stage = plan.n_warps * (self.unit.stage_bytes() + 8);
        let depth = (room.checked_sub(sizes.iter().sum::<usize>() + OWN_SHARED + 32)? / stage).min(DEPTHS[1]);
        // Another barrier is for where the sums of corrections are.
        let stages = (8 + 8 * plan.n_warps * depth).next_multiple_of(16);
        let mut end = stages + plan.n_warps * depth * self.unit.stage_bytes();
        let [x, plain, eighths, sums, parts, corrections, places] = sizes.map(|size| {
            end += size;
            end - size
        });
        (depth >= DEPTHS[0]).then_some(Shared {
            depth,
            stages,
            x,
            plain,
            eighths,
            sums,
            parts,
            corrections,
            places,
            end,
        })
    }

    /// Those that compute a product with `n` vectors, the best first, whether or not there is room.
    fn kernels(&self, n: usize, with_norm: bool) -> Vec<Kernel> {
        let plain_first = self.is_rotated() && self.shape.is_some();
        let one = [plain_first, false].map(|with_plain| Kernel::One { with_norm, with_plain });
        let many = [plain_first, false].map(|with_plain| Kernel::Many { n_shared: n, with_plain });
        let one = one.into_iter().filter(|_| n == 1);
        one.chain(many).chain([Kernel::MANY]).collect()
    }

    fn source(&self) -> &'static Source {
        let at = |bits: Bits| Bits::ALL.iter().position(|b| *b == bits).expect("one of all");
        let corrected = if self.shape.is_some() { CORRECTED } else { 0 };
        &SOURCES[match self.format {
            Format::Affine(bits) => corrected + at(bits),
            // Codebooks have at most 4 bits.
            Format::Codebook(bits) => corrected + 5 + at(bits),
            Format::Dense(DenseWeights::F16) => 8,
            Format::Dense(DenseWeights::Bf16) => 9,
        }]
    }

    fn kernel(&self, kernel: Kernel) -> &'static str {
        match (self.group, kernel) {
            (Group::Inputs(32), Kernel::One { .. }) => "gemv_32_one",
            (Group::Inputs(32), Kernel::Many { .. }) => "gemv_32_many",
            (Group::Inputs(64), Kernel::One { .. }) => "gemv_64_one",
            (Group::Inputs(64), Kernel::Many { .. }) => "gemv_64_many",
            (Group::Inputs(_), Kernel::One { .. }) => "gemv_128_one",
            (Group::Inputs(_), Kernel::Many { .. }) => "gemv_128_many",
            (Group::Row, Kernel::One { .. }) => "gemv_row_one",
            (Group::Row, Kernel::Many { .. }) => "gemv_row_many",
        }
    }
}

/// A single vector lies in shared memory, and so do several if they have room; else each warp reads what it needs. What
/// corrections meet lies there too if it is something else and has room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kernel {
    One { with_norm: bool, with_plain: bool },
    Many { n_shared: usize, with_plain: bool },
}

impl Kernel {
    /// Those that take least.
    const ONE: Kernel = Kernel::One { with_norm: false, with_plain: false };
    const MANY: Kernel = Kernel::Many { n_shared: 0, with_plain: false };

    fn has_one(self) -> bool {
        matches!(self, Kernel::One { .. })
    }

    fn with_plain(self) -> bool {
        match self {
            Kernel::One { with_plain, .. } | Kernel::Many { with_plain, .. } => with_plain,
        }
    }
}

/// Where things lie in a block's shared memory, and how many stages each warp has.
#[derive(Clone, Copy, Debug)]
struct Shared {
    depth: usize,
    stages: usize,
    x: usize,
    plain: usize,
    eighths: usize,
    sums: usize,
    parts: usize,
    corrections: usize,
    places: usize,
    end: usize,
}

/// The argument of `rotate` in `decode_step.cu`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Rotate {
    x: u64,
    norm: u64,
    signs: u64,
    out: u64,
    out_sums: u64,
    plain: u64,
    plain_sums: u64,
    eps: f32,
    width: u32,
    block: u32,
    part: u32,
    n: u32,
    end: u32,
}
