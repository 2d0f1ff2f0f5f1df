//! A shaped, reference-counted, contiguous (row-major) array.

use std::fmt;
use std::sync::Arc;

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use rayon::prelude::*;

use crate::cuda::{Gpu, Memory};
use crate::pool::Buffer;

/// Element type of a [`Tensor`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DType {
    /// 32-bit IEEE float: the type every CPU operation computes in.
    F32,
    /// bfloat16: storage and GPU arithmetic.
    Bf16,
    /// 16-bit IEEE float: storage and GPU arithmetic.
    F16,
    /// 8-bit signed integer: quantised codes in -127..=127.
    I8,
    /// Unsigned bytes: masks (0 or 1) and 2:4 metadata.
    U8,
    /// 32-bit signed integer: token ids, labels, accumulators.
    I32,
}

impl DType {
    /// Bytes an element takes.
    pub fn size(self) -> usize {
        match self {
            DType::F32 | DType::I32 => 4,
            DType::Bf16 | DType::F16 => 2,
            DType::I8 | DType::U8 => 1,
        }
    }
}

/// Where a tensor lives. Operations match on it, so that a new device makes the compiler list every
/// operation that has to learn it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Device {
    /// Host memory.
    Cpu,
    /// The memory of an NVIDIA GPU.
    Cuda(Gpu),
}

#[derive(Clone)]
enum Storage {
    F32(Buffer),
    Bf16(Vec<bf16>),
    F16(Vec<f16>),
    I8(Vec<i8>),
    U8(Vec<u8>),
    I32(Vec<i32>),
    Cuda(DType, Memory),
}

/// A contiguous row-major array. Clones share storage; writing to a shared tensor copies it first.
///
/// Access to the wrong element type and shape disagreements are mistakes of the caller and panic;
/// data from outside the program is checked where it is read.
#[derive(Clone)]
pub struct Tensor {
    shape: Vec<usize>,
    storage: Arc<Storage>,
}

macro_rules! typed {
    ($from:ident, $get:ident, $get_mut:ident, $t:ty, $variant:ident, $name:literal) => {
        #[doc = concat!("A tensor of ", $name, " elements. Panics unless `shape` has as many as `data`.")]
        pub fn $from(data: Vec<$t>, shape: &[usize]) -> Self {
            assert_eq!(data.len(), shape.iter().product::<usize>(), "{} elements for shape {shape:?}", data.len());
            Tensor { shape: shape.to_vec(), storage: Arc::new(Storage::$variant(data.into())) }
        }
        #[doc = concat!("The elements. Panics if they are not ", $name, ".")]
        pub fn $get(&self) -> &[$t] {
            match &*self.storage {
                Storage::$variant(v) => v,
                _ => panic!("expected {} elements in host memory, found {self:?}", $name),
            }
        }
        #[doc = concat!("The elements, to write; shared storage is copied first. Panics if they are not ", $name, ".")]
        pub fn $get_mut(&mut self) -> &mut [$t] {
            let (found, device) = (self.dtype(), self.device());
            match Arc::make_mut(&mut self.storage) {
                Storage::$variant(v) => v,
                _ => panic!("expected {} elements in host memory, found {found:?} on {device:?}", $name),
            }
        }
    };
}

impl From<Vec<f32>> for Buffer {
    fn from(v: Vec<f32>) -> Self {
        Buffer::from_vec(v)
    }
}

impl Tensor {
    typed!(from_f32, f32, f32_mut, f32, F32, "f32");
    typed!(from_bf16, bf16, bf16_mut, bf16, Bf16, "bf16");
    typed!(from_f16, f16, f16_mut, f16, F16, "f16");
    typed!(from_i8, i8, i8_mut, i8, I8, "i8");
    typed!(from_u8, u8, u8_mut, u8, U8, "u8");
    typed!(from_i32, i32, i32_mut, i32, I32, "i32");

    /// An f32 tensor of zeros.
    pub fn zeros(shape: &[usize]) -> Self {
        let n = shape.iter().product();
        Tensor { shape: shape.to_vec(), storage: Arc::new(Storage::F32(Buffer::zeroed(n))) }
    }

    /// An f32 tensor of zeros on `device`.
    pub fn zeros_on(device: Device, shape: &[usize]) -> Self {
        match device {
            Device::Cpu => Self::zeros(shape),
            Device::Cuda(gpu) => Self::zeros_of(gpu, DType::F32, shape),
        }
    }

    /// A tensor of zeros on a GPU.
    pub(crate) fn zeros_of(gpu: Gpu, dtype: DType, shape: &[usize]) -> Self {
        let t = Self::stale_of(gpu, dtype, shape);
        t.memory().zero();
        t
    }

    /// An f32 tensor with every element `value`.
    pub fn full(shape: &[usize], value: f32) -> Self {
        let mut t = Self::stale(shape);
        t.f32_mut().fill(value);
        t
    }

    /// A one-element f32 tensor of shape `[1]`.
    pub fn scalar(value: f32) -> Self {
        Self::from_f32(vec![value], &[1])
    }

    /// An f32 tensor with unspecified content, for a kernel that writes every element.
    pub(crate) fn stale(shape: &[usize]) -> Self {
        let n = shape.iter().product();
        Tensor { shape: shape.to_vec(), storage: Arc::new(Storage::F32(Buffer::stale(n))) }
    }

    /// [`Tensor::stale`] on any device.
    pub(crate) fn stale_on(device: Device, shape: &[usize]) -> Self {
        match device {
            Device::Cpu => Self::stale(shape),
            Device::Cuda(gpu) => Self::stale_of(gpu, DType::F32, shape),
        }
    }

    /// A tensor with unspecified content on a GPU.
    pub(crate) fn stale_of(gpu: Gpu, dtype: DType, shape: &[usize]) -> Self {
        let memory = gpu.allocate(shape.iter().product::<usize>() * dtype.size());
        Tensor { shape: shape.to_vec(), storage: Arc::new(Storage::Cuda(dtype, memory)) }
    }

    /// The tensor that `memory` holds.
    pub(crate) fn on_gpu(dtype: DType, memory: Memory, shape: &[usize]) -> Self {
        Tensor { shape: shape.to_vec(), storage: Arc::new(Storage::Cuda(dtype, memory)) }
    }

    /// Whether another tensor has the same storage, so that writing would copy it.
    pub(crate) fn shared(&self) -> bool {
        Arc::strong_count(&self.storage) > 1
    }

    /// The same elements on `device`; shares storage if they are there already.
    pub fn to(&self, device: Device) -> Self {
        let storage = match (&*self.storage, device) {
            (Storage::Cuda(dtype, memory), Device::Cpu) => match dtype {
                DType::F32 => Storage::F32(memory.download::<f32>().into()),
                DType::Bf16 => Storage::Bf16(memory.download()),
                DType::F16 => Storage::F16(memory.download()),
                DType::I8 => Storage::I8(memory.download()),
                DType::U8 => Storage::U8(memory.download()),
                DType::I32 => Storage::I32(memory.download()),
            },
            (Storage::Cuda(_, memory), Device::Cuda(gpu)) if memory.gpu() != gpu => {
                return self.to(Device::Cpu).to(device);
            }
            (Storage::Cuda(..), Device::Cuda(_)) | (_, Device::Cpu) => return self.clone(),
            (_, Device::Cuda(gpu)) => {
                let memory = match &*self.storage {
                    Storage::F32(v) => gpu.upload::<f32>(v),
                    Storage::Bf16(v) => gpu.upload(v),
                    Storage::F16(v) => gpu.upload(v),
                    Storage::I8(v) => gpu.upload(v),
                    Storage::U8(v) => gpu.upload(v),
                    Storage::I32(v) => gpu.upload(v),
                    Storage::Cuda(..) => unreachable!("handled above"),
                };
                Storage::Cuda(self.dtype(), memory)
            }
        };
        Tensor { shape: self.shape.clone(), storage: Arc::new(storage) }
    }

    /// The GPU memory of the elements. Panics if they are in host memory.
    pub(crate) fn memory(&self) -> &Memory {
        match &*self.storage {
            Storage::Cuda(_, memory) => memory,
            _ => panic!("expected elements on a GPU, found {self:?}"),
        }
    }

    /// The GPU memory of the elements, to write; shared storage is copied first. Panics as [`Tensor::memory`].
    pub(crate) fn memory_mut(&mut self) -> &Memory {
        match Arc::make_mut(&mut self.storage) {
            Storage::Cuda(_, memory) => memory,
            _ => panic!("expected elements on a GPU"),
        }
    }

    /// Extent of each dimension.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Extent of the last dimension (1 for a shape without dimensions).
    pub fn width(&self) -> usize {
        self.shape.last().copied().unwrap_or(1)
    }

    /// Product of all dimensions but the last: the number of rows.
    pub fn rows(&self) -> usize {
        self.shape.split_last().map_or(1, |(_, rest)| rest.iter().product())
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        match &*self.storage {
            Storage::F32(_) => DType::F32,
            Storage::Bf16(_) => DType::Bf16,
            Storage::F16(_) => DType::F16,
            Storage::I8(_) => DType::I8,
            Storage::U8(_) => DType::U8,
            Storage::I32(_) => DType::I32,
            Storage::Cuda(dtype, _) => *dtype,
        }
    }

    /// Where the elements are.
    pub fn device(&self) -> Device {
        match &*self.storage {
            Storage::Cuda(_, memory) => Device::Cuda(memory.gpu()),
            _ => Device::Cpu,
        }
    }

    /// The same elements under another shape. Panics if the number of elements differs.
    pub fn reshape(&self, shape: &[usize]) -> Self {
        assert_eq!(self.len(), shape.iter().product::<usize>(), "reshape of {:?} to {shape:?}", self.shape);
        Tensor { shape: shape.to_vec(), storage: self.storage.clone() }
    }

    /// The tensor's elements, in order, as tensors of `shapes`. On a GPU they are parts of one allocation, except those
    /// that would not begin where packs of 16 bytes do.
    pub(crate) fn split(self, shapes: &[Vec<usize>]) -> Vec<Self> {
        let lengths = shapes.iter().map(|s| s.iter().product::<usize>());
        assert_eq!(lengths.clone().sum::<usize>(), self.len(), "split of {self:?} into {shapes:?}");
        if let [shape] = shapes {
            return vec![self.reshape(shape)];
        }
        let starts = lengths.scan(0, |at, n| Some(std::mem::replace(at, *at + n)));
        let of = |storage: Storage, shape: &Vec<usize>| Tensor {
            shape: shape.clone(),
            storage: Arc::new(storage),
        };
        if let Device::Cpu = self.device() {
            let part = |(shape, from): (&Vec<usize>, usize)| {
                Self::from_f32(self.f32()[from..][..shape.iter().product()].to_vec(), shape)
            };
            return shapes.iter().zip(starts).map(part).collect();
        }
        // Parts of shared storage would be written through each other.
        let storage = Arc::try_unwrap(self.storage).unwrap_or_else(|shared| (*shared).clone());
        let Storage::Cuda(dtype, memory) = storage else { unreachable!("not on the CPU") };
        let whole = Arc::new(memory);
        let part = |(shape, from): (&Vec<usize>, usize)| {
            let (offset, bytes) = (from * dtype.size(), shape.iter().product::<usize>() * dtype.size());
            let part = Memory::part(&whole, offset, bytes);
            of(Storage::Cuda(dtype, if offset.is_multiple_of(16) { part } else { part.clone() }), shape)
        };
        shapes.iter().zip(starts).map(part).collect()
    }

    /// The only element of a one-element f32 tensor. On a GPU this waits for all work before it.
    pub fn item(&self) -> f32 {
        assert_eq!(self.len(), 1, "item() of a tensor of shape {:?}", self.shape);
        self.to(Device::Cpu).f32()[0]
    }

    /// The only elements of `all`, one-element f32 tensors on one device. On a GPU this waits once, not for each.
    pub fn items(all: &[&Tensor]) -> Vec<f32> {
        let Some(Device::Cuda(gpu)) = all.first().map(|t| t.device()) else {
            return all.iter().map(|t| t.item()).collect();
        };
        let together = Tensor::stale_of(gpu, DType::F32, &[all.len()]);
        for (i, t) in all.iter().enumerate() {
            assert!(t.len() == 1 && t.dtype() == DType::F32, "items() of {t:?}");
            together.memory().put(i * size_of::<f32>(), t.memory());
        }
        together.to(Device::Cpu).f32().to_vec()
    }

    /// The elements as f32 (shares storage when they already are). Integers are converted by value. Like the
    /// other conversions, for elements in host memory.
    pub fn to_f32(&self) -> Self {
        if self.dtype() == DType::F32 {
            return self.clone();
        }
        let data: Vec<f32> = match &*self.storage {
            Storage::F32(_) | Storage::Cuda(..) => panic!("conversion of {self:?}"),
            Storage::Bf16(v) => v.iter().map(|x| x.to_f32()).collect(),
            Storage::F16(v) => v.iter().map(|x| x.to_f32()).collect(),
            Storage::I8(v) => v.iter().map(|&x| x as f32).collect(),
            Storage::U8(v) => v.iter().map(|&x| x as f32).collect(),
            Storage::I32(v) => v.iter().map(|&x| x as f32).collect(),
        };
        Self::from_f32(data, &self.shape)
    }

    /// The elements rounded to nearest-even f16. Values beyond 65504 become infinite.
    pub fn to_f16(&self) -> Self {
        let wide = self.to_f32();
        let mut half = vec![f16::ZERO; wide.len()];
        half.par_chunks_mut(1 << 14)
            .zip(wide.f32().par_chunks(1 << 14))
            .for_each(|(to, from)| to.convert_from_f32_slice(from));
        Self::from_f16(half, &self.shape)
    }

    /// The elements rounded to nearest-even bf16.
    pub fn to_bf16(&self) -> Self {
        Self::from_bf16(self.to_f32().f32().iter().map(|&x| bf16::from_f32(x)).collect(), &self.shape)
    }

    /// A two-dimensional f32 tensor with rows and columns exchanged.
    pub fn transpose(&self) -> Self {
        let &[r, c] = self.shape() else { panic!("transpose of shape {:?}", self.shape) };
        let mut out = Self::stale(&[c, r]);
        let (src, dst) = (self.f32(), out.f32_mut());
        for i in 0..r {
            for j in 0..c {
                dst[j * r + i] = src[i * c + j];
            }
        }
        out
    }
}

impl fmt::Debug for Tensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.device() {
            Device::Cpu => write!(f, "{:?}{:?}", self.dtype(), self.shape),
            Device::Cuda(gpu) => write!(f, "{:?}{:?} on {gpu:?}", self.dtype(), self.shape),
        }
    }
}

impl PartialEq for Tensor {
    /// Same shape, type and elements (f32 compared by value, so NaN differs from itself).
    fn eq(&self, other: &Self) -> bool {
        self.shape == other.shape
            && match (&*self.storage, &*other.storage) {
                (Storage::F32(a), Storage::F32(b)) => **a == **b,
                (Storage::Bf16(a), Storage::Bf16(b)) => a == b,
                (Storage::F16(a), Storage::F16(b)) => a == b,
                (Storage::I8(a), Storage::I8(b)) => a == b,
                (Storage::U8(a), Storage::U8(b)) => a == b,
                (Storage::I32(a), Storage::I32(b)) => a == b,
                (Storage::Cuda(..), _) | (_, Storage::Cuda(..)) => {
                    self.to(Device::Cpu) == other.to(Device::Cpu)
                }
                _ => false,
            }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writing_a_shared_tensor_leaves_the_other_alone() {
        let a = Tensor::from_f32(vec![1.0, 2.0], &[2]);
        let mut b = a.clone();
        b.f32_mut()[0] = 9.0;
        assert_eq!(a.f32(), [1.0, 2.0]);
        assert_eq!(b.f32(), [9.0, 2.0]);
    }

    #[test]
    fn items_come_in_their_order() {
        for device in Device::all() {
            let all = [3.0, -1.0, 2.5].map(|x| Tensor::scalar(x).to(device));
            assert_eq!(Tensor::items(&all.each_ref()), [3.0, -1.0, 2.5], "{device:?}");
        }
        assert!(Tensor::items(&[]).is_empty());
    }

    #[test]
    fn transpose_moves_every_element() {
        let t = Tensor::from_f32((0..6).map(|x| x as f32).collect(), &[2, 3]).transpose();
        assert_eq!(t.shape(), [3, 2]);
        assert_eq!(t.f32(), [0.0, 3.0, 1.0, 4.0, 2.0, 5.0]);
    }
}
