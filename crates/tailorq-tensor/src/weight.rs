//! A weight of the model, wherever it lies: dense in a file, in blocks of a file, in memory, or packed.

use crate::{DType, Matrix, PackedMatrix, SharedBytes};
use std::fmt;
use std::sync::Arc;

/// A `[rows, cols]` matrix whose rows can be read as f32, exactly as stored.
///
/// File formats implement this for their own encodings, so that a weight stays in its memory map until a kernel wants
/// a panel of it. Reading is pure: any thread may read any rows at any time.
pub trait ReadRows: Send + Sync {
    /// Outputs.
    fn rows(&self) -> usize;
    /// Inputs.
    fn cols(&self) -> usize;
    /// Bytes as stored.
    fn bytes(&self) -> usize;
    /// Reads `out.len() / cols` rows from row `first` on. `out` holds whole rows.
    fn read_rows(&self, first: usize, out: &mut [f32]);
    /// The elements as they lie in a file, row by row, when they do so without a gap.
    fn dense(&self) -> Option<(DType, &[u8])> {
        None
    }
    /// How the elements are stored, for people: `BF16`, `Q4_1`, `2-bit affine, group 128`.
    fn encoding(&self) -> String {
        format!("{:.2}-bit", self.bytes() as f64 * 8.0 / (self.rows() * self.cols()).max(1) as f64)
    }
}

impl ReadRows for Matrix {
    fn rows(&self) -> usize {
        Matrix::rows(self)
    }
    fn cols(&self) -> usize {
        Matrix::cols(self)
    }
    fn bytes(&self) -> usize {
        self.data().len() * 4
    }
    fn read_rows(&self, first: usize, out: &mut [f32]) {
        let at = first * Matrix::cols(self);
        out.copy_from_slice(&self.data()[at..at + out.len()]);
    }
    fn encoding(&self) -> String {
        DType::F32.to_string()
    }
}

/// A dense matrix in little-endian bytes (a tensor of a safetensors file).
#[derive(Clone, Debug)]
pub struct DenseRows {
    rows: usize,
    cols: usize,
    dtype: DType,
    bytes: SharedBytes,
}

impl DenseRows {
    /// `None` when `bytes` does not hold `rows * cols` elements.
    pub fn new(rows: usize, cols: usize, dtype: DType, bytes: SharedBytes) -> Option<Self> {
        let expected = rows.checked_mul(cols)?.checked_mul(dtype.size())?;
        (bytes.len() == expected).then_some(DenseRows { rows, cols, dtype, bytes })
    }

    /// Element type as stored.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// The elements, row by row.
    pub fn data(&self) -> &SharedBytes {
        &self.bytes
    }
}

impl ReadRows for DenseRows {
    fn rows(&self) -> usize {
        self.rows
    }
    fn cols(&self) -> usize {
        self.cols
    }
    fn bytes(&self) -> usize {
        self.bytes.len()
    }
    fn read_rows(&self, first: usize, out: &mut [f32]) {
        let size = self.dtype.size();
        let at = first * self.cols * size;
        self.dtype.decode(&self.bytes[at..at + out.len() * size], out);
    }
    fn dense(&self) -> Option<(DType, &[u8])> {
        Some((self.dtype, &self.bytes))
    }
    fn encoding(&self) -> String {
        self.dtype.to_string()
    }
}

/// The rows of another matrix in another order: row `r` is row `order[r]` of `inner`.
///
/// llama GGUF files store q and k with rows permuted for interleaved rotary embedding; this reads them back in
/// checkpoint order without a copy.
pub struct RowOrder {
    inner: Arc<dyn ReadRows>,
    order: Vec<u32>,
}

impl RowOrder {
    /// Panics when `order` is longer than `inner` has rows or names a row that does not exist.
    pub fn new(inner: Arc<dyn ReadRows>, order: Vec<u32>) -> Self {
        assert!(
            order.len() <= inner.rows() && order.iter().all(|&r| (r as usize) < inner.rows()),
            "row order out of range"
        );
        RowOrder { inner, order }
    }
}

impl ReadRows for RowOrder {
    fn rows(&self) -> usize {
        self.order.len()
    }
    fn cols(&self) -> usize {
        self.inner.cols()
    }
    fn bytes(&self) -> usize {
        self.inner.bytes()
    }
    fn read_rows(&self, first: usize, out: &mut [f32]) {
        for (i, row) in out.chunks_exact_mut(self.cols().max(1)).enumerate() {
            self.inner.read_rows(self.order[first + i] as usize, row);
        }
    }
    fn encoding(&self) -> String {
        self.inner.encoding()
    }
}

/// A weight matrix `[rows, cols]`; cheap to clone.
#[derive(Clone)]
pub enum Weight {
    /// As a file stores it (dense, GGUF blocks), read panel by panel.
    Stored(Arc<dyn ReadRows>),
    /// f32 in memory.
    Dense(Arc<Matrix>),
    /// Quantized.
    Packed(Arc<PackedMatrix>),
}

impl Weight {
    /// The rows, whatever the storage.
    pub fn reader(&self) -> &dyn ReadRows {
        match self {
            Weight::Stored(w) => w.as_ref(),
            Weight::Dense(w) => w.as_ref(),
            Weight::Packed(w) => w.as_ref(),
        }
    }

    /// Outputs.
    pub fn rows(&self) -> usize {
        self.reader().rows()
    }

    /// Inputs.
    pub fn cols(&self) -> usize {
        self.reader().cols()
    }

    /// The whole matrix as f32.
    pub fn to_matrix(&self) -> Matrix {
        let mut m = Matrix::zeros(self.rows(), self.cols());
        self.reader().read_rows(0, m.data_mut());
        m
    }
}

impl From<Matrix> for Weight {
    fn from(m: Matrix) -> Self {
        Weight::Dense(Arc::new(m))
    }
}

impl From<PackedMatrix> for Weight {
    fn from(m: PackedMatrix) -> Self {
        Weight::Packed(Arc::new(m))
    }
}

impl fmt::Debug for Weight {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self {
            Weight::Stored(_) => "Stored",
            Weight::Dense(_) => "Dense",
            Weight::Packed(_) => "Packed",
        };
        write!(f, "{kind}[{}, {}]", self.rows(), self.cols())
    }
}
