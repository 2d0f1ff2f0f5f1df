//! Tensors to one file, whole or not at all.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::Path;

use gpusq_tensor::{DType, Tensor, f16};

use super::{CHUNK, Dtype, MAX_HEADER, METADATA, bad, with_checksums};
use crate::format::atomic::write_file;
use crate::{Error, Result};

/// Writes `tensors` and `metadata` as one safetensors file, whole or not at all.
///
/// Equal content gives equal bytes: tensors lie by falling element size and type, then by name (the order of
/// the reference implementation, which aligns every tensor), and the header is padded with spaces to a
/// multiple of eight bytes.
///
/// # Errors
/// [`Error::Tensor`] for a name that repeats or is reserved, [`Error::File`] for a header over 100 MB,
/// [`Error::Io`] when writing fails.
pub fn write_safetensors(
    path: impl AsRef<Path>,
    tensors: &[(String, Tensor)],
    metadata: &BTreeMap<String, String>,
) -> Result<()> {
    write_stored(path.as_ref(), as_they_are(tensors), metadata)
}

/// [`write_safetensors`] with a checksum of each tensor in the metadata, which reading compares.
///
/// # Errors
/// As there; [`Error::File`] for a metadata key that looks like a checksum's.
pub fn write_checksummed(
    path: impl AsRef<Path>,
    tensors: &[(String, Tensor)],
    metadata: &BTreeMap<String, String>,
) -> Result<()> {
    let (path, tensors) = (path.as_ref(), as_they_are(tensors));
    let metadata = with_checksums(path, &tensors, metadata)?;
    write_stored(path, tensors, &metadata)
}

fn as_they_are(tensors: &[(String, Tensor)]) -> Vec<Stored<'_>> {
    tensors.iter().map(|(name, t)| Stored { name: name.clone(), tensor: t, dtype: t.dtype() }).collect()
}

/// A tensor to write; one of f32 may be stored as F16, rounded on its way out.
pub(in crate::format) struct Stored<'a> {
    pub(in crate::format) name: String,
    pub(in crate::format) tensor: &'a Tensor,
    pub(in crate::format) dtype: DType,
}

pub(in crate::format) fn write_stored(
    path: &Path,
    mut tensors: Vec<Stored>,
    metadata: &BTreeMap<String, String>,
) -> Result<()> {
    tensors.sort_by(|a, b| file_dtype(b.dtype).cmp(&file_dtype(a.dtype)).then_with(|| a.name.cmp(&b.name)));
    let mut entries = Vec::with_capacity(tensors.len() + 1);
    if !metadata.is_empty() {
        entries.push(format!(r#""{METADATA}":{}"#, serde_json::json!(metadata)));
    }
    let mut names = std::collections::BTreeSet::new();
    let mut end = 0u64;
    for t in &tensors {
        if t.name == METADATA {
            return Err(bad(path, &t.name, "the format reserves this name; choose another"));
        }
        if !names.insert(t.name.as_str()) {
            return Err(bad(path, &t.name, "is given twice"));
        }
        let begin = end;
        end += (t.tensor.len() * t.dtype.size()) as u64;
        let key = serde_json::Value::from(t.name.as_str());
        let (dtype, shape) = (file_dtype(t.dtype), serde_json::json!(t.tensor.shape()));
        entries
            .push(format!(r#"{key}:{{"dtype":"{dtype:?}","shape":{shape},"data_offsets":[{begin},{end}]}}"#));
    }
    let mut text = format!("{{{}}}", entries.join(","));
    text.push_str(&" ".repeat(text.len().next_multiple_of(8) - text.len()));
    if text.len() as u64 > MAX_HEADER {
        return Err(Error::file(
            path,
            format!("its header would be {} bytes, over {MAX_HEADER}", text.len()),
        ));
    }
    write_file(path, |w| {
        w.write_all(&(text.len() as u64).to_le_bytes())?;
        w.write_all(text.as_bytes())?;
        tensors.iter().try_for_each(|t| write_elements(w, t))
    })
}

pub(super) fn write_elements(w: &mut dyn Write, stored: &Stored) -> io::Result<()> {
    let t = stored.tensor;
    match (t.dtype(), stored.dtype) {
        (DType::F32, DType::F32) => write_as(w, t.f32(), |x| x.to_le_bytes()),
        (DType::F32, DType::F16) => write_as(w, t.f32(), |x| f16::from_f32(x).to_le_bytes()),
        (DType::Bf16, DType::Bf16) => write_as(w, t.bf16(), |x| x.to_le_bytes()),
        (DType::F16, DType::F16) => write_as(w, t.f16(), |x| x.to_le_bytes()),
        (DType::I8, DType::I8) => write_as(w, t.i8(), |x| x.to_le_bytes()),
        (DType::U8, DType::U8) => write_as(w, t.u8(), |x| x.to_le_bytes()),
        (DType::I32, DType::I32) => write_as(w, t.i32(), |x| x.to_le_bytes()),
        (from, to) => panic!("{from:?} elements are not stored as {to:?}"),
    }
}

fn write_as<T: Copy, const N: usize>(
    w: &mut dyn Write,
    values: &[T],
    to: impl Fn(T) -> [u8; N],
) -> io::Result<()> {
    let mut bytes = vec![0; CHUNK.min(values.len() * N)];
    for chunk in values.chunks((CHUNK / N).max(1)) {
        let bytes = &mut bytes[..chunk.len() * N];
        for (slot, &x) in bytes.as_chunks_mut::<N>().0.iter_mut().zip(chunk) {
            *slot = to(x);
        }
        w.write_all(bytes)?;
    }
    Ok(())
}

pub(super) fn file_dtype(dtype: DType) -> Dtype {
    match dtype {
        DType::F32 => Dtype::F32,
        DType::Bf16 => Dtype::BF16,
        DType::F16 => Dtype::F16,
        DType::I8 => Dtype::I8,
        DType::U8 => Dtype::U8,
        DType::I32 => Dtype::I32,
    }
}
