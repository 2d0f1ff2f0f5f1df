//! Safetensors: reading the checkpoints others write, and writing our own.
//!
//! Every sentence of the format's specification (README of the `safetensors` crate, "Format") is checked
//! when a file is opened, before any tensor is read. The crate itself supplies the element types; its
//! reader needs the whole file in memory or mapped (`unsafe`), keeps the last of duplicate names, and does
//! not say which tensor is wrong, so the header is read here. Elements are read when asked for.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io::{self, Cursor, Read, Seek, SeekFrom, Write};
use std::path::{Component, Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use gpusq_tensor::{DType, Tensor, bf16, f16};
use half::slice::HalfFloatSliceExt;
use serde::de::{Deserialize, Deserializer, Error as _, IgnoredAny, MapAccess, Visitor, value};

pub use ::safetensors::Dtype;

use crate::format::atomic::write_file;
use crate::{Error, Result};

/// Longest header, in bytes, that the format's reference implementation reads.
const MAX_HEADER: u64 = 100_000_000;
/// The key of the free-form text in a header.
const METADATA: &str = "__metadata__";
/// Elements pass through a buffer of this many bytes (a multiple of every element size), so that no tensor
/// is in memory twice.
const CHUNK: usize = 1 << 18;

/// What a header says about one tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Info {
    /// Element type in the file.
    pub dtype: Dtype,
    /// Extent of each dimension; empty for a scalar.
    pub shape: Vec<usize>,
}

/// An opened checkpoint: one safetensors file, or the shards an index names. Its headers are checked;
/// elements are read when asked for, from any thread.
pub struct Checkpoint {
    path: PathBuf,
    shards: Vec<Shard>,
    tensors: BTreeMap<String, Located>,
    metadata: BTreeMap<String, String>,
}

struct Shard {
    path: PathBuf,
    source: Mutex<Box<dyn Source>>,
}

trait Source: Read + Seek + Send {}
impl<T: Read + Seek + Send> Source for T {}

struct Located {
    shard: usize,
    /// Position of the first element in the shard.
    begin: u64,
    info: Info,
}

impl Checkpoint {
    /// Opens the checkpoint in the folder `dir`: `model.safetensors`, or else the shards that
    /// `model.safetensors.index.json` names.
    ///
    /// # Errors
    /// One that names the file, and the tensor where there is one: neither file is there (with how to
    /// convert an older `pytorch_model.bin`), a header breaks the format, a shard is missing, or index and
    /// shards disagree.
    pub fn open(dir: impl AsRef<Path>) -> Result<Checkpoint> {
        let dir = dir.as_ref();
        let single = dir.join("model.safetensors");
        let index = dir.join("model.safetensors.index.json");
        if single.exists() {
            Ok(Checkpoint { path: dir.to_path_buf(), ..Self::open_file(single)? })
        } else if index.exists() {
            Self::open_sharded(dir, &index)
        } else {
            Err(no_model(dir))
        }
    }

    /// Opens one safetensors file.
    ///
    /// # Errors
    /// [`Error::Io`] when it cannot be read, [`Error::File`] or [`Error::Tensor`] when it breaks the format.
    pub fn open_file(path: impl AsRef<Path>) -> Result<Checkpoint> {
        let path = path.as_ref();
        Self::from_source(path, Box::new(open_regular(path)?))
    }

    /// A checkpoint from the bytes of one safetensors file; errors call it `name`.
    ///
    /// # Errors
    /// [`Error::File`] or [`Error::Tensor`] when they break the format.
    pub fn from_bytes(name: impl AsRef<Path>, bytes: Vec<u8>) -> Result<Checkpoint> {
        Self::from_source(name.as_ref(), Box::new(Cursor::new(bytes)))
    }

    fn from_source(path: &Path, mut source: Box<dyn Source>) -> Result<Checkpoint> {
        let header = read_header(path, &mut source)?;
        let tensors = header.tensors.into_iter().map(|(name, (begin, info))| {
            let located = Located { shard: 0, begin, info };
            (name, located)
        });
        Ok(Checkpoint {
            path: path.to_path_buf(),
            tensors: tensors.collect(),
            metadata: header.metadata,
            shards: vec![Shard { path: path.to_path_buf(), source: Mutex::new(source) }],
        })
    }

    fn open_sharded(dir: &Path, index: &Path) -> Result<Checkpoint> {
        let mut file = open_regular(index)?;
        let len = file.metadata().map_err(Error::io(index))?.len();
        if len > MAX_HEADER {
            return Err(Error::file(index, format!("is {len} bytes long, more than {MAX_HEADER}")));
        }
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).map_err(Error::io(index))?;
        let weight_map = parse_index(index, &bytes)?;

        let mut all = Checkpoint {
            path: dir.to_path_buf(),
            shards: Vec::new(),
            tensors: BTreeMap::new(),
            metadata: BTreeMap::new(),
        };
        let mut shards: Vec<&String> = weight_map.values().collect();
        shards.sort();
        shards.dedup();
        for shard in shards {
            let path = dir.join(shard);
            if !path.exists() {
                return Err(Error::file(
                    &path,
                    format!(
                        "is missing, but {} names it; download the whole checkpoint again",
                        index.display()
                    ),
                ));
            }
            let one = Self::open_file(&path)?;
            for (name, located) in one.tensors {
                if let Some(other) = all.tensors.get(&name) {
                    let other = all.shards[other.shard].path.display();
                    return Err(bad(
                        &path,
                        &name,
                        format!("is also in {other}; a name must be in one shard"),
                    ));
                }
                if weight_map.get(&name) != Some(shard) {
                    let says = match weight_map.get(&name) {
                        Some(other) => format!("puts it in {}", shown(other)),
                        None => "does not name it".to_string(),
                    };
                    return Err(bad(&path, &name, format!("is here, but {} {says}", index.display())));
                }
                all.tensors.insert(name, Located { shard: all.shards.len(), ..located });
            }
            for (key, value) in one.metadata {
                all.metadata.entry(key).or_insert(value);
            }
            all.shards.extend(one.shards);
        }
        match weight_map.iter().find(|(name, _)| !all.tensors.contains_key(*name)) {
            Some((name, shard)) => {
                let message = format!("is not there, but {} says so", index.display());
                Err(bad(&dir.join(shard), name, message))
            }
            None => Ok(all),
        }
    }

    /// The folder or file this checkpoint was opened from.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The free-form text of the header. With several shards, the first to have a key gives its value.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// All tensor names, in order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Type and shape of the tensor `name`, or `None` if there is none.
    pub fn info(&self, name: &str) -> Option<&Info> {
        self.tensors.get(name).map(|located| &located.info)
    }

    /// The tensor `name` in a type this program computes with: F32, F16, BF16 and F64 become f32, I64 and
    /// I32 become i32, I8 and U8 stay.
    ///
    /// # Errors
    /// [`Error::Tensor`] when there is no such tensor, its type is another, or an I64 does not fit an i32;
    /// [`Error::Io`] when the file cannot be read.
    pub fn tensor(&self, name: &str) -> Result<Tensor> {
        let at = self.locate(name)?;
        let shape = &at.info.shape;
        Ok(match at.info.dtype {
            Dtype::F16 => {
                let mut half = Vec::new();
                let wide = self.read(name, at, |bytes, out: &mut Vec<f32>| {
                    half.clear();
                    half.extend(elements(bytes, f16::from_le_bytes));
                    let done = out.len();
                    out.resize(done + half.len(), 0.0);
                    half.convert_to_f32_slice(&mut out[done..]);
                    Ok(())
                })?;
                Tensor::from_f32(wide, shape)
            }
            Dtype::BF16 => Tensor::from_f32(
                self.read_as(name, at, |b| f32::from_bits(u32::from(u16::from_le_bytes(b)) << 16))?,
                shape,
            ),
            Dtype::F64 => Tensor::from_f32(self.read_as(name, at, |b| f64::from_le_bytes(b) as f32)?, shape),
            Dtype::I64 => {
                let narrow = self.read(name, at, |bytes, out: &mut Vec<i32>| {
                    for x in elements(bytes, i64::from_le_bytes) {
                        out.push(i32::try_from(x).map_err(|_| {
                            format!("element {} is {x}, which does not fit 32 bits", out.len())
                        })?);
                    }
                    Ok(())
                })?;
                Tensor::from_i32(narrow, shape)
            }
            _ => self.raw(name)?,
        })
    }

    /// The tensor `name` in the type the file has it in: F32, BF16, F16, I8, U8 or I32.
    ///
    /// # Errors
    /// [`Error::Tensor`] when there is no such tensor or its type is another; [`Error::Io`] when the file
    /// cannot be read.
    pub fn raw(&self, name: &str) -> Result<Tensor> {
        let at = self.locate(name)?;
        let shape = &at.info.shape;
        Ok(match at.info.dtype {
            Dtype::F32 => Tensor::from_f32(self.read_as(name, at, f32::from_le_bytes)?, shape),
            Dtype::BF16 => Tensor::from_bf16(self.read_as(name, at, bf16::from_le_bytes)?, shape),
            Dtype::F16 => Tensor::from_f16(self.read_as(name, at, f16::from_le_bytes)?, shape),
            Dtype::I8 => Tensor::from_i8(self.read_as(name, at, i8::from_le_bytes)?, shape),
            Dtype::U8 => Tensor::from_u8(self.read_as(name, at, u8::from_le_bytes)?, shape),
            Dtype::I32 => Tensor::from_i32(self.read_as(name, at, i32::from_le_bytes)?, shape),
            other => {
                let message = format!(
                    "has elements of type {other:?}, which gpusq does not use; save it as F32, F16 or BF16 \
                     (weights) or I32 (indices)"
                );
                return Err(bad(&self.shards[at.shard].path, name, message));
            }
        })
    }

    fn locate(&self, name: &str) -> Result<&Located> {
        self.tensors.get(name).ok_or_else(|| {
            let message = format!("is missing; the checkpoint has {} tensors", self.tensors.len());
            bad(&self.path, name, message)
        })
    }

    fn read_as<const N: usize, T>(
        &self,
        name: &str,
        at: &Located,
        from: impl Fn([u8; N]) -> T,
    ) -> Result<Vec<T>> {
        self.read(name, at, |bytes, out| {
            out.extend(elements(bytes, &from));
            Ok(())
        })
    }

    /// All elements of one tensor; `decode` turns whole elements of bytes into values or says what is wrong.
    fn read<T>(
        &self,
        name: &str,
        at: &Located,
        mut decode: impl FnMut(&[u8], &mut Vec<T>) -> std::result::Result<(), String>,
    ) -> Result<Vec<T>> {
        let shard = &self.shards[at.shard];
        // Opening has checked that the bytes are in the file, so neither product nor allocation runs away.
        let count: usize = at.info.shape.iter().product();
        let mut left = count * (at.info.dtype.bitsize() / 8);
        let mut position = at.begin;
        let mut out = Vec::with_capacity(count);
        let mut buffer = vec![0; left.min(CHUNK)];
        while left > 0 {
            let bytes = &mut buffer[..left.min(CHUNK)];
            {
                let mut source = shard.source.lock().unwrap_or_else(PoisonError::into_inner);
                source
                    .seek(SeekFrom::Start(position))
                    .and_then(|_| source.read_exact(bytes))
                    .map_err(Error::io(&shard.path))?;
            }
            decode(bytes, &mut out).map_err(|message| bad(&shard.path, name, message))?;
            position += bytes.len() as u64;
            left -= bytes.len();
        }
        Ok(out)
    }
}

impl fmt::Debug for Checkpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Checkpoint({}, {} tensors)", self.path.display(), self.tensors.len())
    }
}

/// The file that holds each tensor, from the content of a `model.safetensors.index.json`. Errors call the
/// file `path`.
///
/// # Errors
/// [`Error::File`] when it is not JSON, has no `weight_map` from names to names, repeats a tensor's name, or
/// a shard is not a plain `*.safetensors` name in the same folder.
pub fn parse_index(path: impl AsRef<Path>, bytes: &[u8]) -> Result<BTreeMap<String, String>> {
    struct Index(BTreeMap<String, String>);

    impl<'de> Deserialize<'de> for Index {
        fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
            struct IndexVisitor;
            impl<'de> Visitor<'de> for IndexVisitor {
                type Value = Index;
                fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                    f.write_str("an object with `weight_map`")
                }
                fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Index, A::Error> {
                    let mut weight_map = None;
                    while let Some(key) = map.next_key::<String>()? {
                        if key != "weight_map" {
                            map.next_value::<IgnoredAny>()?;
                        } else if weight_map.replace(map.next_value::<Unique<String>>()?).is_some() {
                            return Err(A::Error::duplicate_field("weight_map"));
                        }
                    }
                    weight_map.map(|w| Index(w.0)).ok_or_else(|| A::Error::missing_field("weight_map"))
                }
            }
            deserializer.deserialize_map(IndexVisitor)
        }
    }

    let path = path.as_ref();
    let Index(weight_map) = serde_json::from_slice(bytes)
        .map_err(|e| Error::file(path, format!("is not a checkpoint's index: {}", one_line(e))))?;
    if weight_map.is_empty() {
        return Err(Error::file(path, "names no tensors in `weight_map`"));
    }
    for (name, shard) in &weight_map {
        let mut parts = Path::new(shard).components();
        let plain = matches!((parts.next(), parts.next()),
            (Some(Component::Normal(only)), None) if only == shard.as_str());
        if !plain || shard.contains(['\\', '/', ':', '\0']) || !shard.ends_with(".safetensors") {
            let message = format!(
                "puts tensor `{}` in `{}`, which is not the name of a .safetensors file in this folder",
                shown(name),
                shown(shard)
            );
            return Err(Error::file(path, message));
        }
    }
    Ok(weight_map)
}

/// Checks that every element of a float tensor is finite (integers always are).
///
/// # Errors
/// [`Error::Tensor`] naming `path`, `name` and the index of the first element that is not.
pub fn check_finite(path: impl AsRef<Path>, name: &str, tensor: &Tensor) -> Result<()> {
    let first = match tensor.dtype() {
        DType::F32 => first_bad(tensor.f32(), |x| x),
        DType::F16 => first_bad(tensor.f16(), f16::to_f32),
        DType::Bf16 => first_bad(tensor.bf16(), bf16::to_f32),
        DType::I8 | DType::U8 | DType::I32 => None,
    };
    let Some((mut flat, value)) = first else { return Ok(()) };
    let mut index = vec![0; tensor.shape().len()];
    for (i, &extent) in index.iter_mut().zip(tensor.shape()).rev() {
        *i = flat % extent;
        flat /= extent;
    }
    let message = format!("the element at {index:?} is {value}; a weight must be finite");
    Err(bad(path.as_ref(), name, message))
}

fn first_bad<T: Copy>(elements: &[T], wide: impl Fn(T) -> f32) -> Option<(usize, f32)> {
    elements.iter().map(|&x| wide(x)).enumerate().find(|(_, x)| !x.is_finite())
}

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
    let stored = tensors.iter().map(|(name, t)| Stored { name: name.clone(), tensor: t, dtype: t.dtype() });
    write_stored(path.as_ref(), stored.collect(), metadata)
}

/// A tensor to write; one of f32 may be stored as F16, rounded on its way out.
pub(super) struct Stored<'a> {
    pub(super) name: String,
    pub(super) tensor: &'a Tensor,
    pub(super) dtype: DType,
}

pub(super) fn write_stored(
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

fn write_elements(w: &mut dyn Write, stored: &Stored) -> io::Result<()> {
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

fn elements<const N: usize, T>(bytes: &[u8], from: impl Fn([u8; N]) -> T) -> impl Iterator<Item = T> {
    bytes.as_chunks::<N>().0.iter().map(move |&b| from(b))
}

fn file_dtype(dtype: DType) -> Dtype {
    match dtype {
        DType::F32 => Dtype::F32,
        DType::Bf16 => Dtype::BF16,
        DType::F16 => Dtype::F16,
        DType::I8 => Dtype::I8,
        DType::U8 => Dtype::U8,
        DType::I32 => Dtype::I32,
    }
}

struct Header {
    metadata: BTreeMap<String, String>,
    /// Position of the first element in the file, type and shape.
    tensors: BTreeMap<String, (u64, Info)>,
}

/// Reads the header and checks it against the file's length.
fn read_header(path: &Path, source: &mut dyn Source) -> Result<Header> {
    let not_ours = |message: String| Error::file(path, message);
    let len = source.seek(SeekFrom::End(0)).map_err(Error::io(path))?;
    source.seek(SeekFrom::Start(0)).map_err(Error::io(path))?;
    let mut first = [0; 8];
    if len < 8 {
        return Err(not_ours(format!("is {len} bytes long; a safetensors file has at least 8")));
    }
    source.read_exact(&mut first).map_err(Error::io(path))?;
    if &first == b"version " {
        return Err(not_ours(
            "is a Git LFS pointer, not the weights; run `git lfs pull` in its folder".into(),
        ));
    }
    let header_len = u64::from_le_bytes(first);
    if header_len > MAX_HEADER {
        return Err(not_ours(format!(
            "is not a safetensors file: the header would be {header_len} bytes, over {MAX_HEADER}"
        )));
    }
    let data = 8 + header_len;
    if data > len {
        return Err(not_ours(format!(
            "ends {} bytes before its header does; it is cut short (copy or download it again) or not a \
             safetensors file",
            data - len
        )));
    }
    let mut text = vec![0; header_len as usize];
    source.read_exact(&mut text).map_err(Error::io(path))?;
    if text.first() != Some(&b'{') {
        return Err(not_ours("is not a safetensors file: its header does not begin with `{`".into()));
    }
    let text = std::str::from_utf8(&text).map_err(|e| not_ours(format!("the header is not UTF-8: {e}")))?;
    let RawHeader { metadata, tensors } = serde_json::from_str(text)
        .map_err(|e| not_ours(format!("the header is not what the format allows: {}", one_line(e))))?;

    let mut by_place = Vec::with_capacity(tensors.len());
    for (name, Entry { dtype, shape, data_offsets: (begin, end) }) in tensors {
        let fail = |message: String| bad(path, &name, message);
        let dtype = Dtype::deserialize(value::StrDeserializer::<value::Error>::new(&dtype))
            .map_err(|_| fail(format!("unknown element type `{}`", shown(&dtype))))?;
        if end < begin {
            return Err(fail(format!("its data_offsets end at {end}, before their begin at {begin}")));
        }
        let (shape, bits) =
            extent(&shape, dtype).ok_or_else(|| fail(format!("its shape {shape:?} overflows")))?;
        if bits % 8 != 0 {
            return Err(fail(format!("{bits} bits of {dtype:?} are not whole bytes")));
        }
        if end - begin != bits / 8 {
            return Err(fail(format!(
                "shape {shape:?} of {dtype:?} takes {} bytes, but its data_offsets span {}",
                bits / 8,
                end - begin
            )));
        }
        by_place.push((begin, end, name, Info { dtype, shape }));
    }
    by_place.sort_by(|a, b| (a.0, a.1).cmp(&(b.0, b.1)));
    let mut covered = 0;
    let mut previous: Option<&str> = None;
    for (begin, end, name, _) in &by_place {
        if *begin > covered {
            return Err(bad(path, name, format!("bytes {covered}..{begin} before it belong to no tensor")));
        }
        if *begin < covered {
            let other = shown(previous.unwrap_or_default());
            return Err(bad(path, name, format!("its bytes {begin}..{end} overlap tensor `{other}`")));
        }
        covered = *end;
        previous = Some(name);
    }
    let there = len - data;
    if covered > there {
        return Err(not_ours(format!(
            "is cut short: {} bytes of its tensors are missing; copy or download it again",
            covered - there
        )));
    }
    if covered < there {
        return Err(not_ours(format!("{} bytes after the last tensor belong to no tensor", there - covered)));
    }
    let tensors = by_place.into_iter().map(|(begin, _, name, info)| (name, (data + begin, info))).collect();
    Ok(Header { metadata, tensors })
}

/// The shape in this machine's integers, and its size in bits. Zero extents do not hide an overflow of the
/// others, since code that looks at some of the dimensions multiplies those alone.
fn extent(shape: &[u64], dtype: Dtype) -> Option<(Vec<usize>, u64)> {
    let shape = shape.iter().map(|&d| usize::try_from(d).ok()).collect::<Option<Vec<_>>>()?;
    let bound = shape.iter().try_fold(dtype.bitsize(), |n, &d| n.checked_mul(d.max(1)))?;
    let bits = if shape.contains(&0) { 0 } else { bound };
    isize::try_from(bound).ok()?;
    Some((shape, bits as u64))
}

struct RawHeader {
    metadata: BTreeMap<String, String>,
    tensors: BTreeMap<String, Entry>,
}

impl<'de> Deserialize<'de> for RawHeader {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct HeaderVisitor;
        impl<'de> Visitor<'de> for HeaderVisitor {
            type Value = RawHeader;
            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("an object of tensors")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<RawHeader, A::Error> {
                let mut metadata: Option<Unique<String>> = None;
                let mut tensors = BTreeMap::new();
                while let Some(key) = map.next_key::<String>()? {
                    let inside = |e: A::Error| A::Error::custom(format!("`{key}`: {e}"));
                    if key == METADATA {
                        if metadata.replace(map.next_value().map_err(inside)?).is_some() {
                            return Err(twice(&key));
                        }
                    } else {
                        let entry: Entry = map.next_value().map_err(inside)?;
                        if tensors.contains_key(&key) {
                            return Err(twice(&key));
                        }
                        tensors.insert(key, entry);
                    }
                }
                Ok(RawHeader { metadata: metadata.map(|m| m.0).unwrap_or_default(), tensors })
            }
        }
        deserializer.deserialize_map(HeaderVisitor)
    }
}

/// One tensor of a header as written there.
struct Entry {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

impl<'de> Deserialize<'de> for Entry {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        // The derived code would also take an array of the three values.
        struct EntryVisitor;
        impl<'de> Visitor<'de> for EntryVisitor {
            type Value = Entry;
            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("an object of dtype, shape and data_offsets")
            }
            fn visit_map<A: MapAccess<'de>>(self, map: A) -> std::result::Result<Entry, A::Error> {
                #[derive(serde::Deserialize)]
                #[serde(deny_unknown_fields)]
                struct Fields {
                    dtype: String,
                    shape: Vec<u64>,
                    data_offsets: (u64, u64),
                }
                let Fields { dtype, shape, data_offsets } =
                    Fields::deserialize(value::MapAccessDeserializer::new(map))?;
                Ok(Entry { dtype, shape, data_offsets })
            }
        }
        deserializer.deserialize_map(EntryVisitor)
    }
}

/// A map that refuses a repeated key, where serde's own maps would keep the last.
struct Unique<V>(BTreeMap<String, V>);

impl<'de, V: Deserialize<'de>> Deserialize<'de> for Unique<V> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct UniqueVisitor<V>(std::marker::PhantomData<V>);
        impl<'de, V: Deserialize<'de>> Visitor<'de> for UniqueVisitor<V> {
            type Value = Unique<V>;
            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("an object")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Unique<V>, A::Error> {
                let mut entries = BTreeMap::new();
                while let Some((key, value)) = map.next_entry::<String, V>()? {
                    if entries.contains_key(&key) {
                        return Err(twice(&key));
                    }
                    entries.insert(key, value);
                }
                Ok(Unique(entries))
            }
        }
        deserializer.deserialize_map(UniqueVisitor(std::marker::PhantomData))
    }
}

fn twice<E: serde::de::Error>(key: &str) -> E {
    E::custom(format!("the name `{key}` appears twice"))
}

fn open_regular(path: &Path) -> Result<File> {
    // Opening a pipe would wait for a writer that may never come.
    if !std::fs::metadata(path).map_err(Error::io(path))?.is_file() {
        return Err(Error::file(path, "is not a regular file"));
    }
    File::open(path).map_err(Error::io(path))
}

fn no_model(dir: &Path) -> Error {
    if !dir.is_dir() {
        let what =
            if dir.exists() { "is a file, not a checkpoint folder" } else { "there is no such folder" };
        return Error::file(dir, what);
    }
    for old in ["pytorch_model.bin", "pytorch_model.bin.index.json"] {
        if dir.join(old).exists() {
            return Error::file(
                dir.join(old),
                "holds the weights in the older pickle format, which can run code when it is read; convert it \
                 in Python with transformers: AutoModel...from_pretrained(DIR).save_pretrained(NEW_DIR), with \
                 the Auto class of your task, and use NEW_DIR",
            );
        }
    }
    Error::file(
        dir,
        "holds neither model.safetensors nor model.safetensors.index.json; is it a checkpoint folder?",
    )
}

/// An [`Error::Tensor`] whose name, which comes from the file, cannot break the line.
pub(super) fn bad(path: &Path, name: &str, message: impl Into<String>) -> Error {
    Error::tensor(path, shown(name), message)
}

/// Text from a file made fit for an error message: one line, not endless.
fn shown(text: &str) -> String {
    const MOST: usize = 200;
    let mut line = String::new();
    for c in text.chars().take(MOST) {
        if c.is_control() {
            line.extend(c.escape_default());
        } else {
            line.push(c);
        }
    }
    if text.chars().nth(MOST).is_some() {
        line.push('…');
    }
    line
}

fn one_line(e: impl fmt::Display) -> String {
    shown(&e.to_string())
}
