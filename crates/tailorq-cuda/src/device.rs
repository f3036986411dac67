//! The operations, on matrices that stay on the device and on slices that travel.

use crate::blas::{Blas, Element, Math, Operand, Product};
use crate::constants::Constants;
use crate::error::CudaError;
use crate::factor::{Solver, inverse_cholesky_upper};
use crate::gpu::{Buffer, Gpu, Grid, Source, launch};
use crate::matrices::Elements;
use crate::rotation;
use crate::staging::{self, Staging};
use crate::weights::Weights;
use rayon::prelude::*;
use std::fmt;
use std::ops::Range;
use std::str::FromStr;
use std::sync::Arc;
use tailorq_kernels::{
    AttentionShape, AttentionSpan, Device, GradientSums, Heads, HeadsMut, KeyValues, KvBlock, LogSumExp,
    NotPositiveDefinite, Part, PutAway, Resident, RopeTable, Strided, StridedMut,
};
use tailorq_tensor::{InputTransform, Matrix, Weight};

pub(crate) const SOURCE: Source = Source { name: "device", code: include_str!("kernels/device.cu") };

/// How matrix products are computed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Precision {
    /// In f32 throughout, as on the CPU.
    #[default]
    F32,
    /// Operands are rounded to 10 bits of mantissa for the tensor cores, sums are f32. Hessians are those of the rounded inputs:
    /// products of a matrix with its own transpose, and as definite as in f32.
    Tf32,
    /// Forward as [`Precision::Tf32`]; in the backward pass weights, activations and gradients that meet are rounded to bf16, sums are
    /// f32. (With a forward pass in bf16, too, norms of gradients were off by up to 3.5 %: the loss is taken of logits that are.)
    Bf16,
}

impl fmt::Display for Precision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Precision::F32 => "f32",
            Precision::Tf32 => "tf32",
            Precision::Bf16 => "bf16",
        })
    }
}

impl FromStr for Precision {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        match s {
            "f32" => Ok(Precision::F32),
            "tf32" => Ok(Precision::Tf32),
            "bf16" => Ok(Precision::Bf16),
            _ => Err(format!("there is no precision '{s}': use f32, tf32 or bf16")),
        }
    }
}

/// Settings of a device.
#[derive(Clone, Copy, Debug, Default)]
pub struct CudaOptions {
    /// How matrix products are computed.
    pub precision: Precision,
    /// Bytes of the device's memory that may be taken in all, as far as that is a choice: weights, activations that wait, and
    /// what is put away are fitted to it, but what one operation needs it takes. What is free when `None`.
    pub memory: Option<usize>,
    /// Bytes of ordinary memory for what does not fit the device; no bound when `None`.
    pub host_memory: Option<usize>,
}

/// An NVIDIA GPU.
pub(crate) struct Cuda {
    pub(crate) blas: Blas,
    pub(crate) math: Math,
    /// What operands of the backward pass are rounded to.
    backward: Element,
    precision: Precision,
    solver: Solver,
    weights: Weights,
    staging: Arc<Staging>,
    /// Bytes that buffers may take: the budget without what the driver and the libraries take for themselves.
    limit: usize,
    constants: Constants,
    /// See [`Device::peers`].
    pub(crate) peers: Vec<Arc<dyn Device>>,
    /// For what has no business on a GPU: small products on the calling thread.
    host: Arc<dyn Device>,
    /// Last, so that the libraries' handles go before the stream that they work on.
    pub(crate) gpu: Arc<Gpu>,
}

const FLOAT: usize = size_of::<f32>();

/// What the driver and the libraries take on a device for themselves, about.
const OVERHEAD: usize = 1 << 30;

/// Rows of a Hessian that are summed at a time.
const GRAM_PANEL: usize = 2048;

/// The kernels of all operations: what is wrong with them shows when the device is opened.
const OPERATIONS: &[&Source] = &[
    &SOURCE,
    &crate::attention::SOURCE,
    &crate::cached::SOURCE,
    &crate::factor::SOURCE,
    &crate::rotation::SOURCE,
    &crate::rounding::SOURCE,
    &staging::SOURCE,
];

/// As kernels take it.
fn int(n: usize) -> i32 {
    i32::try_from(n).expect("fewer than 2^31 elements in a row")
}

impl Cuda {
    pub(crate) fn open(ordinal: usize, options: CudaOptions) -> Result<Cuda, CudaError> {
        let gpu = Gpu::open(ordinal)?;
        gpu.load(OPERATIONS)?;
        let blas = Blas::new(&gpu).map_err(|error| CudaError::Driver { what: "start cuBLAS", error })?;
        let (backward, math) = match options.precision {
            Precision::F32 => (Element::F32, Math::F32),
            Precision::Tf32 => (Element::F32, Math::Tf32),
            Precision::Bf16 => (Element::Bf16, Math::Tf32),
        };
        let precision = options.precision;
        let limit = match options.memory {
            Some(all) => all - OVERHEAD.min(all / 2),
            None => gpu.memory().0,
        };
        if options.memory.is_some() {
            gpu.keep_at_most(limit);
        }
        let weights = Weights::new(limit);
        let staging = Staging::new(&gpu, options.host_memory.unwrap_or(usize::MAX));
        let (solver, constants, host) = (Solver::default(), Constants::default(), tailorq_kernels::cpu());
        Ok(Cuda {
            blas,
            math,
            backward,
            precision,
            solver,
            weights,
            staging,
            limit,
            constants,
            peers: Vec::new(),
            host,
            gpu,
        })
    }

    /// `x` as a matrix on the device.
    fn up(&self, x: &[f32], rows: usize, cols: usize) -> Matrix {
        let buffer = self.gpu.allocate(rows * cols * FLOAT);
        assert_eq!(x.len(), rows * cols, "a matrix is written whole");
        self.staging.upload(&buffer, 0, staging::bytes_of(x));
        Matrix::from_remote(rows, cols, Arc::new(Elements(buffer)))
    }

    /// The elements as products of the backward pass take them, and what holds them meanwhile.
    fn backward_operand(&self, x: u64, n: usize) -> (u64, Option<Buffer>) {
        match self.backward {
            Element::F32 => (x, None),
            Element::Bf16 => {
                let rounded = self.gpu.allocate(n * 2);
                launch!(self.gpu, &SOURCE, "to_bf16", Grid::elements(n), x, rounded.ptr(), n as u64);
                (rounded.ptr(), Some(rounded))
            }
        }
    }

    /// Rows of a weight.
    fn weight_rows(&self, w: &Weight, rows: &Range<usize>) -> (Arc<Buffer>, u64) {
        assert!(rows.start <= rows.end && rows.end <= w.rows(), "linear: rows {rows:?} of {w:?}");
        let buffer = self.weights.get(&self.staging, &self.gpu, w);
        let at = buffer.ptr() + (rows.start * w.cols() * FLOAT) as u64;
        (buffer, at)
    }

    fn backward_product(&self, m: usize, n: usize, k: usize) -> Product {
        Product { element: self.backward, ..Product::f32(m, n, k, self.math) }
    }

    /// `H += X^T X` on the lower triangle, of `X` rounded to what the tensor cores read, so that products are exact and only their
    /// sums are rounded, as in f32. Panels of rows: the part left of the diagonal block in place, that block by way of a square of
    /// its own, whose upper triangle is dropped.
    fn gram_of_rounded(&self, x: u64, n: usize, cols: usize, h: u64) {
        if n == 0 || cols == 0 {
            return;
        }
        let rounded = self.gpu.allocate(n * cols * FLOAT);
        let grid = Grid::elements(n * cols);
        launch!(self.gpu, &staging::SOURCE, "to_tf32", grid, x, rounded.ptr(), (n * cols) as u64);
        let columns = |first: usize| Operand::new(rounded.ptr() + (first * FLOAT) as u64, cols);
        let place = |r: usize, c: usize| h + ((r * cols + c) * FLOAT) as u64;
        let square = self.gpu.allocate(GRAM_PANEL.min(cols).pow(2) * FLOAT);
        for first in (0..cols).step_by(GRAM_PANEL) {
            let width = GRAM_PANEL.min(cols - first);
            let left = Product { beta: 1.0, ..Product::f32(width, first, n, Math::Tf32) };
            self.blas.product(&self.gpu, left, columns(first).t(), columns(0), Operand::new(place(first, 0), cols));
            let own = Product::f32(width, width, n, Math::Tf32);
            self.blas.product(&self.gpu, own, columns(first).t(), columns(first), Operand::new(square.ptr(), width));
            let (from, to, grid) = (square.ptr(), place(first, first), Grid::elements(width * width));
            launch!(self.gpu, &staging::SOURCE, "add_lower", grid, from, to, int(width), cols as u64);
        }
    }

    fn places(&self, places: impl Iterator<Item = usize>) -> Buffer {
        self.gpu.upload(&places.map(|p| p as u64).collect::<Vec<_>>())
    }

    /// Of each row the largest element, where it is, and the sum of exponentials relative to it.
    fn summaries(&self, x: &Matrix) -> (Vec<f32>, Vec<u32>, Vec<f64>) {
        let n = x.rows();
        let (mut max, mut best, mut sums) = (vec![0.0f32; n], vec![0u32; n], vec![0.0f64; n]);
        let out = self.gpu.allocate(n * 16);
        let (at_sums, at_max, at_best) = (0, n * 8, n * 12);
        let place = |at: usize| out.ptr() + at as u64;
        let grid = Grid::rows(n, 256);
        let (values, width) = (self.gpu.address(x), int(x.cols()));
        launch!(self.gpu, &SOURCE, "row_summary", grid, values, width, place(at_max), place(at_best), place(at_sums));
        self.gpu.read(&out, at_max, &mut max);
        self.gpu.read(&out, at_best, &mut best);
        self.gpu.read(&out, at_sums, &mut sums);
        (max, best, sums)
    }
}

impl Resident for Cuda {
    fn room(&self) -> usize {
        self.limit.saturating_sub(self.gpu.held()) / 2
    }

    fn dense(&self, w: &Weight) -> Matrix {
        let buffer = self.weights.get(&self.staging, &self.gpu, w).duplicate();
        Matrix::from_remote(w.rows(), w.cols(), Arc::new(Elements(buffer)))
    }

    fn put_away(&self, x: &Matrix) -> Option<Box<dyn PutAway>> {
        self.staging.put_away(x).map(|away| Box::new(away) as Box<dyn PutAway>)
    }

    fn bring(&self, x: &Matrix) -> Matrix {
        self.gpu.bring(x)
    }

    fn rotate_rows(&self, x: &mut Matrix, transform: &InputTransform) {
        let signs = self.constants.get(&self.gpu, transform.signs());
        rotation::rotate_rows(&self.gpu, signs.ptr(), x, transform);
    }

    fn transpose(&self, x: &mut Matrix) {
        rotation::mirror(&self.gpu, x, true);
    }

    fn complete_upper(&self, x: &mut Matrix) {
        rotation::mirror(&self.gpu, x, false);
    }

    fn encode_bf16(&self, x: &Matrix) -> Vec<u8> {
        let (n, from) = (x.len(), self.gpu.address(x));
        let rounded = self.gpu.allocate(n * 2);
        launch!(self.gpu, &SOURCE, "to_bf16", Grid::elements(n), from, rounded.ptr(), n as u64);
        let mut bytes = vec![0u8; n * 2];
        self.staging.download(&rounded, 0, &mut bytes);
        bytes
    }

    fn is_finite(&self, x: &Matrix) -> bool {
        let (n, count) = (x.len(), self.gpu.zeros(size_of::<u32>()));
        let grid = Grid::elements(n);
        launch!(self.gpu, &staging::SOURCE, "count_not_finite", grid, self.gpu.address(x), n as u64, count.ptr());
        let mut found = [0u32];
        self.gpu.read(&count, 0, &mut found);
        found == [0]
    }

    fn embed(&self, ids: &[u32], table: &Weight) -> Matrix {
        let cols = table.cols();
        let mut rows = vec![0.0; ids.len() * cols];
        let reader = table.reader();
        rows.par_chunks_mut(cols.max(1)).zip(ids).for_each(|(row, &id)| reader.read_rows(id as usize, row));
        self.up(&rows, ids.len(), cols)
    }

    fn linear(&self, x: &Matrix, w: &Weight, bias: Option<&[f32]>, rows: Range<usize>) -> Matrix {
        assert_eq!(x.cols(), w.cols(), "linear: x is [n, {}]", w.cols());
        let n_out = rows.len();
        if w.cols() == 0 || x.rows() == 0 || n_out == 0 {
            let mut y = Matrix::zeros(x.rows(), n_out);
            if let Some(bias) = bias.filter(|_| n_out > 0) {
                y.data_mut().chunks_exact_mut(n_out).for_each(|row| row.copy_from_slice(&bias[rows.clone()]));
            }
            return y;
        }
        let (y, at) = self.gpu.matrix(x.rows(), n_out);
        let (_kept, weight) = self.weight_rows(w, &rows);
        let job = Product::f32(x.rows(), n_out, w.cols(), self.math);
        let (input, weight) = (Operand::new(self.gpu.address(x), x.cols()), Operand::new(weight, w.cols()).t());
        self.blas.product(&self.gpu, job, input, weight, Operand::new(at, n_out));
        if let Some(bias) = bias {
            let bias = self.constants.get(&self.gpu, &bias[rows]);
            let n = y.len();
            launch!(self.gpu, &SOURCE, "add_bias", Grid::elements(n), at, bias.ptr(), n as u64, int(n_out));
        }
        y
    }

    fn rms_norm(&self, x: &Matrix, weight: &[f32], eps: f32) -> Matrix {
        let (y, at) = self.gpu.matrix(x.rows(), x.cols());
        let width = weight.len().max(1);
        let (w, from) = (self.constants.get(&self.gpu, weight), self.gpu.address(x));
        let grid = Grid::rows(x.len() / width, threads_for(width));
        launch!(self.gpu, &SOURCE, "rms_norm", grid, from, w.ptr(), at, int(width), eps);
        y
    }

    fn rope(&self, x: &mut Matrix, table: &RopeTable, positions: &[u32], transposed: bool) {
        let half = table.half;
        if x.is_empty() {
            return;
        }
        assert!(
            positions.iter().all(|&p| (p as usize + 1) * half <= table.cos.len()),
            "rope: a position beyond the table"
        );
        let [cos, sin] = [&table.cos, &table.sin].map(|angles| self.constants.get(&self.gpu, angles));
        let places = self.gpu.upload(positions);
        let (n, heads) = (x.len() / 2, int(x.cols() / (2 * half)));
        let at = self.gpu.address_mut(x);
        let sign = if transposed { -1.0f32 } else { 1.0 };
        let grid = Grid::elements(n);
        let angles = (cos.ptr(), sin.ptr(), places.ptr());
        launch!(self.gpu, &SOURCE, "rope", grid, at, angles.0, angles.1, angles.2, n as u64, heads, int(half), sign);
    }

    fn attention(&self, shape: AttentionShape, heads: [&Matrix; 3], spans: &[Range<usize>]) -> Matrix {
        self.attention_fresh(shape, heads, spans)
    }

    fn push(&self, blocks: &mut [&mut KvBlock], keys: &Matrix, values: &Matrix, spans: &[Range<usize>]) {
        self.push_cached(blocks, keys, values, spans);
    }

    fn attention_cached(
        &self,
        shape: AttentionShape,
        q: &Matrix,
        blocks: &[&KvBlock],
        spans: &[Range<usize>],
    ) -> Matrix {
        self.attention_after(shape, q, blocks, spans)
    }

    fn swiglu(&self, gate: &mut Matrix, up: &Matrix) {
        assert_eq!(gate.len(), up.len(), "swiglu: gate and up have the same shape");
        let (n, at) = (gate.len(), self.gpu.address_mut(gate));
        launch!(self.gpu, &SOURCE, "swiglu", Grid::elements(n), at, self.gpu.address(up), n as u64);
    }

    fn add(&self, x: &Matrix, y: &mut Matrix) {
        assert_eq!(x.len(), y.len(), "add: x and y have the same shape");
        let (n, at) = (y.len(), self.gpu.address_mut(y));
        launch!(self.gpu, &SOURCE, "add", Grid::elements(n), self.gpu.address(x), at, n as u64);
    }

    fn linear_backward(&self, dy: &Matrix, w: &Weight, rows: Range<usize>, dx: &mut Matrix) {
        assert_eq!((dy.cols(), dx.cols(), dy.rows()), (rows.len(), w.cols(), dx.rows()), "linear_backward: shapes");
        if dy.is_empty() || dx.is_empty() {
            return;
        }
        let (_kept, weight) = self.weight_rows(w, &rows);
        let (weight, _rounded) = self.backward_operand(weight, rows.len() * w.cols());
        let (gradient, _rounded_too) = self.backward_operand(self.gpu.address(dy), dy.len());
        let job = Product { beta: 1.0, ..self.backward_product(dy.rows(), w.cols(), rows.len()) };
        let c = Operand::new(self.gpu.address_mut(dx), w.cols());
        self.blas.product(&self.gpu, job, Operand::new(gradient, rows.len()), Operand::new(weight, w.cols()), c);
    }

    fn weight_gradients(&self, dy: &Matrix, x: &Matrix, spans: &[Range<usize>], sums: GradientSums<'_>) {
        let GradientSums { sum, absolute, square } = sums;
        let (rows, cols) = (dy.cols(), x.cols());
        assert_eq!(dy.rows(), x.rows(), "weight_gradients: as many gradients as inputs");
        assert!(spans.iter().all(|s| s.end <= x.rows()), "weight_gradients: a span ends after the last row");
        let is_alone = absolute.is_none() && square.is_none();
        let [sum, absolute, square] = [sum, absolute, square].map(|m| m.map_or(0, |m| self.gpu.address_mut(m)));
        if rows * cols == 0 || [sum, absolute, square] == [0; 3] {
            return;
        }
        let size = self.backward.size();
        let (dy_at, _rounded) = self.backward_operand(self.gpu.address(dy), dy.len());
        let (x_at, _rounded_too) = self.backward_operand(self.gpu.address(x), x.len());
        let of_span = |span: &Range<usize>, beta: f32, into: u64| {
            let job = Product { beta, ..self.backward_product(rows, cols, span.len()) };
            let dy = Operand::new(dy_at + (span.start * rows * size) as u64, rows).t();
            let x = Operand::new(x_at + (span.start * cols * size) as u64, cols);
            self.blas.product(&self.gpu, job, dy, x, Operand::new(into, cols));
        };
        let spans = spans.iter().filter(|s| !s.is_empty());
        if is_alone {
            spans.for_each(|span| of_span(span, 1.0, sum));
            return;
        }
        let n = rows * cols;
        let gradient = self.gpu.allocate(n * FLOAT);
        for span in spans {
            of_span(span, 0.0, gradient.ptr());
            let grid = Grid::elements(n);
            launch!(self.gpu, &SOURCE, "take_gradient", grid, gradient.ptr(), sum, absolute, square, n as u64);
        }
    }

    fn rms_norm_backward(&self, x: &Matrix, weight: &[f32], eps: f32, dy: &Matrix, dx: &mut Matrix) {
        let width = weight.len().max(1);
        let (w, x_at, dy_at) = (self.constants.get(&self.gpu, weight), self.gpu.address(x), self.gpu.address(dy));
        let dx_at = self.gpu.address_mut(dx);
        let grid = Grid::rows(x.len() / width, threads_for(width));
        launch!(self.gpu, &SOURCE, "rms_norm_backward", grid, x_at, w.ptr(), dy_at, dx_at, int(width), eps);
    }

    fn attention_backward(
        &self,
        shape: AttentionShape,
        heads: [&Matrix; 3],
        spans: &[Range<usize>],
        dy: &Matrix,
    ) -> [Matrix; 3] {
        self.attention_fresh_backward(shape, heads, spans, dy)
    }

    fn swiglu_backward(&self, dy: &Matrix, gate: &mut Matrix, up: &mut Matrix) {
        let n = dy.len();
        assert!(n == gate.len() && n == up.len(), "swiglu_backward: dy, gate and up have the same shape");
        let (dy, gate, up) = (self.gpu.address(dy), self.gpu.address_mut(gate), self.gpu.address_mut(up));
        launch!(self.gpu, &SOURCE, "swiglu_backward", Grid::elements(n), dy, gate, up, n as u64);
    }

    fn log_sum_exp(&self, logits: &Matrix, sums: &mut [LogSumExp]) {
        assert_eq!(logits.rows(), sums.len(), "log_sum_exp: one sum a row");
        if logits.is_empty() {
            return;
        }
        let (max, _, partial) = self.summaries(logits);
        sums.iter_mut().zip(max).zip(partial).for_each(|((sum, max), partial)| sum.merge(max, partial));
    }

    fn row_max(&self, x: &Matrix) -> Vec<(usize, f32)> {
        let (max, best, _) = self.summaries(x);
        best.into_iter().map(|b| b as usize).zip(max).collect()
    }

    fn softmax_weighted(&self, weights: &[f32], log_sums: &[f64], logits: &mut Matrix) {
        assert!(weights.len() == logits.rows() && log_sums.len() == logits.rows(), "softmax_weighted: one a row");
        let (weights, log_sums) = (self.gpu.upload(weights), self.gpu.upload(log_sums));
        let (n, width, at) = (logits.len(), int(logits.cols()), self.gpu.address_mut(logits));
        let grid = Grid::elements(n);
        launch!(self.gpu, &SOURCE, "softmax_weighted", grid, at, weights.ptr(), log_sums.ptr(), n as u64, width);
    }

    fn divergence_backward(
        &self,
        weights: &[f32],
        (reference, reference_sums): (&Matrix, &[f64]),
        (logits, log_sums): (&mut Matrix, &[f64]),
        divergences: &mut [f64],
    ) {
        let n = logits.rows();
        assert_eq!((reference.rows(), reference.cols()), (n, logits.cols()), "divergence: logits of the same shape");
        assert!(
            [weights.len(), reference_sums.len(), log_sums.len(), divergences.len()] == [n; 4],
            "one of each a row"
        );
        if logits.is_empty() {
            return;
        }
        let weights = self.gpu.upload(weights);
        let (reference_sums, log_sums) = (self.gpu.upload(reference_sums), self.gpu.upload(log_sums));
        let out = self.gpu.allocate(n * size_of::<f64>());
        let (width, theirs, ours) = (int(logits.cols()), self.gpu.address(reference), self.gpu.address_mut(logits));
        launch!(
            self.gpu,
            &SOURCE,
            "divergence_backward",
            Grid::rows(n, 256),
            theirs,
            reference_sums.ptr(),
            ours,
            log_sums.ptr(),
            weights.ptr(),
            out.ptr(),
            width
        );
        let mut of_chunk = vec![0.0f64; n];
        self.gpu.read(&out, 0, &mut of_chunk);
        divergences.iter_mut().zip(of_chunk).for_each(|(sum, d)| *sum += d);
    }

    fn gram(&self, x: &Matrix, h: &mut Matrix) {
        assert_eq!((h.rows(), x.cols()), (h.cols(), h.cols()), "gram: x is [n, {}]", h.cols());
        let (at, from) = (self.gpu.address_mut(h), self.gpu.address(x));
        match self.math {
            Math::F32 => self.blas.gram(&self.gpu, from, x.rows(), h.cols(), at),
            Math::Tf32 => self.gram_of_rounded(from, x.rows(), h.cols(), at),
        }
    }

    fn inverse_cholesky_upper(&self, h: &mut Matrix) -> Result<(), NotPositiveDefinite> {
        let n = h.rows();
        assert_eq!(h.cols(), n, "inverse_cholesky_upper: H is square");
        inverse_cholesky_upper(&self.gpu, (&self.blas, &self.solver), self.gpu.address_mut(h), n)
    }

    fn pick(&self, x: &Matrix, at: &[(usize, usize)]) -> Vec<f32> {
        let mut values = vec![0.0; at.len()];
        if at.is_empty() {
            return values;
        }
        let places = self.places(at.iter().map(|&(r, c)| r * x.cols() + c));
        let (out, n) = (self.gpu.allocate(at.len() * FLOAT), at.len());
        let grid = Grid::elements(n);
        launch!(self.gpu, &SOURCE, "pick", grid, self.gpu.address(x), places.ptr(), out.ptr(), n as u64);
        self.gpu.read(&out, 0, &mut values);
        values
    }

    fn add_at(&self, x: &mut Matrix, at: &[(usize, usize)], values: &[f32]) {
        assert_eq!(at.len(), values.len(), "add_at: one value a place");
        let places = self.places(at.iter().map(|&(r, c)| r * x.cols() + c));
        let (values, n, x) = (self.gpu.upload(values), at.len(), self.gpu.address_mut(x));
        launch!(self.gpu, &SOURCE, "add_at", Grid::elements(n), x, places.ptr(), values.ptr(), n as u64);
    }

    fn rows(&self, x: &Matrix, rows: &[usize]) -> Matrix {
        let (y, at) = self.gpu.matrix(rows.len(), x.cols());
        assert!(rows.iter().all(|&r| r < x.rows()), "rows: one is not below {}", x.rows());
        let (places, n, from) = (self.places(rows.iter().copied()), y.len(), self.gpu.address(x));
        launch!(self.gpu, &SOURCE, "gather_rows", Grid::elements(n), from, places.ptr(), at, n as u64, int(x.cols()));
        y
    }

    fn add_rows(&self, x: &Matrix, rows: &[usize], y: &mut Matrix) {
        assert_eq!((x.rows(), x.cols()), (rows.len(), y.cols()), "add_rows: one place a row");
        assert!(rows.iter().all(|&r| r < y.rows()), "add_rows: a row is not below {}", y.rows());
        let (places, from, at) = (self.places(rows.iter().copied()), self.gpu.address(x), self.gpu.address_mut(y));
        let grid = Grid::elements(x.cols());
        launch!(self.gpu, &SOURCE, "add_rows", grid, from, places.ptr(), at, int(rows.len()), int(x.cols()));
    }

    fn scale_rows(&self, x: &Matrix, factors: &[f32]) -> Matrix {
        let (y, at) = self.gpu.matrix(x.rows(), x.cols());
        let (factors, n, from) = (self.gpu.upload(factors), x.len(), self.gpu.address(x));
        launch!(self.gpu, &SOURCE, "scale_rows", Grid::elements(n), from, factors.ptr(), at, n as u64, int(x.cols()));
        y
    }

    fn row_squares(&self, x: &Matrix) -> Vec<f64> {
        let mut sums = vec![0.0f64; x.rows()];
        let out = self.gpu.allocate(size_of_val(&sums[..]));
        let (grid, from) = (Grid::rows(x.rows(), 128), self.gpu.address(x));
        launch!(self.gpu, &SOURCE, "row_squares", grid, from, out.ptr(), int(x.cols()));
        self.gpu.read(&out, 0, &mut sums);
        sums
    }

    fn column_squares(&self, x: &Matrix, sums: &mut [f64]) {
        let mut of_x = vec![0.0f64; x.cols()];
        let out = self.gpu.allocate(size_of_val(&of_x[..]));
        let grid = Grid { blocks: (x.cols().div_ceil(32) as u32, 1, 1), threads: 1024, shared: 0 };
        let from = self.gpu.address(x);
        launch!(self.gpu, &SOURCE, "column_squares", grid, from, out.ptr(), int(x.rows()), int(x.cols()));
        self.gpu.read(&out, 0, &mut of_x);
        sums.iter_mut().zip(of_x).for_each(|(sum, s)| *sum += s);
    }
}

/// Threads for rows of this width.
fn threads_for(width: usize) -> u32 {
    if width <= 256 { 64 } else { 256 }
}

mod slices;
