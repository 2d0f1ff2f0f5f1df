//! Dense matrix products by cuBLASLt.

use std::cell::Cell;
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ffi::c_void;
use std::sync::Mutex;

use cudarc::cublaslt::result::{self, CublasError};
use cudarc::cublaslt::sys;
use cudarc::driver::{result as memory, sys as driver};

use super::kernels::searched;
use super::{CudaError, Gpu, Memory, lock};
use crate::{DType, Tensor};

/// Bytes cuBLASLt may use beside the operands; 32 MiB is what it recommends for Hopper.
const WORKSPACE: usize = 32 << 20;

thread_local! {
    /// Whether the thread is inside [`with_tf32`].
    static TF32: Cell<bool> = const { Cell::new(false) };
}

/// `f`, whose products of f32 matrices on a GPU round their operands to TF32: 10 bits of fraction, which tensor cores
/// multiply. Sums stay f32. Codes of 8 bits are not rounded by it.
pub fn with_tf32<R>(f: impl FnOnce() -> R) -> R {
    /// Takes it back, after a panic too.
    struct Back(bool);
    impl Drop for Back {
        fn drop(&mut self) {
            TF32.set(self.0);
        }
    }
    let _back = Back(TF32.replace(true));
    f()
}

/// A row-major f32 or bf16 matrix inside [`Memory`].
#[derive(Clone, Copy)]
pub(crate) struct Operand<'a> {
    pub(crate) memory: &'a Memory,
    pub(crate) dtype: DType,
    /// First element.
    pub(crate) offset: usize,
    /// Elements from row to row.
    pub(crate) stride: usize,
    /// Read with rows and columns exchanged.
    pub(crate) transposed: bool,
}

impl<'a> Operand<'a> {
    /// The tensor's elements by rows of `width`.
    pub(crate) fn rows(t: &'a Tensor, width: usize) -> Self {
        Operand { memory: t.memory(), dtype: t.dtype(), offset: 0, stride: width, transposed: false }
    }

    pub(crate) fn t(self) -> Self {
        Operand { transposed: !self.transposed, ..self }
    }

    /// The same matrix from column (of storage) `offset` on.
    pub(crate) fn from(self, offset: usize) -> Self {
        Operand { offset, ..self }
    }

    fn address(&self) -> u64 {
        self.memory.at + (self.offset * self.dtype.size()) as u64
    }
}

/// What a product is multiplied by.
#[derive(Clone, Copy)]
pub(crate) enum Factor<'a> {
    Host(f32),
    /// f32 `[1]` that the host does not know.
    Gpu(&'a Tensor),
}

/// `c = alpha * a b + beta * c`, with `a` `[m, k]`, `b` `[k, n]` of one type, `c` `[m, n]`; sums are f32. With a `bias`
/// `[n]` of the type of `c`, that is added to every row.
pub(crate) struct Product<'a> {
    pub(crate) m: usize,
    pub(crate) n: usize,
    pub(crate) k: usize,
    pub(crate) alpha: Factor<'a>,
    pub(crate) a: Operand<'a>,
    pub(crate) b: Operand<'a>,
    pub(crate) beta: f32,
    pub(crate) c: Operand<'a>,
    pub(crate) bias: Option<&'a Tensor>,
}

/// A [`Product`] by its addresses, as it is asked of cuBLASLt.
#[derive(Clone, Copy, PartialEq)]
pub(super) struct Call {
    shape: Shape,
    a: u64,
    b: u64,
    c: u64,
    /// 0 without one.
    bias: u64,
    alpha: Alpha,
    beta: f32,
}

#[derive(Clone, Copy, PartialEq)]
enum Alpha {
    Host(f32),
    Gpu(u64),
}

impl Call {
    pub(super) fn of(p: &Product) -> Call {
        assert_eq!(p.a.dtype, p.b.dtype, "operands of a product");
        let shape = Shape {
            m: p.m,
            n: p.n,
            k: p.k,
            a: (p.a.stride, p.a.transposed),
            b: (p.b.stride, p.b.transposed),
            c: p.c.stride,
            accumulate: p.beta != 0.0,
            on_gpu: matches!(p.alpha, Factor::Gpu(_)),
            bias: p.bias.is_some(),
            dtypes: (p.a.dtype, p.c.dtype),
            tf32: p.a.dtype == DType::F32 && TF32.get(),
            alignment: [p.a, p.b, p.c]
                .iter()
                .fold(256, |all, o| all.min(1 << o.address().trailing_zeros().min(8))),
        };
        let alpha = match p.alpha {
            Factor::Host(alpha) => Alpha::Host(alpha),
            Factor::Gpu(t) => Alpha::Gpu(t.memory().at),
        };
        // Of memory that was not had there is no part either.
        let address = |o: &Operand| if o.memory.at == 0 { 0 } else { o.address() };
        let bias = p.bias.map_or(0, |b| b.memory().at);
        Call { shape, a: address(&p.a), b: address(&p.b), c: address(&p.c), bias, alpha, beta: p.beta }
    }
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
    /// Whether the factors are read from GPU memory.
    on_gpu: bool,
    bias: bool,
    /// Of the operands and of the result.
    dtypes: (DType, DType),
    tf32: bool,
    /// Bytes that all addresses are multiples of.
    alignment: u32,
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
    /// Where the two floats are, for products whose factors are on the GPU. Not from the pool: cuBLASLt may be opened on
    /// a stream.
    zero_and_one: driver::CUdeviceptr,
    plans: Mutex<HashMap<Shape, Plan>>,
}

// SAFETY: cuBLASLt handles and descriptors may be used from several threads; the plans are behind a mutex.
unsafe impl Send for Blas {}
// SAFETY: as above.
unsafe impl Sync for Blas {}

/// An error that says what was searched, if there is no cuBLASLt here.
pub(super) fn need() -> Result<(), CudaError> {
    // SAFETY: loads and unloads the library, which is made for it.
    if unsafe { sys::is_culib_present() } {
        return Ok(());
    }
    Err(CudaError::Library {
        library: "cuBLASLt",
        searched: searched("cublasLt"),
        remedy: "install the CUDA toolkit's runtime libraries or the wheel nvidia-cublas, and name their folder in \
                 LD_LIBRARY_PATH",
    })
}

impl Blas {
    pub(super) fn open(gpu: Gpu) -> Result<Blas, CudaError> {
        let open = result::create_handle;
        let handle = open().or_else(|_| {
            // It may have lacked memory that the pool holds.
            gpu.reclaim(&mut lock(&gpu.0.pool))
                .map_err(|_| CublasError(sys::cublasStatus_t::CUBLAS_STATUS_ALLOC_FAILED))?;
            open()
        });
        let handle = handle.map_err(|e| failed(gpu, "open cuBLASLt", e))?;
        let factors = [0.0f32, 1.0];
        // SAFETY: the context lives as long as the process, and the copy is done when the call returns.
        let upload = || unsafe {
            gpu.bind()?;
            let at = memory::malloc_sync(size_of_val(&factors))?;
            memory::memcpy_htod_sync(at, &factors).map(|()| at)
        };
        let zero_and_one = upload().map_err(|e| {
            // SAFETY: nobody has it yet.
            let _ = unsafe { result::destroy_handle(handle) };
            gpu.refused("open cuBLASLt", size_of_val(&factors), e)
        })?;
        Ok(Blas { handle, zero_and_one, plans: Mutex::default() })
    }

    pub(super) fn multiply(&self, gpu: Gpu, call: &Call) -> Result<(), CudaError> {
        // cuBLASLt counts columns first, so the row-major product is asked for as c^T = b^T a^T.
        let Call { shape, a, b, c, bias, alpha, beta } = *call;
        let mut plans = lock(&self.plans);
        let plan = match plans.entry(shape) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(place) => {
                place.insert(self.plan(&shape).map_err(|e| failed(gpu, "plan a matrix product", e))?)
            }
        };
        if a == 0 || b == 0 || c == 0 {
            return Ok(());
        }
        let workspace = gpu.lane().workspace(gpu, WORKSPACE)?;
        let (alpha, beta) = match alpha {
            Alpha::Host(ref alpha) => ((&raw const *alpha).cast(), (&raw const beta).cast()),
            Alpha::Gpu(at) => {
                assert!(beta == 0.0 || beta == 1.0, "a factor of {beta} for what is there");
                let beta = self.zero_and_one + beta as u64 * size_of::<f32>() as u64;
                (at as *const c_void, beta as *const c_void)
            }
        };
        // SAFETY: descriptors live as long as the plan, which the lock keeps for this call, and the bias' address is a
        // pointer; the operands are live memory of this stream.
        unsafe {
            if shape.bias {
                result::set_matmul_desc_attribute(
                    plan.description,
                    sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_BIAS_POINTER,
                    (&raw const bias).cast(),
                    size_of_val(&bias),
                )
                .map_err(|e| failed(gpu, "name a bias", e))?;
            }
            result::matmul(
                self.handle,
                plan.description,
                alpha,
                beta,
                b as *const c_void,
                plan.a,
                a as *const c_void,
                plan.b,
                c as *const c_void,
                plan.c,
                c as *mut c_void,
                plan.c,
                &plan.algorithm,
                workspace as *mut c_void,
                WORKSPACE,
                gpu.stream().cast(),
            )
        }
        .map_err(|e| failed(gpu, "multiply matrices", e))
    }

    fn plan(&self, s: &Shape) -> Result<Plan, CublasError> {
        use sys::cudaDataType::CUDA_R_32F as F32;
        let of = |dtype| match dtype {
            DType::F32 => F32,
            DType::Bf16 => sys::cudaDataType::CUDA_R_16BF,
            DType::F16 => sys::cudaDataType::CUDA_R_16F,
            other => panic!("no matrix products of {other:?}"),
        };
        let compute = match s.tf32 {
            true => sys::cublasComputeType_t::CUBLAS_COMPUTE_32F_FAST_TF32,
            false => sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
        };
        let description = result::create_matmul_desc(compute, F32)?;
        let layout = |dtype, rows: usize, columns: usize, (stride, transposed): (usize, bool)| {
            // As stored: row-major [r, c] is column-major [c, r].
            let (r, c) = if transposed { (columns, rows) } else { (rows, columns) };
            result::create_matrix_layout(of(dtype), c as u64, r as u64, stride as i64)
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
        if s.on_gpu {
            let mode = sys::cublasLtPointerMode_t::CUBLASLT_POINTER_MODE_DEVICE;
            // SAFETY: the attribute is this enum.
            unsafe {
                result::set_matmul_desc_attribute(
                    description,
                    Attribute::CUBLASLT_MATMUL_DESC_POINTER_MODE,
                    (&raw const mode).cast(),
                    size_of_val(&mode),
                )?;
            }
        }
        if s.bias {
            let epilogue = sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS;
            // SAFETY: the attribute is this enum.
            unsafe {
                result::set_matmul_desc_attribute(
                    description,
                    Attribute::CUBLASLT_MATMUL_DESC_EPILOGUE,
                    (&raw const epilogue).cast(),
                    size_of_val(&epilogue),
                )?;
            }
        }
        let a = layout(s.dtypes.0, s.k, s.n, s.b)?;
        let b = layout(s.dtypes.0, s.m, s.k, s.a)?;
        let c = layout(s.dtypes.1, s.m, s.n, (s.c, false))?;
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
            // Of parts of a matrix it is less than the library would take for granted.
            use sys::cublasLtMatmulPreferenceAttributes_t as Preference;
            for operand in [
                Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES,
                Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
                Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
                Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES,
            ] {
                let bytes = (&raw const s.alignment).cast();
                result::set_matmul_pref_attribute(preference, operand, bytes, size_of_val(&s.alignment))?;
            }
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
