//! The factor of the inverse Hessian, by cuSOLVER and cuBLAS in f32.

use crate::blas::{Blas, check};
use crate::gpu::{Buffer, Gpu, Grid, Source, launch};
use cudarc::cublas::sys as cublas;
use cudarc::cusolver::{result, sys};
use std::sync::{Arc, Mutex};
use tailorq_kernels::NotPositiveDefinite;

pub(crate) const SOURCE: Source = Source { name: "factor", code: include_str!("kernels/factor.cu") };

/// Columns of the inverse that are solved for at a time: those to the right of a panel's own rows are zeros and not touched.
const PANEL: usize = 1024;

/// cuSOLVER's state, made when it is first needed: loading the library takes a while.
#[derive(Default)]
pub(crate) struct Solver {
    handle: Mutex<Option<Handle>>,
}

struct Handle(sys::cusolverDnHandle_t);

// SAFETY: the handle is used by one thread at a time, behind the mutex.
unsafe impl Send for Handle {}

impl Drop for Handle {
    fn drop(&mut self) {
        // SAFETY: made by `dn_create` and dropped once. A failure leaves nothing to mend.
        let _ = unsafe { result::dn_destroy(self.0) };
    }
}

impl Handle {
    fn new(gpu: &Gpu) -> Handle {
        let handle = Handle(done(result::dn_create()));
        // SAFETY: handle and stream are alive.
        done(unsafe { result::dn_set_stream(handle.0, gpu.stream().cu_stream().cast()) });
        handle
    }
}

/// Ends the program when the device is broken, as every operation does.
fn done<T>(result: Result<T, result::CusolverError>) -> T {
    result.unwrap_or_else(|e| panic!("the CUDA device could not factor a matrix: {e}"))
}

fn int(n: usize) -> i32 {
    i32::try_from(n).expect("a matrix has fewer than 2^31 rows")
}

/// Replaces the lower triangle `H` (row-major, `[n, n]`, f32) at `h` by the upper triangular `U` with `H^-1 = U^T U`, zeros
/// below.
///
/// With the order of rows and columns reversed, the row-major lower triangle is the column-major lower one, which the
/// library factors: `J H J = L L^T`. Then `U = J L^-1 J`: solving `L^T X = I` leaves `L^-1` by rows, and that is reversed again.
pub(crate) fn inverse_cholesky_upper(
    gpu: &Arc<Gpu>,
    (blas, solver): (&Blas, &Solver),
    h: u64,
    n: usize,
) -> Result<(), NotPositiveDefinite> {
    if n == 0 {
        return Ok(());
    }
    let bytes = n * n * size_of::<f32>();
    let factor = gpu.allocate(bytes);
    launch!(gpu, &SOURCE, "reversed", Grid::elements(n * n), h, factor.ptr(), n as u64, 0i32);
    solver.cholesky_lower(gpu, &factor, n)?;
    let inverse = gpu.zeros(bytes);
    launch!(gpu, &SOURCE, "ones", Grid::elements(n), inverse.ptr(), n as u64);
    for first in (0..n).step_by(PANEL) {
        // Columns first..end of the inverse of an upper triangle end in row `end`.
        let end = (first + PANEL).min(n);
        solve_transposed(gpu, blas, &factor, n, (inverse.ptr() + (first * n * size_of::<f32>()) as u64, first..end));
    }
    launch!(gpu, &SOURCE, "reversed", Grid::elements(n * n), inverse.ptr(), h, n as u64, 1i32);
    Ok(())
}

impl Solver {
    /// Replaces the column-major lower triangle of an `[n, n]` matrix by its Cholesky factor.
    fn cholesky_lower(&self, gpu: &Arc<Gpu>, matrix: &Buffer, n: usize) -> Result<(), NotPositiveDefinite> {
        gpu.enter();
        let mut handle = self.handle.lock().expect("no thread panics inside the library");
        let handle = handle.get_or_insert_with(|| Handle::new(gpu)).0;
        let (uplo, size, a) = (sys::cublasFillMode_t::CUBLAS_FILL_MODE_LOWER, int(n), matrix.ptr() as *mut f32);
        let mut n_work = 0;
        // SAFETY: the handle is alive and the matrix is that large.
        done(unsafe { sys::cusolverDnSpotrf_bufferSize(handle, uplo, size, a, size, &raw mut n_work) }.result());
        let work = gpu.allocate(n_work.max(0) as usize * size_of::<f32>());
        let info = gpu.zeros(size_of::<i32>());
        let (at_work, at_info) = (work.ptr() as *mut f32, info.ptr() as *mut i32);
        // SAFETY: as above; the workspace is as large as was asked for, and all of it outlives the call in stream order.
        done(unsafe { sys::cusolverDnSpotrf(handle, uplo, size, a, size, at_work, n_work, at_info) }.result());
        launch!(gpu, &SOURCE, "first_bad_pivot", Grid::rows(1, 256), matrix.ptr(), n as u64, info.ptr());
        let mut pivot = [0i32];
        gpu.read(&info, 0, &mut pivot);
        assert!(pivot[0] >= 0, "argument {} of the factorization is wrong", -pivot[0]);
        match pivot[0] {
            0 => Ok(()),
            // The order of the leading minor that is not positive, from 1.
            order => Err(NotPositiveDefinite { pivot: order as usize - 1 }),
        }
    }
}

/// `L^T X = B` for the columns of a panel at `at`, of which the rows up to the panel's end are solved for.
fn solve_transposed(gpu: &Gpu, blas: &Blas, lower: &Buffer, n: usize, (at, panel): (u64, std::ops::Range<usize>)) {
    let one = 1.0f32;
    // SAFETY: both matrices are [n, n], the panel lies inside the second, and `one` lives through the call.
    check(blas.with(gpu, |handle| unsafe {
        cublas::cublasStrsm_v2(
            handle,
            cublas::cublasSideMode_t::CUBLAS_SIDE_LEFT,
            cublas::cublasFillMode_t::CUBLAS_FILL_MODE_LOWER,
            cublas::cublasOperation_t::CUBLAS_OP_T,
            cublas::cublasDiagType_t::CUBLAS_DIAG_NON_UNIT,
            int(panel.end),
            int(panel.len()),
            &raw const one,
            lower.ptr() as *const f32,
            int(n),
            at as *mut f32,
            int(n),
        )
        .result()
    }));
}
