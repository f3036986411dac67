//! One matrix times a few vectors, for tests and measurements.

use super::launch::Graph;
use super::layout::{CHUNK, DenseWeights};
use super::matrix::{DeviceMatrix, Fragments, Input, MOST_ROWS, Output};
use super::step;
use crate::error::CudaError;
use crate::gpu::{Buffer, Gpu};
use std::sync::Arc;
use tailorq_tensor::Weight;

/// A device on which products are to be tested or measured.
pub struct Products {
    gpu: Arc<Gpu>,
}

impl Products {
    /// On device number `gpu_ordinal`.
    ///
    /// # Errors
    /// When there is no such device.
    pub fn open(gpu_ordinal: usize) -> Result<Products, CudaError> {
        Ok(Products { gpu: Gpu::open(gpu_ordinal)? })
    }

    /// `weight` in `copies` places, for products with `n` vectors (1 to 8).
    ///
    /// # Errors
    /// When the kernels do not compute such products.
    pub fn of(&self, weight: &Weight, dense: DenseWeights, n: usize, copies: usize) -> Result<MatVec, CudaError> {
        MatVec::new(&self.gpu, weight, dense, n, copies)
    }
}

/// A weight on a device, several times over where its reading is to be measured, and the vectors that it meets.
pub struct MatVec {
    gpu: Arc<Gpu>,
    matrices: Vec<DeviceMatrix>,
    n: usize,
    x: Buffer,
    y: Buffer,
    plain: [Buffer; 2],
    rotated: [Buffer; 2],
    whole: Graph,
    products: Graph,
}

impl MatVec {
    fn new(gpu: &Arc<Gpu>, weight: &Weight, dense: DenseWeights, n: usize, copies: usize) -> Result<MatVec, CudaError> {
        if !(1..=MOST_ROWS).contains(&n) {
            return Err(CudaError::Unsupported { what: format!("products with {n} vectors") });
        }
        let first = DeviceMatrix::stacked(gpu, &[(weight, None)], dense)?;
        let mut matrices: Vec<_> = (1..copies).map(|_| first.duplicate()).collect();
        matrices.push(first);
        let cols = weight.cols();
        let padded = cols.next_multiple_of(CHUNK);
        let fragments = || [gpu.zeros(2 * n * padded), gpu.zeros(4 * n * padded / 8)];
        let (plain, rotated) = (fragments(), fragments());
        let (x, y) = (gpu.zeros(4 * n * cols), gpu.zeros(4 * n * weight.rows()));
        let of = |f: &[Buffer; 2]| Fragments { data: f[0].ptr(), sums: f[1].ptr() };
        let output = Output::Store { y: y.ptr(), stride: weight.rows() };
        let base = if matrices[0].is_rotated() { of(&rotated) } else { of(&plain) };
        let input = Input::Fragments { x: base, plain: of(&plain) };
        let product = |m: &DeviceMatrix| m.product(n, input, output);
        let mut launches = vec![step::arrange(gpu, n, cols, x.ptr(), 0, (of(&plain), 0))];
        launches.extend(matrices[0].rotation(n, x.ptr(), None, of(&rotated)));
        launches.push(product(&matrices[0]));
        let whole = Graph::new(gpu, launches, n == 1)?;
        let products = Graph::new(gpu, matrices.iter().map(product).collect(), n == 1)?;
        Ok(MatVec { gpu: gpu.clone(), matrices, n, x, y, plain, rotated, whole, products })
    }

    /// The products with `x`, `[n, cols]`: `[n, rows]`.
    pub fn apply(&mut self, x: &[f32]) -> Vec<f32> {
        let (rows, cols) = (self.matrices[0].rows(), self.matrices[0].cols());
        assert_eq!(x.len(), self.n * cols, "as many vectors as were promised");
        // What is not written shall not look like a result.
        self.gpu.write(&self.y, 0, &vec![f32::NAN; self.n * rows]);
        self.gpu.write(&self.x, 0, x);
        self.whole.launch();
        let mut y = vec![0.0; self.n * rows];
        self.gpu.read(&self.y, 0, &mut y);
        y
    }

    /// Bytes of one copy of the weight as the product reads them, and of the vectors.
    pub fn bytes(&self) -> usize {
        let x = if self.matrices[0].is_rotated() { &self.rotated } else { &self.plain };
        self.matrices[0].bytes() + x[0].bytes() + self.y.bytes()
    }

    /// Milliseconds of one product: all copies one after the other in a graph, `repetitions` times.
    pub fn milliseconds(&self, repetitions: usize) -> f32 {
        self.products.launch();
        let all = self.gpu.milliseconds(|| (0..repetitions).for_each(|_| self.products.launch()));
        all / (repetitions * self.matrices.len()) as f32
    }
}
