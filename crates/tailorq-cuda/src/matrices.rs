//! Matrices that lie on the device.

use crate::gpu::{Buffer, Gpu};
use std::any::Any;
use std::sync::Arc;
use tailorq_tensor::{Matrix, Remote};

/// Elements of a [`Matrix`] in f32, row by row.
#[derive(Debug)]
pub(crate) struct Elements(pub(crate) Buffer);

impl Remote for Elements {
    fn read(&self, out: &mut [f32]) {
        self.0.gpu().read(&self.0, 0, out);
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

fn buffer(remote: &Arc<dyn Remote>) -> &Buffer {
    &remote.as_any().downcast_ref::<Elements>().expect("one kind of device a process").0
}

impl Gpu {
    /// A matrix that holds whatever its memory held.
    pub(crate) fn matrix(self: &Arc<Self>, rows: usize, cols: usize) -> (Matrix, u64) {
        let elements = self.allocate(rows * cols * size_of::<f32>());
        let ptr = elements.ptr();
        (Matrix::from_remote(rows, cols, Arc::new(Elements(elements))), ptr)
    }

    /// `n` elements, zeros where there are none.
    fn elements(self: &Arc<Self>, data: Option<&[f32]>, n: usize) -> Arc<dyn Remote> {
        Arc::new(Elements(data.map_or_else(|| self.zeros(n * size_of::<f32>()), |data| self.upload(data))))
    }

    /// Where a matrix lies on the device; it is brought there when it is not.
    pub(crate) fn address(self: &Arc<Self>, m: &Matrix) -> u64 {
        self.own(buffer(m.remote_or(|data| self.elements(data, m.len())))).ptr()
    }

    fn own<'b>(&self, buffer: &'b Buffer) -> &'b Buffer {
        assert_eq!(self.ordinal(), buffer.gpu().ordinal(), "a matrix of another device is brought over first");
        buffer
    }

    /// The matrix on this device: itself, or a copy of what another device holds.
    pub(crate) fn bring(self: &Arc<Self>, m: &Matrix) -> Matrix {
        let from = buffer(m.remote_or(|data| self.elements(data, m.len())));
        if Arc::ptr_eq(from.gpu(), self) {
            return m.clone();
        }
        let (copy, to) = self.matrix(m.rows(), m.cols());
        self.receive(to, from.gpu(), from.ptr(), from.bytes());
        copy
    }

    /// The same for an operation that changes it: copies of the matrix keep what they have.
    pub(crate) fn address_mut(self: &Arc<Self>, m: &mut Matrix) -> u64 {
        let n = m.len();
        let remote = m.remote_mut(|data| self.elements(data, n));
        if Arc::get_mut(remote).is_none() {
            *remote = Arc::new(Elements(buffer(remote).duplicate()));
        }
        self.own(buffer(remote)).ptr()
    }
}
