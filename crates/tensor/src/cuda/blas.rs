//! Dense matrix products by cuBLASLt.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ffi::c_void;
use std::sync::Mutex;

use cudarc::cublaslt::result::{self, CublasError};
use cudarc::cublaslt::sys;

use super::kernels::searched;
use super::{CudaError, Gpu, Memory, lock};

/// Bytes cuBLASLt may use beside the operands; 32 MiB is what it recommends for Hopper.
const WORKSPACE: usize = 32 << 20;

/// A row-major f32 matrix inside [`Memory`].
#[derive(Clone, Copy)]
pub(crate) struct Operand<'a> {
    pub(crate) memory: &'a Memory,
    /// First element.
    pub(crate) offset: usize,
    /// Elements from row to row.
    pub(crate) stride: usize,
    /// Read with rows and columns exchanged.
    pub(crate) transposed: bool,
}

impl<'a> Operand<'a> {
    /// Row-major, `width` columns.
    pub(crate) fn rows(memory: &'a Memory, width: usize) -> Self {
        Operand { memory, offset: 0, stride: width, transposed: false }
    }

    pub(crate) fn t(self) -> Self {
        Operand { transposed: !self.transposed, ..self }
    }

    /// The same matrix from column (of storage) `offset` on.
    pub(crate) fn from(self, offset: usize) -> Self {
        Operand { offset, ..self }
    }

    fn address(&self) -> u64 {
        self.memory.at + (self.offset * size_of::<f32>()) as u64
    }
}

/// `c = alpha * a b + beta * c` with `a` `[m, k]`, `b` `[k, n]`, `c` `[m, n]`.
pub(crate) struct Product<'a> {
    pub(crate) m: usize,
    pub(crate) n: usize,
    pub(crate) k: usize,
    pub(crate) alpha: f32,
    pub(crate) a: Operand<'a>,
    pub(crate) b: Operand<'a>,
    pub(crate) beta: f32,
    pub(crate) c: Operand<'a>,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Shape {
    m: usize,
    n: usize,
    k: usize,
    /// Stride and transposition of both operands, stride of the result.
    a: (usize, bool),
    b: (usize, bool),
    c: usize,
    accumulate: bool,
}

/// Descriptors and the algorithm chosen for one shape.
struct Plan {
    description: sys::cublasLtMatmulDesc_t,
    a: sys::cublasLtMatrixLayout_t,
    b: sys::cublasLtMatrixLayout_t,
    c: sys::cublasLtMatrixLayout_t,
    algorithm: sys::cublasLtMatmulAlgo_t,
}

pub(super) struct Blas {
    handle: sys::cublasLtHandle_t,
    workspace: Memory,
    plans: Mutex<HashMap<Shape, Plan>>,
}

// SAFETY: cuBLASLt handles and descriptors may be used from several threads; the plans are behind a mutex.
unsafe impl Send for Blas {}
// SAFETY: as above.
unsafe impl Sync for Blas {}

impl Blas {
    pub(super) fn open(gpu: Gpu) -> Result<Blas, CudaError> {
        // SAFETY: loads and unloads the library, which is made for it.
        if !unsafe { sys::is_culib_present() } {
            return Err(CudaError::Library {
                library: "cuBLASLt",
                searched: searched("cublasLt"),
                remedy: "install the CUDA toolkit's runtime libraries or the wheel nvidia-cublas, and name their \
                         folder in LD_LIBRARY_PATH",
            });
        }
        let handle = result::create_handle().map_err(|e| failed(gpu, "open cuBLASLt", e))?;
        Ok(Blas { handle, workspace: gpu.allocate(WORKSPACE), plans: Mutex::default() })
    }

    pub(super) fn multiply(&self, gpu: Gpu, p: &Product) -> Result<(), CudaError> {
        // cuBLASLt counts columns first, so the row-major product is asked for as c^T = b^T a^T.
        let shape = Shape {
            m: p.m,
            n: p.n,
            k: p.k,
            a: (p.a.stride, p.a.transposed),
            b: (p.b.stride, p.b.transposed),
            c: p.c.stride,
            accumulate: p.beta != 0.0,
        };
        let mut plans = lock(&self.plans);
        let plan = match plans.entry(shape) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(place) => {
                place.insert(self.plan(&shape).map_err(|e| failed(gpu, "plan a matrix product", e))?)
            }
        };
        if p.a.memory.at == 0 || p.b.memory.at == 0 || p.c.memory.at == 0 {
            return Ok(());
        }
        // SAFETY: descriptors live as long as the plan; the operands are live memory of this stream.
        unsafe {
            result::matmul(
                self.handle,
                plan.description,
                (&raw const p.alpha).cast(),
                (&raw const p.beta).cast(),
                p.b.address() as *const c_void,
                plan.a,
                p.a.address() as *const c_void,
                plan.b,
                p.c.address() as *const c_void,
                plan.c,
                p.c.address() as *mut c_void,
                plan.c,
                &plan.algorithm,
                self.workspace.at as *mut c_void,
                WORKSPACE,
                gpu.0.stream.cu_stream().cast(),
            )
        }
        .map_err(|e| failed(gpu, "multiply matrices", e))
    }

    fn plan(&self, s: &Shape) -> Result<Plan, CublasError> {
        use sys::cudaDataType::CUDA_R_32F as F32;
        let description = result::create_matmul_desc(sys::cublasComputeType_t::CUBLAS_COMPUTE_32F, F32)?;
        let layout = |rows: usize, columns: usize, (stride, transposed): (usize, bool)| {
            // As stored: row-major [r, c] is column-major [c, r].
            let (r, c) = if transposed { (columns, rows) } else { (rows, columns) };
            result::create_matrix_layout(F32, c as u64, r as u64, stride as i64)
        };
        let set = |attribute, transposed: bool| {
            // cublasOperation_t: 0 as stored, 1 transposed.
            let op = i32::from(transposed);
            // SAFETY: the attribute is an enum of 32 bits.
            unsafe {
                result::set_matmul_desc_attribute(
                    description,
                    attribute,
                    (&raw const op).cast(),
                    size_of_val(&op),
                )
            }
        };
        use sys::cublasLtMatmulDescAttributes_t as Attribute;
        set(Attribute::CUBLASLT_MATMUL_DESC_TRANSA, s.b.1)?;
        set(Attribute::CUBLASLT_MATMUL_DESC_TRANSB, s.a.1)?;
        let a = layout(s.k, s.n, s.b)?;
        let b = layout(s.m, s.k, s.a)?;
        let c = layout(s.m, s.n, (s.c, false))?;
        let preference = result::create_matmul_pref()?;
        let size = WORKSPACE;
        // SAFETY: the attribute is a size_t; the descriptors were just made.
        let found = unsafe {
            result::set_matmul_pref_attribute(
                preference,
                sys::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                (&raw const size).cast(),
                size_of_val(&size),
            )?;
            let found = result::get_matmul_algo_heuristic(self.handle, description, a, b, c, c, preference);
            result::destroy_matmul_pref(preference)?;
            found?
        };
        Ok(Plan { description, a, b, c, algorithm: found.algo })
    }
}

fn failed(gpu: Gpu, what: &str, e: CublasError) -> CudaError {
    CudaError::Driver { ordinal: gpu.ordinal(), what: what.into(), reason: format!("cuBLASLt: {:?}", e.0) }
}
