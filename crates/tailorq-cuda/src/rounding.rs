//! Whole layers rounded on the device: RTN and GPTQ with clip search (`kernels/rounding.cu`), and the loss of any result.
//!
//! With error feedback, blocks of 128 columns are rounded by one kernel, one warp a row: the block's part of a row is in the
//! warp's registers and the diagonal block of the factor in shared memory. The errors go to all columns behind by one product
//! of f32. That product reads and writes the rest of the matrix for 128 multiplications an element, 32 operations a byte,
//! above the 15 or so at which the memory would bound it: wider steps would gain nothing.

use crate::blas::{Blas, Math, Operand, Product, check};
use crate::gpu::{Buffer, Gpu, Grid, Source, launch};
use cudarc::cublas::sys;
use half::f16;
use std::sync::Arc;
use tailorq_kernels::{KeptElements, Rounded, RoundingJob};
use tailorq_tensor::{Bits, Group, Matrix, ScaleBits, SharedBytes, TILE};

pub(crate) const SOURCE: Source = Source { name: "rounding", code: include_str!("kernels/rounding.cu") };

/// Columns of a block; groups that are fitted on the way divide it.
const BLOCK: usize = 128;

/// Floats of shared memory for a warp's clip search.
const STASH: usize = 2 * (128 + 16);

/// Warps of a thread block at most: the kernels' launch bounds.
const MAX_WARPS: usize = 8;

/// Thread blocks that share a processor, by registers and shared memory.
const RESIDENT: usize = 3;

/// How grids are fitted; `Rule` in the kernels.
#[repr(C)]
#[derive(Clone, Copy)]
struct Rule {
    factors: u64,
    importance: u64,
    norm: f32,
    max_code: f32,
    n_factors: i32,
    middle: i32,
    cut: i32,
}

/// The layer; `Layer` in the kernels. Places are addresses on the device, 0 for nothing.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Layer {
    weights: u64,
    current: u64,
    errors: u64,
    upper: u64,
    inverse_diagonal: u64,
    dead: u64,
    kept: u64,
    starts: u64,
    columns: u64,
    corrections: u64,
    codes: u64,
    scales: u64,
    zeros: u64,
    sums: u64,
    trouble: u64,
    added: f64,
    rows: i32,
    cols: i32,
    group_len: i32,
    n_groups: i32,
    fitted: i32,
    only_grids: i32,
}

/// Rounds a layer; `None` when a weight or a scale is out of range, which the caller's own way will name.
pub(crate) fn round_layer(gpu: &Arc<Gpu>, blas: &Blas, job: &RoundingJob<'_>) -> Option<Rounded> {
    let (rows, cols) = (job.weights.rows(), job.weights.cols());
    if rows == 0 || cols == 0 || rows.max(cols) > i32::MAX as usize / BLOCK {
        return None;
    }
    let (n_groups, whole_rows) = (job.layout.group.count(cols), job.layout.group == Group::Row);
    let group_len = if whole_rows { cols.next_multiple_of(BLOCK) } else { job.layout.group.len(cols) };
    let out = Outputs::new(gpu, job, n_groups);
    let kept = job.kept.map(|kept| Kept::new(gpu, kept, (rows, cols)));
    let clip = Clip::new(gpu, job);
    let int = |n: usize| n as i32;
    let mut layer = Layer {
        weights: gpu.address(job.weights),
        codes: out.codes.ptr(),
        scales: out.scales.ptr(),
        zeros: out.zeros.ptr(),
        sums: out.sums.ptr(),
        trouble: out.trouble.ptr(),
        rows: int(rows),
        cols: int(cols),
        group_len: int(group_len),
        n_groups: int(n_groups),
        ..Layer::default()
    };
    if let Some(kept) = &kept {
        (layer.kept, layer.starts) = (kept.bits.ptr(), kept.starts.ptr());
        (layer.columns, layer.corrections) = (kept.columns.ptr(), kept.corrections.ptr());
    }
    if job.feedback.is_some() {
        if whole_rows {
            round_groups(gpu, Layer { only_grids: 1, ..layer }, clip.rule);
            layer.fitted = 1;
        }
        round_blocks(gpu, blas, job, layer, clip.rule);
    } else {
        round_groups(gpu, layer, clip.rule);
    }
    out.read(gpu, job, kept.as_ref())
}

/// What comes back.
struct Outputs {
    n_grids: usize,
    n_sums: usize,
    codes: Buffer,
    scales: Buffer,
    zeros: Buffer,
    sums: Buffer,
    trouble: Buffer,
}

impl Outputs {
    fn new(gpu: &Arc<Gpu>, job: &RoundingJob<'_>, n_groups: usize) -> Outputs {
        let (rows, n_codes) = (job.weights.rows(), job.weights.len());
        let n_grids = rows * n_groups;
        let n_sums = if job.feedback.is_some() { rows } else { n_grids };
        Outputs {
            n_grids,
            n_sums,
            codes: gpu.allocate(n_codes),
            scales: gpu.allocate(n_grids * size_of::<f16>()),
            zeros: gpu.allocate(n_grids),
            sums: gpu.zeros(n_sums * 3 * size_of::<f64>()),
            trouble: gpu.zeros(size_of::<u32>()),
        }
    }

    fn read(&self, gpu: &Arc<Gpu>, job: &RoundingJob<'_>, kept: Option<&Kept>) -> Option<Rounded> {
        let totals = gpu.allocate(3 * size_of::<f64>());
        let grid = Grid { blocks: (1, 1, 1), threads: 1024, shared: 0 };
        launch!(gpu, &SOURCE, "total", grid, self.sums.ptr(), self.n_sums as u64, totals.ptr());
        let (mut trouble, mut sums) = ([0u32], [0.0f64; 3]);
        gpu.read(&self.trouble, 0, &mut trouble);
        if trouble != [0] {
            return None;
        }
        gpu.read(&totals, 0, &mut sums);
        let (codes, codes_high) = self.packed_codes(gpu, job);
        let (scales, zeros) = (read(gpu, &self.scales, 0, self.n_grids), read(gpu, &self.zeros, 0, self.n_grids));
        let corrections = kept.map_or_else(Vec::new, |k| read(gpu, &k.corrections, 0, k.n));
        let [weight_energy, error_energy, loss] = sums;
        Some(Rounded { codes, codes_high, scales, zeros, corrections, weight_energy, error_energy, loss })
    }
}

impl Outputs {
    /// The codes in the planes of their layout.
    fn packed_codes(&self, gpu: &Arc<Gpu>, job: &RoundingJob<'_>) -> (SharedBytes, Option<SharedBytes>) {
        let (bits, cols, n) =
            (job.layout.bits, job.weights.cols(), job.weights.rows() * job.weights.cols().div_ceil(TILE));
        let n_words = n * bits.words_per_tile();
        let high_at = n_words * size_of::<u32>();
        let planes = gpu.allocate(high_at + n * bits.high_bytes());
        let (at, high) = (planes.ptr(), planes.ptr() + high_at as u64);
        let grid = Grid::elements(n);
        launch!(
            gpu,
            &SOURCE,
            "pack_codes",
            grid,
            self.codes.ptr(),
            at,
            high,
            n as u64,
            cols as i32,
            bits.count() as i32
        );
        let high = match bits {
            Bits::Three => Some(SharedBytes::from_vec(read::<u16>(gpu, &planes, high_at, n))),
            Bits::Six => Some(SharedBytes::from_vec(read::<u32>(gpu, &planes, high_at, n))),
            Bits::Two | Bits::Four | Bits::Eight => None,
        };
        (SharedBytes::from_vec(read::<u32>(gpu, &planes, 0, n_words)), high)
    }
}

/// `n` elements from byte `at` on.
fn read<T: Copy + Default>(gpu: &Gpu, buffer: &Buffer, at: usize, n: usize) -> Vec<T> {
    let mut out = vec![T::default(); n];
    gpu.read(buffer, at, &mut out);
    out
}

/// Kept elements on the device.
struct Kept {
    n: usize,
    bits: Buffer,
    starts: Buffer,
    columns: Buffer,
    corrections: Buffer,
}

impl Kept {
    fn new(gpu: &Arc<Gpu>, kept: KeptElements<'_>, (rows, cols): (usize, usize)) -> Kept {
        let n = kept.columns.len();
        assert_eq!(
            (kept.starts.len(), kept.starts.last()),
            (rows + 1, Some(&n)),
            "kept elements are those of the rows"
        );
        let words = cols.div_ceil(32);
        let bits = gpu.zeros(rows * words * size_of::<u32>());
        let starts = gpu.upload(&kept.starts.iter().map(|&s| s as u64).collect::<Vec<_>>());
        let columns = gpu.upload(kept.columns);
        let (at, marked) = ((starts.ptr(), columns.ptr()), bits.ptr());
        launch!(gpu, &SOURCE, "mark_kept", Grid::elements(rows * 32), at.0, at.1, marked, rows as i32, words as i32);
        Kept { n, bits, starts, columns, corrections: gpu.zeros(n * size_of::<f16>()) }
    }
}

/// The rule, and what it points to.
struct Clip {
    rule: Rule,
    _factors: Buffer,
    _importance: Buffer,
}

impl Clip {
    fn new(gpu: &Arc<Gpu>, job: &RoundingJob<'_>) -> Clip {
        let factors = job.clip.map_or(&[][..], |c| c.factors);
        let importance = job.clip.and_then(|c| c.importance).unwrap_or_default();
        assert!(importance.is_empty() || importance.len() == job.weights.cols(), "one importance a column");
        let bits = job.layout.bits;
        let (on_device, weighed) = (gpu.upload(factors), gpu.upload(importance));
        let rule = Rule {
            factors: on_device.ptr(),
            importance: if importance.is_empty() { 0 } else { weighed.ptr() },
            norm: job.clip.map_or(0.0, |c| c.norm),
            max_code: f32::from(bits.max_code()),
            n_factors: factors.len() as i32,
            middle: if job.layout.symmetric { i32::from(bits.middle()) } else { -1 },
            cut: if job.layout.scales == ScaleBits::Eight { (1 << ScaleBits::SHIFT) - 1 } else { 0 },
        };
        Clip { rule, _factors: on_device, _importance: weighed }
    }
}

/// Warps a thread block and thread blocks for `n` pieces of work, one a warp: the processors share them evenly.
fn grid_for(gpu: &Gpu, n: usize, least_warps: usize, shared_floats: usize) -> Grid {
    let processors = gpu.n_processors as usize;
    let warps = n.div_ceil(processors).clamp(least_warps, MAX_WARPS);
    let blocks = n.div_ceil(warps).min(processors * RESIDENT) as u32;
    let shared = (shared_floats + warps * STASH) * size_of::<f32>();
    Grid { blocks: (blocks, 1, 1), threads: 32 * warps as u32, shared: shared as u32 }
}

/// All grids by the weights themselves, and the codes unless only grids are asked for.
fn round_groups(gpu: &Arc<Gpu>, layer: Layer, rule: Rule) {
    let n = layer.rows as usize * layer.n_groups as usize;
    launch!(gpu, &SOURCE, "round_groups", grid_for(gpu, n, 1, 0), layer, rule);
}

/// Block after block with error feedback.
fn round_blocks(gpu: &Arc<Gpu>, blas: &Blas, job: &RoundingJob<'_>, mut layer: Layer, rule: Rule) {
    let Some(feedback) = job.feedback else { return };
    let (rows, cols) = (job.weights.rows(), job.weights.cols());
    let float = size_of::<f32>();
    assert_eq!((feedback.inverse_diagonal.len(), feedback.dead.len()), (cols, cols), "one of each a column");
    let current = gpu.allocate(rows * cols * float);
    gpu.copy(current.ptr(), layer.weights, rows * cols * float);
    let errors = gpu.allocate(rows * BLOCK * float);
    let inverse_diagonal = gpu.upload(feedback.inverse_diagonal);
    let dead = gpu.upload(&feedback.dead.iter().map(|&d| u8::from(d)).collect::<Vec<_>>());
    (layer.current, layer.errors) = (current.ptr(), errors.ptr());
    (layer.upper, layer.added) = (gpu.address(feedback.upper), feedback.added);
    (layer.inverse_diagonal, layer.dead) = (inverse_diagonal.ptr(), dead.ptr());

    // Few warps would take long to bring the factor's block to shared memory.
    let grid = grid_for(gpu, rows, 4, BLOCK * BLOCK + BLOCK);
    gpu.allow_shared(gpu.function(&SOURCE, "round_block"), grid.shared);
    for start in (0..cols).step_by(BLOCK) {
        launch!(gpu, &SOURCE, "round_block", grid, layer, rule, start as i32);
        let end = (start + BLOCK).min(cols);
        if end == cols {
            break;
        }
        let update = Product { alpha: -1.0, beta: 1.0, ..Product::f32(rows, cols - end, end - start, Math::F32) };
        let at = |from: u64, place: usize| from + (place * float) as u64;
        let upper = Operand::new(at(layer.upper, start * cols + end), cols);
        let rest = Operand::new(at(layer.current, end), cols);
        blas.product(gpu, update, Operand::new(layer.errors, BLOCK), upper, rest);
    }
}

/// Thread blocks whose sums are added up in memory: fixed, so that every device adds in the same order.
const PARTS: usize = 512;

/// `tr(E H E^T)` for `errors` `[n, cols]`; of `hessian` the lower triangle is read. Products are f32, their sum is f64.
pub(crate) fn quadratic_loss(gpu: &Arc<Gpu>, blas: &Blas, errors: &Matrix, hessian: &Matrix) -> f64 {
    let (rows, cols) = (errors.rows(), errors.cols());
    assert_eq!((hessian.rows(), hessian.cols()), (cols, cols), "the Hessian belongs to another input");
    if errors.is_empty() {
        return 0.0;
    }
    let (e, h) = (gpu.address(errors), gpu.address(hessian));
    let product = gpu.allocate(errors.bytes());
    let int = |n: usize| i32::try_from(n).expect("a matrix has fewer than 2^31 rows");
    let (one, zero) = (1.0f32, 0.0f32);
    // Rows are the library's columns, and the lower triangle of the one is the upper triangle of the other.
    // SAFETY: addresses and shapes belong together; the factors live through the call.
    check(blas.with(gpu, |handle| unsafe {
        sys::cublasSsymm_v2(
            handle,
            sys::cublasSideMode_t::CUBLAS_SIDE_LEFT,
            sys::cublasFillMode_t::CUBLAS_FILL_MODE_UPPER,
            int(cols),
            int(rows),
            &raw const one,
            h as *const f32,
            int(cols),
            e as *const f32,
            int(cols),
            &raw const zero,
            product.ptr() as *mut f32,
            int(cols),
        )
        .result()
    }));
    let parts = gpu.allocate(PARTS * size_of::<f64>());
    let grid = Grid { blocks: (PARTS as u32, 1, 1), threads: 256, shared: 0 };
    launch!(gpu, &SOURCE, "products", grid, product.ptr(), e, errors.len() as u64, parts.ptr());
    let mut sums = vec![0.0f64; PARTS];
    gpu.read(&parts, 0, &mut sums);
    sums.iter().sum()
}
