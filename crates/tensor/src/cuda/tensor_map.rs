//! Descriptions of matrices for Hopper's copy engine (TMA).

use std::ffi::c_void;
use std::mem::MaybeUninit;

use cudarc::driver::sys;

use super::{Arg, CudaError, Memory};

/// What the copy engine has to know of a matrix: a kernel takes it by value (`const __grid_constant__ TensorMap`).
#[derive(Clone, Copy, PartialEq)]
#[repr(C, align(64))]
pub(crate) struct TensorMap([u64; 16]);

impl TensorMap {
    /// `rows` rows of `width` bytes in boxes of `box_rows` rows x `box_width` bytes, 128 or 64, whose 16-byte chunks are
    /// exchanged in shared memory so that a column of them lies in different banks (the swizzle of that many bytes; that
    /// of 128 is how wgmma reads); what lies outside reads as zero and is not written. `None`, and the GPU has failed, if
    /// the engine cannot copy such a matrix: memory that was not had, rows that are not a multiple of 16 bytes, a box of
    /// over 256 rows. A launch that is left out for it must not pass for one that ran.
    pub(crate) fn boxes(
        memory: &Memory,
        rows: usize,
        width: usize,
        (box_rows, box_width): (usize, usize),
    ) -> Option<TensorMap> {
        let refused = |reason: String| {
            let what =
                format!("describe {rows} rows of {width} bytes in boxes of {box_rows} to the copy engine");
            memory.gpu.fail(CudaError::Driver { ordinal: memory.gpu.ordinal(), what, reason });
            None
        };
        if memory.at == 0 || rows == 0 || !width.is_multiple_of(16) || width >= 1 << 31 || box_rows > 256 {
            return refused("it reads no such matrix".into());
        }
        let swizzle = match box_width {
            64 => sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_64B,
            128 => sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
            _ => unreachable!("boxes of {box_width} bytes"),
        };
        let mut map = MaybeUninit::<TensorMap>::zeroed();
        let (extent, pitch) = ([width as u64, rows as u64], [width as u64]);
        let (tile, stride) = ([box_width as u32, box_rows as u32], [1u32; 2]);
        // SAFETY: `map` has a tensor map's size and alignment, the arrays have the lengths that rank 2 asks for, and
        // the function only describes memory, which it does not touch.
        let made = unsafe {
            sys::cuTensorMapEncodeTiled(
                map.as_mut_ptr().cast(),
                sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_UINT8,
                2,
                memory.at as *mut c_void,
                extent.as_ptr(),
                pitch.as_ptr(),
                tile.as_ptr(),
                stride.as_ptr(),
                sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                swizzle,
                sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        };
        if made == sys::CUresult::CUDA_SUCCESS {
            // SAFETY: zeroed, and any bytes make a map.
            Some(unsafe { map.assume_init() })
        } else {
            refused(format!("{made:?}"))
        }
    }
}

impl From<TensorMap> for Arg {
    fn from(map: TensorMap) -> Arg {
        Arg::Map(map)
    }
}
