//! Matrix products by cuBLAS, in the row-major words of the rest of the house.
//!
//! cuBLAS stores columns; a row-major matrix is the transpose of what it sees, and `C = A B` becomes `C^T = B^T A^T`: operands
//! change places and keep their marks of transposition.

use crate::gpu::Gpu;
use cudarc::cublas::{result, sys};
use std::ffi::c_void;
use std::sync::Mutex;

/// What elements are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Element {
    F32,
    Bf16,
}

impl Element {
    pub(crate) fn size(self) -> usize {
        match self {
            Element::F32 => 4,
            Element::Bf16 => 2,
        }
    }

    fn tag(self) -> sys::cudaDataType {
        match self {
            Element::F32 => sys::cudaDataType::CUDA_R_32F,
            Element::Bf16 => sys::cudaDataType::CUDA_R_16BF,
        }
    }
}

/// A row-major operand: row `r` starts `r * stride` elements behind `ptr`. Of a batch, matrix `i` starts `i * step` elements
/// behind the first.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Operand {
    pub(crate) ptr: u64,
    pub(crate) stride: usize,
    pub(crate) step: usize,
    /// The product takes the transpose.
    pub(crate) transposed: bool,
}

impl Operand {
    /// Rows of `stride` elements.
    pub(crate) fn new(ptr: u64, stride: usize) -> Self {
        Operand { ptr, stride, step: 0, transposed: false }
    }

    /// Its transpose.
    pub(crate) fn t(self) -> Self {
        Operand { transposed: !self.transposed, ..self }
    }

    /// As the first of a batch.
    pub(crate) fn step(self, step: usize) -> Self {
        Operand { step, ..self }
    }

    fn operation(self) -> sys::cublasOperation_t {
        if self.transposed { sys::cublasOperation_t::CUBLAS_OP_T } else { sys::cublasOperation_t::CUBLAS_OP_N }
    }
}

/// How products of f32 are computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Math {
    /// In f32 throughout.
    F32,
    /// Operands of f32 are rounded to 10 bits of mantissa for the tensor cores; sums are f32.
    Tf32,
}

/// The library's state: one call at a time.
pub(crate) struct Blas {
    handle: Mutex<Handle>,
}

struct Handle(sys::cublasHandle_t);

// SAFETY: the handle is used by one thread at a time, behind the mutex.
unsafe impl Send for Handle {}

impl Drop for Handle {
    fn drop(&mut self) {
        // SAFETY: made by `create_handle` and dropped once. A failure leaves nothing to mend.
        let _ = unsafe { result::destroy_handle(self.0) };
    }
}

/// `C[m, n] = alpha A[m, k] B[k, n] + beta C`, `batch` times.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Product {
    pub(crate) m: usize,
    pub(crate) n: usize,
    pub(crate) k: usize,
    pub(crate) batch: usize,
    pub(crate) alpha: f32,
    pub(crate) beta: f32,
    /// Of A and B; C is f32.
    pub(crate) element: Element,
    pub(crate) math: Math,
}

impl Product {
    /// One product of f32.
    pub(crate) fn f32(m: usize, n: usize, k: usize, math: Math) -> Self {
        Product { m, n, k, batch: 1, alpha: 1.0, beta: 0.0, element: Element::F32, math }
    }
}

impl Blas {
    pub(crate) fn new(gpu: &Gpu) -> Result<Blas, String> {
        gpu.enter();
        let handle = Handle(result::create_handle().map_err(|e| format!("{e:?}"))?);
        // SAFETY: handle and stream are alive.
        unsafe { result::set_stream(handle.0, gpu.stream().cu_stream().cast()) }.map_err(|e| format!("{e:?}"))?;
        Ok(Blas { handle: Mutex::new(handle) })
    }

    /// See [`Product`].
    pub(crate) fn product(&self, gpu: &Gpu, job: Product, a: Operand, b: Operand, c: Operand) {
        let Product { m, n, k, batch, alpha, beta, element, math } = job;
        if m == 0 || n == 0 || batch == 0 {
            return;
        }
        gpu.enter();
        let compute = match math {
            Math::F32 => sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
            Math::Tf32 if element == Element::F32 => sys::cublasComputeType_t::CUBLAS_COMPUTE_32F_FAST_TF32,
            Math::Tf32 => sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
        };
        let int = |x: usize| i32::try_from(x).expect("a matrix has fewer than 2^31 rows");
        let handle = self.handle.lock().expect("no thread panics inside the library");
        // SAFETY: the caller's addresses and shapes belong together; alpha and beta live through the call.
        let status = unsafe {
            result::gemm_strided_batched_ex(
                handle.0,
                b.operation(),
                a.operation(),
                int(n),
                int(m),
                int(k),
                (&raw const alpha).cast::<c_void>(),
                b.ptr as *const c_void,
                element.tag(),
                int(b.stride.max(1)),
                b.step as i64,
                a.ptr as *const c_void,
                element.tag(),
                int(a.stride.max(1)),
                a.step as i64,
                (&raw const beta).cast::<c_void>(),
                c.ptr as *mut c_void,
                Element::F32.tag(),
                int(c.stride.max(1)),
                c.step as i64,
                int(batch),
                compute,
                sys::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
            )
        };
        drop(handle);
        status.unwrap_or_else(|e| panic!("the CUDA device could not multiply matrices: {e:?}"));
    }

    /// `H += X^T X` on the lower triangle, in f32 throughout: `x` is `[n, cols]`, `h` is `[cols, cols]`.
    pub(crate) fn gram(&self, gpu: &Gpu, x: u64, n: usize, cols: usize, h: u64) {
        if n == 0 || cols == 0 {
            return;
        }
        gpu.enter();
        let one = 1.0f32;
        let (n, cols) = (n as i32, cols as i32);
        let handle = self.handle.lock().expect("no thread panics inside the library");
        // SAFETY: as above. The rows' lower triangle is the columns' upper one.
        let status = unsafe {
            sys::cublasSsyrk_v2(
                handle.0,
                sys::cublasFillMode_t::CUBLAS_FILL_MODE_UPPER,
                sys::cublasOperation_t::CUBLAS_OP_N,
                cols,
                n,
                &raw const one,
                x as *const f32,
                cols,
                &raw const one,
                h as *mut f32,
                cols,
            )
            .result()
        };
        drop(handle);
        status.unwrap_or_else(|e| panic!("the CUDA device could not sum products: {e:?}"));
    }

    /// Calls the library with its handle.
    pub(crate) fn with<T>(&self, gpu: &Gpu, call: impl FnOnce(sys::cublasHandle_t) -> T) -> T {
        gpu.enter();
        call(self.handle.lock().expect("no thread panics inside the library").0)
    }
}

/// Ends the program when the device is broken, as every operation does.
pub(crate) fn check(status: Result<(), result::CublasError>) {
    status.unwrap_or_else(|e| panic!("the CUDA device could not multiply matrices: {e:?}"));
}
