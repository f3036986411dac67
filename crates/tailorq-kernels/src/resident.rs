//! The operations on whole matrices, for devices with a memory of their own.
//!
//! [`Device`] works on slices in memory. A device whose memory is elsewhere would carry every operand back and forth; it
//! implements [`Resident`] as well, whose operands are matrices that stay where they are ([`tailorq_tensor::Matrix`]). The
//! methods of `dyn Device` whose names end in `_matrix` choose: callers need not know which kind they work with. What each
//! operation computes is said once, in [`Device`].

use crate::{
    AttentionShape, AttentionSpan, Device, GradientSums, Heads, HeadsMut, KeyValues, KvBlock, LogSumExp,
    NotPositiveDefinite, RopeTable,
};
use std::ops::Range;
use tailorq_tensor::{DType, InputTransform, Matrix, Weight};

/// See the module. Matrices are `[rows, width]`; shapes are those of the methods of [`Device`] of the same names.
pub trait Resident: Send + Sync {
    /// Bytes that matrices may take on the device, what they take now not counted.
    fn room(&self) -> usize;
    /// The elements of a weight, exactly.
    fn dense(&self, w: &Weight) -> Matrix;
    /// Takes a copy of `x` off the device, rounded to half precision row by row ([`PutAway`]), while work goes on; `None` when
    /// there is no room for it.
    fn put_away(&self, x: &Matrix) -> Option<Box<dyn PutAway>>;
    /// A copy on this device of a matrix that may lie on another device of its kind, or in memory.
    fn bring(&self, x: &Matrix) -> Matrix;
    /// Every row becomes [`InputTransform::forward`] of it, in the same bits.
    fn rotate_rows(&self, x: &mut Matrix, transform: &InputTransform);
    /// A square matrix becomes its transpose.
    fn transpose(&self, x: &mut Matrix);
    /// What is above the diagonal of a square matrix becomes what is below it.
    fn complete_upper(&self, x: &mut Matrix);
    /// The elements as little-endian bfloat16.
    fn encode_bf16(&self, x: &Matrix) -> Vec<u8>;
    /// Whether no element is infinite or NaN.
    fn is_finite(&self, x: &Matrix) -> bool;
    /// [`Device::embed`].
    fn embed(&self, ids: &[u32], table: &Weight) -> Matrix;
    /// [`Device::linear_rows`].
    fn linear(&self, x: &Matrix, w: &Weight, bias: Option<&[f32]>, rows: Range<usize>) -> Matrix;
    /// [`Device::rms_norm`]; the width of a row is that of `weight`, which divides that of `x`.
    fn rms_norm(&self, x: &Matrix, weight: &[f32], eps: f32) -> Matrix;
    /// [`Device::rope`], or its transpose.
    fn rope(&self, x: &mut Matrix, table: &RopeTable, positions: &[u32], transposed: bool);
    /// [`Device::attention`] of fresh sequences; queries, keys and values.
    fn attention(&self, shape: AttentionShape, heads: [&Matrix; 3], spans: &[Range<usize>]) -> Matrix;
    /// Adds the rows `spans[i]` of keys and values to the caches `blocks[i]`.
    fn push(&self, blocks: &mut [&mut KvBlock], keys: &Matrix, values: &Matrix, spans: &[Range<usize>]);
    /// [`Device::attention`] of rows whose keys and values were pushed last.
    fn attention_cached(
        &self,
        shape: AttentionShape,
        q: &Matrix,
        blocks: &[&KvBlock],
        spans: &[Range<usize>],
    ) -> Matrix;
    /// [`Device::swiglu`].
    fn swiglu(&self, gate: &mut Matrix, up: &Matrix);
    /// [`Device::add`].
    fn add(&self, x: &Matrix, y: &mut Matrix);
    /// [`Device::linear_backward_rows`].
    fn linear_backward(&self, dy: &Matrix, w: &Weight, rows: Range<usize>, dx: &mut Matrix);
    /// [`Device::weight_gradients`].
    fn weight_gradients(&self, dy: &Matrix, x: &Matrix, spans: &[Range<usize>], sums: GradientSums<'_>);
    /// [`Device::rms_norm_backward`].
    fn rms_norm_backward(&self, x: &Matrix, weight: &[f32], eps: f32, dy: &Matrix, dx: &mut Matrix);
    /// [`Device::attention_backward`]: the gradients of queries, keys and values; 0 in rows of no span.
    fn attention_backward(
        &self,
        shape: AttentionShape,
        heads: [&Matrix; 3],
        spans: &[Range<usize>],
        dy: &Matrix,
    ) -> [Matrix; 3];
    /// [`Device::swiglu_backward`].
    fn swiglu_backward(&self, dy: &Matrix, gate: &mut Matrix, up: &mut Matrix);
    /// [`Device::log_sum_exp`].
    fn log_sum_exp(&self, logits: &Matrix, sums: &mut [LogSumExp]);
    /// For every row its largest element, the first of equals.
    fn row_max(&self, x: &Matrix) -> Vec<(usize, f32)>;
    /// [`Device::softmax_weighted`].
    fn softmax_weighted(&self, weights: &[f32], log_sums: &[f64], logits: &mut Matrix);
    /// [`Device::divergence_backward`].
    fn divergence_backward(
        &self,
        weights: &[f32],
        reference: (&Matrix, &[f64]),
        logits: (&mut Matrix, &[f64]),
        divergences: &mut [f64],
    );
    /// [`Device::gram`].
    fn gram(&self, x: &Matrix, h: &mut Matrix);
    /// [`Device::inverse_cholesky_upper`].
    fn inverse_cholesky_upper(&self, h: &mut Matrix) -> Result<(), NotPositiveDefinite>;
    /// The elements at these rows and columns.
    fn pick(&self, x: &Matrix, at: &[(usize, usize)]) -> Vec<f32>;
    /// Adds to the elements at these rows and columns, no two of which are the same.
    fn add_at(&self, x: &mut Matrix, at: &[(usize, usize)], values: &[f32]);
    /// The chosen rows.
    fn rows(&self, x: &Matrix, rows: &[usize]) -> Matrix;
    /// `y[rows[i]] += x[i]`, in this order.
    fn add_rows(&self, x: &Matrix, rows: &[usize], y: &mut Matrix);
    /// Every row times its factor.
    fn scale_rows(&self, x: &Matrix, factors: &[f32]) -> Matrix;
    /// The sum of squares of every row, in f64.
    fn row_squares(&self, x: &Matrix) -> Vec<f64>;
    /// Adds the squares of every column to `sums`, in f64.
    fn column_squares(&self, x: &Matrix, sums: &mut [f64]);
}

/// A matrix in ordinary memory in half its bytes: elements keep 11 significant bits, down to 2^-28 of their row's largest.
pub trait PutAway: Send {
    /// Its elements on the device.
    fn bring_back(&self) -> Matrix;
}

/// Operations on matrices, wherever they are.
impl dyn Device + '_ {
    /// This device and its peers.
    pub fn group(&self) -> Vec<&dyn Device> {
        let peers = self.peers().iter().map(|peer| &**peer as &dyn Device);
        std::iter::once(self as &dyn Device).chain(peers).collect()
    }

    /// `y += x`, of which `x` was made by a peer.
    pub fn add_from_peer(&self, x: &Matrix, y: &mut Matrix) {
        match self.resident() {
            Some(resident) => resident.add(&resident.bring(x), y),
            None => self.add(x.data(), y.data_mut()),
        }
    }

    /// The elements of a weight, exactly.
    pub fn dense_matrix(&self, w: &Weight) -> Matrix {
        self.resident().map_or_else(|| w.to_matrix(), |resident| resident.dense(w))
    }

    /// The elements as little-endian bfloat16.
    pub fn encode_bf16(&self, x: &Matrix) -> Vec<u8> {
        self.resident().map_or_else(|| DType::BF16.encode(x.data()), |resident| resident.encode_bf16(x))
    }

    /// Whether no element is infinite or NaN.
    pub fn is_finite(&self, x: &Matrix) -> bool {
        let in_memory = || x.data().iter().all(|v| v.is_finite());
        self.resident().map_or_else(in_memory, |resident| resident.is_finite(x))
    }

    /// [`Device::embed`].
    pub fn embed_matrix(&self, ids: &[u32], table: &Weight) -> Matrix {
        if let Some(resident) = self.resident() {
            return resident.embed(ids, table);
        }
        let mut y = Matrix::zeros(ids.len(), table.cols());
        self.embed(ids, table, y.data_mut());
        y
    }

    /// [`Device::linear_rows`].
    pub fn linear_matrix(&self, x: &Matrix, w: &Weight, bias: Option<&[f32]>, rows: Range<usize>) -> Matrix {
        if let Some(resident) = self.resident() {
            return resident.linear(x, w, bias, rows);
        }
        let mut y = Matrix::zeros(x.rows(), rows.len());
        self.linear_rows(x.data(), w, bias, rows, y.data_mut());
        y
    }

    /// [`Device::rms_norm`], of heads when `weight` is shorter than a row.
    pub fn rms_norm_matrix(&self, x: &Matrix, weight: &[f32], eps: f32) -> Matrix {
        if let Some(resident) = self.resident() {
            return resident.rms_norm(x, weight, eps);
        }
        let mut y = Matrix::zeros(x.rows(), x.cols());
        self.rms_norm(x.data(), weight, eps, y.data_mut());
        y
    }

    /// [`Device::rope`].
    pub fn rope_matrix(&self, x: &mut Matrix, table: &RopeTable, positions: &[u32]) {
        match self.resident() {
            Some(resident) => resident.rope(x, table, positions, false),
            None => self.rope(x.data_mut(), table, positions),
        }
    }

    /// [`Device::rope_backward`].
    pub fn rope_backward_matrix(&self, dx: &mut Matrix, table: &RopeTable, positions: &[u32]) {
        match self.resident() {
            Some(resident) => resident.rope(dx, table, positions, true),
            None => self.rope_backward(dx.data_mut(), table, positions),
        }
    }

    /// [`Device::attention`] of fresh sequences: each sees its own rows of keys and values.
    pub fn attention_matrix(&self, shape: AttentionShape, [q, k, v]: [&Matrix; 3], spans: &[Range<usize>]) -> Matrix {
        if let Some(resident) = self.resident() {
            return resident.attention(shape, [q, k, v], spans);
        }
        let fresh = |rows: &Range<usize>| {
            let part = rows.start * k.cols()..rows.end * k.cols();
            let source = KeyValues::Rows { keys: &k.data()[part.clone()], values: &v.data()[part] };
            AttentionSpan { rows: rows.clone(), source, past: 0 }
        };
        let spans: Vec<_> = spans.iter().map(fresh).collect();
        let mut y = Matrix::zeros(q.rows(), q.cols());
        self.attention(shape, q.data(), &spans, y.data_mut());
        y
    }

    /// [`Device::swiglu`].
    pub fn swiglu_matrix(&self, gate: &mut Matrix, up: &Matrix) {
        match self.resident() {
            Some(resident) => resident.swiglu(gate, up),
            None => self.swiglu(gate.data_mut(), up.data()),
        }
    }

    /// [`Device::add`].
    pub fn add_matrix(&self, x: &Matrix, y: &mut Matrix) {
        match self.resident() {
            Some(resident) => resident.add(x, y),
            None => self.add(x.data(), y.data_mut()),
        }
    }

    /// [`Device::linear_backward_rows`].
    pub fn linear_backward_matrix(&self, dy: &Matrix, w: &Weight, rows: Range<usize>, dx: &mut Matrix) {
        match self.resident() {
            Some(resident) => resident.linear_backward(dy, w, rows, dx),
            None => self.linear_backward_rows(dy.data(), w, rows, dx.data_mut()),
        }
    }

    /// [`Device::weight_gradients`].
    pub fn weight_gradients_matrix(&self, dy: &Matrix, x: &Matrix, spans: &[Range<usize>], sums: GradientSums<'_>) {
        match self.resident() {
            Some(resident) => resident.weight_gradients(dy, x, spans, sums),
            None => self.weight_gradients(dy.data(), x.data(), spans, sums),
        }
    }

    /// [`Device::rms_norm_backward`].
    pub fn rms_norm_backward_matrix(&self, x: &Matrix, weight: &[f32], eps: f32, dy: &Matrix, dx: &mut Matrix) {
        match self.resident() {
            Some(resident) => resident.rms_norm_backward(x, weight, eps, dy, dx),
            None => self.rms_norm_backward(x.data(), weight, eps, dy.data(), dx.data_mut()),
        }
    }

    /// [`Device::attention_backward`]: gradients of queries, keys and values, 0 in rows of no span.
    pub fn attention_backward_matrix(
        &self,
        shape: AttentionShape,
        [q, k, v]: [&Matrix; 3],
        spans: &[Range<usize>],
        dy: &Matrix,
    ) -> [Matrix; 3] {
        if let Some(resident) = self.resident() {
            return resident.attention_backward(shape, [q, k, v], spans, dy);
        }
        let mut gradients = [q, k, v].map(|m| Matrix::zeros(m.rows(), m.cols()));
        let [dq, dk, dv] = &mut gradients;
        let into = HeadsMut { q: dq.data_mut(), k: dk.data_mut(), v: dv.data_mut() };
        let heads = Heads { q: q.data(), k: k.data(), v: v.data() };
        self.attention_backward(shape, heads, spans, dy.data(), into);
        gradients
    }

    /// [`Device::swiglu_backward`].
    pub fn swiglu_backward_matrix(&self, dy: &Matrix, gate: &mut Matrix, up: &mut Matrix) {
        match self.resident() {
            Some(resident) => resident.swiglu_backward(dy, gate, up),
            None => self.swiglu_backward(dy.data(), gate.data_mut(), up.data_mut()),
        }
    }

    /// [`Device::log_sum_exp`].
    pub fn log_sum_exp_matrix(&self, logits: &Matrix, sums: &mut [LogSumExp]) {
        match self.resident() {
            Some(resident) => resident.log_sum_exp(logits, sums),
            None => self.log_sum_exp(logits.data(), sums),
        }
    }

    /// [`Device::softmax_weighted`].
    pub fn softmax_weighted_matrix(&self, weights: &[f32], log_sums: &[f64], logits: &mut Matrix) {
        match self.resident() {
            Some(resident) => resident.softmax_weighted(weights, log_sums, logits),
            None => self.softmax_weighted(weights, log_sums, logits.data_mut()),
        }
    }

    /// [`Device::divergence_backward`].
    pub fn divergence_backward_matrix(
        &self,
        weights: &[f32],
        (reference, reference_sums): (&Matrix, &[f64]),
        (logits, log_sums): (&mut Matrix, &[f64]),
        divergences: &mut [f64],
    ) {
        match self.resident() {
            Some(resident) => {
                resident.divergence_backward(weights, (reference, reference_sums), (logits, log_sums), divergences);
            }
            None => {
                let reference = (reference.data(), reference_sums);
                self.divergence_backward(weights, reference, (logits.data_mut(), log_sums), divergences);
            }
        }
    }

    /// [`Device::gram`].
    pub fn gram_matrix(&self, x: &Matrix, h: &mut Matrix) {
        match self.resident() {
            Some(resident) => resident.gram(x, h),
            None => self.gram(x.data(), h),
        }
    }

    /// The elements at these rows and columns.
    pub fn pick(&self, x: &Matrix, at: &[(usize, usize)]) -> Vec<f32> {
        match self.resident() {
            Some(resident) => resident.pick(x, at),
            None => at.iter().map(|&(r, c)| x.row(r)[c]).collect(),
        }
    }

    /// Adds to the elements at these rows and columns, no two of which are the same.
    pub fn add_at(&self, x: &mut Matrix, at: &[(usize, usize)], values: &[f32]) {
        match self.resident() {
            Some(resident) => resident.add_at(x, at, values),
            None => at.iter().zip(values).for_each(|(&(r, c), value)| x.row_mut(r)[c] += value),
        }
    }

    /// The chosen rows.
    pub fn rows(&self, x: &Matrix, rows: &[usize]) -> Matrix {
        if let Some(resident) = self.resident() {
            return resident.rows(x, rows);
        }
        let data = rows.iter().flat_map(|&r| x.row(r)).copied().collect();
        Matrix::from_vec(rows.len(), x.cols(), data)
    }

    /// `y[rows[i]] += x[i]`, in this order.
    pub fn add_rows(&self, x: &Matrix, rows: &[usize], y: &mut Matrix) {
        match self.resident() {
            Some(resident) => resident.add_rows(x, rows, y),
            None => rows.iter().enumerate().for_each(|(i, &r)| self.add(x.row(i), y.row_mut(r))),
        }
    }

    /// Every row times its factor.
    pub fn scale_rows(&self, x: &Matrix, factors: &[f32]) -> Matrix {
        assert_eq!(x.rows(), factors.len(), "scale_rows: one factor a row");
        if let Some(resident) = self.resident() {
            return resident.scale_rows(x, factors);
        }
        let mut scaled = x.clone();
        for (t, factor) in factors.iter().enumerate() {
            scaled.row_mut(t).iter_mut().for_each(|v| *v *= factor);
        }
        scaled
    }

    /// The sum of squares of every row, in f64.
    pub fn row_squares(&self, x: &Matrix) -> Vec<f64> {
        if let Some(resident) = self.resident() {
            return resident.row_squares(x);
        }
        (0..x.rows()).map(|r| x.row(r).iter().map(|&v| f64::from(v) * f64::from(v)).sum()).collect()
    }

    /// Adds the squares of every column to `sums`, in f64.
    pub fn column_squares(&self, x: &Matrix, sums: &mut [f64]) {
        assert_eq!(x.cols(), sums.len(), "column_squares: one sum a column");
        if let Some(resident) = self.resident() {
            return resident.column_squares(x, sums);
        }
        for t in 0..x.rows() {
            sums.iter_mut().zip(x.row(t)).for_each(|(sum, &v)| *sum += f64::from(v) * f64::from(v));
        }
    }
}
