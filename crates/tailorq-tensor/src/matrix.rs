//! An owned dense f32 matrix, in memory or on a device.

use std::any::Any;
use std::fmt;
use std::sync::{Arc, OnceLock};

/// Elements that lie in the memory of some device.
pub trait Remote: Send + Sync {
    /// Reads all elements, row by row.
    fn read(&self, out: &mut [f32]);
    /// For the device that made it.
    fn as_any(&self) -> &dyn Any;
}

/// `[rows, cols]` row-major f32.
///
/// A matrix is in memory, on a device, or the same on both. Whoever asks for its elements gets them, and they are brought
/// into memory when they are not there; whoever changes them in memory ([`Matrix::data_mut`]) makes the device's copy void.
/// So code that works on elements need not know of devices, and operations of one leave their results where they are.
pub struct Matrix {
    rows: usize,
    cols: usize,
    /// Where neither is there, all elements are 0.
    host: OnceLock<Vec<f32>>,
    remote: OnceLock<Arc<dyn Remote>>,
}

impl Matrix {
    /// All zeros; they take no memory before somebody looks at them.
    pub fn zeros(rows: usize, cols: usize) -> Self {
        Matrix { rows, cols, host: OnceLock::new(), remote: OnceLock::new() }
    }

    /// Takes `data` as `[rows, cols]`; panics when its length is not `rows * cols` (a programming error, not an input error).
    pub fn from_vec(rows: usize, cols: usize, data: Vec<f32>) -> Self {
        assert_eq!(data.len(), rows * cols, "matrix data does not fill [{rows}, {cols}]");
        Matrix { rows, cols, host: OnceLock::from(data), remote: OnceLock::new() }
    }

    /// A matrix whose elements are on a device.
    pub fn from_remote(rows: usize, cols: usize, remote: Arc<dyn Remote>) -> Self {
        Matrix { rows, cols, host: OnceLock::new(), remote: OnceLock::from(remote) }
    }

    /// Number of rows (tokens of activations, outputs of a weight).
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns (inputs).
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.rows * self.cols
    }

    /// Whether it has no element.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes of its elements, wherever they are.
    pub fn bytes(&self) -> usize {
        self.len() * size_of::<f32>()
    }

    /// Row `r`.
    pub fn row(&self, r: usize) -> &[f32] {
        &self.data()[r * self.cols..(r + 1) * self.cols]
    }

    /// Row `r`, mutable.
    pub fn row_mut(&mut self, r: usize) -> &mut [f32] {
        let cols = self.cols;
        &mut self.data_mut()[r * cols..(r + 1) * cols]
    }

    /// All elements, row by row.
    pub fn data(&self) -> &[f32] {
        self.host.get_or_init(|| {
            let mut data = vec![0.0; self.rows * self.cols];
            if let Some(remote) = self.remote.get() {
                remote.read(&mut data);
            }
            data
        })
    }

    /// All elements, mutable.
    pub fn data_mut(&mut self) -> &mut [f32] {
        self.data();
        self.remote.take();
        self.host.get_mut().expect("the elements were brought into memory above")
    }

    /// The elements as a vector.
    pub fn into_vec(self) -> Vec<f32> {
        self.data();
        self.host.into_inner().expect("the elements were brought into memory above")
    }

    /// The copy on a device, made with `upload` when there is none; that gets the elements, or nothing where all are 0.
    pub fn remote_or(&self, upload: impl FnOnce(Option<&[f32]>) -> Arc<dyn Remote>) -> &Arc<dyn Remote> {
        self.remote.get_or_init(|| upload(self.host.get().map(Vec::as_slice)))
    }

    /// The copy on a device, for an operation that changes it there: the elements in memory are given up. Made with
    /// `upload` when there is none.
    pub fn remote_mut(&mut self, upload: impl FnOnce(Option<&[f32]>) -> Arc<dyn Remote>) -> &mut Arc<dyn Remote> {
        self.remote_or(upload);
        self.host.take();
        self.remote.get_mut().expect("the copy was made above")
    }
}

impl Clone for Matrix {
    /// A copy of a matrix on a device shares what is there and has nothing in memory before somebody asks for it.
    fn clone(&self) -> Self {
        let host = if self.remote.get().is_some() { OnceLock::new() } else { self.host.clone() };
        Matrix { rows: self.rows, cols: self.cols, host, remote: self.remote.clone() }
    }
}

impl PartialEq for Matrix {
    fn eq(&self, other: &Self) -> bool {
        (self.rows, self.cols) == (other.rows, other.cols) && self.data() == other.data()
    }
}

impl fmt::Debug for Matrix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Matrix")
            .field("rows", &self.rows)
            .field("cols", &self.cols)
            .field("data", &self.data())
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    /// A device's memory, and how often it was read.
    struct Far(Mutex<(Vec<f32>, usize)>);

    impl Remote for Far {
        fn read(&self, out: &mut [f32]) {
            let mut far = self.0.lock().unwrap();
            far.1 += 1;
            out.copy_from_slice(&far.0);
        }
        fn as_any(&self) -> &dyn Any {
            self
        }
    }

    fn far(values: Vec<f32>) -> Arc<Far> {
        Arc::new(Far(Mutex::new((values, 0))))
    }

    #[test]
    fn elements_are_brought_once_and_changes_void_the_copy() {
        let device = far(vec![1.0, 2.0, 3.0, 4.0]);
        let mut m = Matrix::from_remote(2, 2, device.clone());
        assert_eq!((m.row(1), m.data()), (&[3.0, 4.0][..], &[1.0, 2.0, 3.0, 4.0][..]));
        assert_eq!(device.0.lock().unwrap().1, 1, "read once");
        m.data_mut()[0] = 9.0;
        let upload = |data: Option<&[f32]>| far(data.unwrap().to_vec()) as Arc<dyn Remote>;
        let fresh = m.remote_or(upload).clone();
        assert_eq!(fresh.as_any().downcast_ref::<Far>().unwrap().0.lock().unwrap().0, [9.0, 2.0, 3.0, 4.0]);
        let kept = m.clone();
        assert_eq!(fresh.as_any().downcast_ref::<Far>().unwrap().0.lock().unwrap().1, 0, "a clone reads nothing");
        *m.remote_mut(upload) = far(vec![7.0; 4]);
        assert_eq!((m.data(), kept.data()[0]), (&[7.0; 4][..], 9.0));
    }

    #[test]
    fn zeros_are_zeros_wherever_they_are_asked_for() {
        let mut m = Matrix::zeros(2, 3);
        assert!(matches!(
            m.remote_or(|data| {
                assert!(data.is_none());
                far(vec![0.0; 6])
            }),
            _
        ));
        assert_eq!(Matrix::zeros(2, 3).data(), [0.0; 6]);
        assert_eq!(Matrix::zeros(2, 3).into_vec(), [0.0; 6]);
        m.row_mut(1)[2] = 5.0;
        assert_eq!((m.data(), m == Matrix::zeros(2, 3)), (&[0.0, 0.0, 0.0, 0.0, 0.0, 5.0][..], false));
    }
}
