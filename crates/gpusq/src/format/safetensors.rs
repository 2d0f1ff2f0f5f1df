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
/// Most dimensions a tensor may have, as in PyTorch and NumPy.
const MAX_RANK: usize = 64;
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
                source.seek(SeekFrom::Start(position)).and_then(|_| source.read_exact(bytes)).map_err(
                    |e| match e.kind() {
                        io::ErrorKind::UnexpectedEof => {
                            bad(&shard.path, name, "the file was cut short after it was opened; try again")
                        }
                        _ => Error::io(&shard.path)(e),
                    },
                )?;
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
        if shape.len() > MAX_RANK {
            return Err(fail(format!("has {} dimensions, more than {MAX_RANK}", shape.len())));
        }
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
    by_place.sort_by_key(|&(begin, end, ..)| (begin, end));
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

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::fs;

    use proptest::prelude::*;

    use super::*;

    /// The bytes of a file with this header and so many data bytes.
    fn file(header: impl AsRef<[u8]>, data: usize) -> Vec<u8> {
        let header = header.as_ref();
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header);
        bytes.extend((0..data).map(|i| i as u8));
        bytes
    }

    fn open(bytes: Vec<u8>) -> Result<Checkpoint> {
        Checkpoint::from_bytes("some/file.safetensors", bytes)
    }

    /// That these bytes are refused in one line that names the file and the reason.
    #[track_caller]
    fn refused(bytes: Vec<u8>, reason: &str) {
        let error = open(bytes).unwrap_err().to_string();
        assert!(error.starts_with("some/file.safetensors: "), "{error}");
        assert!(error.contains(reason), "{error}");
        assert!(!error.contains('\n') && error.len() < 1000, "{error}");
    }

    const ONE: &str = r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#;

    // The sentences of the specification, in its order.

    #[test]
    fn spec_the_first_eight_bytes_are_the_header_size() {
        open(file(ONE, 8)).unwrap();
        for len in 0..8 {
            refused(vec![0; len], "has at least 8");
        }
        refused(u64::MAX.to_le_bytes().to_vec(), "is not a safetensors file");
        refused(file("", 0), "does not begin with `{`");
        let mut big_endian = file(ONE, 8);
        big_endian[..8].reverse();
        refused(big_endian, "over 100000000");
    }

    #[test]
    fn spec_the_header_is_at_most_100_mb() {
        let mut bytes = 100_000_001u64.to_le_bytes().to_vec();
        bytes.resize(64, b' ');
        refused(bytes.clone(), "over 100000000");
        bytes[..8].copy_from_slice(&100_000_000u64.to_le_bytes());
        refused(bytes, "ends 99999944 bytes before its header does");
    }

    #[test]
    fn spec_the_header_is_utf_8_json() {
        refused(file(b"{\"\xff\":1}", 0), "the header is not UTF-8");
        for broken in ["{", "{]", "{\"a\"}", "{} {}", "{},", "{\"a\":}", "{a:1}", "{'a':1}", "{}\0"] {
            refused(file(broken, 0), "the header is not what the format allows");
        }
        let deep = format!("{{\"a\":{}", "[".repeat(1_000_000));
        refused(file(deep, 0), "the header is not what the format allows");
    }

    #[test]
    fn spec_the_header_begins_with_a_brace() {
        for header in
            [format!(" {ONE}"), format!("\n{ONE}"), "[]".into(), "null".into(), format!("\u{feff}{ONE}")]
        {
            refused(file(header, 8), "does not begin with `{`");
        }
    }

    #[test]
    fn spec_the_header_may_be_padded_with_spaces() {
        for n in [1, 7, 100] {
            open(file(format!("{ONE}{}", " ".repeat(n)), 8)).unwrap();
        }
    }

    #[test]
    fn spec_an_entry_has_dtype_shape_and_data_offsets() {
        for entry in [
            r#"{"dtype":"F32","shape":[2]}"#,
            r#"{"dtype":"F32","data_offsets":[0,8]}"#,
            r#"{"shape":[2],"data_offsets":[0,8]}"#,
            r#"{"dtype":"F32","shape":2,"data_offsets":[0,8]}"#,
            r#"{"dtype":"F32","shape":[2.0],"data_offsets":[0,8]}"#,
            r#"{"dtype":"F32","shape":["2"],"data_offsets":[0,8]}"#,
            r#"{"dtype":"F32","shape":[-2],"data_offsets":[0,8]}"#,
            r#"{"dtype":"F32","shape":[18446744073709551616],"data_offsets":[0,8]}"#,
            r#"{"dtype":"F32","shape":[2],"data_offsets":[0]}"#,
            r#"{"dtype":"F32","shape":[2],"data_offsets":[0,8,8]}"#,
            r#"{"dtype":"F32","shape":[2],"data_offsets":[-8,0]}"#,
            r#"{"dtype":"F32","shape":[2],"data_offsets":8}"#,
            r#"{"dtype":5,"shape":[2],"data_offsets":[0,8]}"#,
            r#"{"dtype":"F32","shape":[2],"data_offsets":[0,8],"more":1}"#,
            r#"["F32",[2],[0,8]]"#,
            "null",
            "1",
            "{}",
        ] {
            refused(file(format!(r#"{{"a":{entry}}}"#), 8), "`a`: ");
        }
    }

    #[test]
    fn spec_the_dtype_is_a_known_one() {
        for dtype in ["F31", "f32", "", "F32 ", "evil\\nline"] {
            let header = format!(r#"{{"a":{{"dtype":"{dtype}","shape":[2],"data_offsets":[0,8]}}}}"#);
            refused(file(header, 8), "tensor `a`: unknown element type");
        }
        // Four bits each: three of them are no whole bytes.
        let header = r#"{"a":{"dtype":"F4","shape":[3],"data_offsets":[0,1]}}"#;
        refused(file(header, 1), "are not whole bytes");
    }

    #[test]
    fn spec_offsets_begin_at_the_byte_buffer() {
        let t = open(file(ONE, 8)).unwrap().tensor("a").unwrap();
        let expected = [0u8, 1, 2, 3, 4, 5, 6, 7];
        assert_eq!(t.f32()[0].to_le_bytes(), expected[..4]);
        assert_eq!(t.f32()[1].to_le_bytes(), expected[4..]);
        refused(
            file(r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[8,16]}}"#, 16),
            "tensor `a`: bytes 0..8 before it belong to no tensor",
        );
    }

    #[test]
    fn spec_end_minus_begin_is_the_tensor_size() {
        for (shape, begin, end) in [("[2]", 0, 7), ("[2]", 0, 9), ("[3]", 0, 8), ("[]", 0, 8), ("[0]", 0, 8)]
        {
            let header =
                format!(r#"{{"a":{{"dtype":"F32","shape":{shape},"data_offsets":[{begin},{end}]}}}}"#);
            refused(file(header, end), "tensor `a`: shape");
        }
        refused(
            file(r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[8,0]}}"#, 8),
            "end at 0, before their begin at 8",
        );
        for shape in [
            "[4294967296,4294967296]",
            "[9223372036854775807]",
            "[0,9223372036854775807,9223372036854775807]",
        ] {
            let header = format!(r#"{{"a":{{"dtype":"F32","shape":{shape},"data_offsets":[0,0]}}}}"#);
            refused(file(header, 0), "overflows");
        }
        let header =
            format!(r#"{{"a":{{"dtype":"F32","shape":[1{}],"data_offsets":[0,4]}}}}"#, ",1".repeat(64));
        refused(file(header, 4), "has 65 dimensions");
        refused(
            file(r#"{"a":{"dtype":"U8","shape":[4000000000000],"data_offsets":[0,4000000000000]}}"#, 9),
            "is cut short: 3999999999991 bytes",
        );
    }

    #[test]
    fn spec_metadata_maps_strings_to_strings() {
        let with = |m: &str| file(format!(r#"{{"__metadata__":{m},{}"#, &ONE[1..]), 8);
        let opened = open(with(r#"{"format":"pt","x":"\u0041"}"#)).unwrap();
        assert_eq!(opened.metadata()["format"], "pt");
        assert_eq!(opened.metadata()["x"], "A");
        assert_eq!(opened.names().collect::<Vec<_>>(), ["a"]);
        for wrong in
            [r#"{"a":1}"#, r#"{"a":null}"#, r#"{"a":{}}"#, r#"{"a":["b"]}"#, "[]", "null", r#""x""#, "{1:2}"]
        {
            refused(with(wrong), "`__metadata__`: ");
        }
    }

    #[test]
    fn spec_duplicate_keys_are_disallowed() {
        let entry = r#"{"dtype":"F32","shape":[2],"data_offsets":[0,8]}"#;
        for second in ["a", "\\u0061"] {
            let header = format!(r#"{{"a":{entry},"{second}":{entry}}}"#);
            refused(file(header, 8), "the name `a` appears twice");
        }
        refused(file(r#"{"__metadata__":{},"__metadata__":{}}"#, 0), "the name `__metadata__` appears twice");
        refused(file(r#"{"__metadata__":{"k":"1","k":"1"}}"#, 0), "the name `k` appears twice");
        for key in ["dtype", "shape", "data_offsets"] {
            let value = serde_json::from_str::<serde_json::Value>(entry).unwrap()[key].to_string();
            let header = format!(r#"{{"a":{{"{key}":{value},{}}}"#, &entry[1..]);
            refused(file(header, 8), "duplicate field");
        }
    }

    #[test]
    fn spec_values_are_not_checked() {
        let mut bytes = file(ONE, 0);
        bytes.extend(f32::NAN.to_le_bytes());
        bytes.extend(f32::INFINITY.to_le_bytes());
        let t = open(bytes).unwrap().tensor("a").unwrap();
        assert!(t.f32()[0].is_nan() && t.f32()[1].is_infinite());
        let error = check_finite("dir", "a", &t).unwrap_err().to_string();
        assert_eq!(error, "dir: tensor `a`: the element at [0] is NaN; a weight must be finite");
    }

    #[test]
    fn spec_empty_tensors_are_allowed() {
        let header = r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},
            "b":{"dtype":"F32","shape":[3,0,2],"data_offsets":[8,8]},
            "c":{"dtype":"F16","shape":[0],"data_offsets":[0,0]}}"#;
        let opened = open(file(header, 8)).unwrap();
        assert_eq!(opened.tensor("b").unwrap(), Tensor::zeros(&[3, 0, 2]));
        assert_eq!(opened.raw("c").unwrap(), Tensor::from_f16(vec![], &[0]));
        open(file("{}", 0)).unwrap();
    }

    #[test]
    fn spec_scalars_have_no_dimensions() {
        let opened = open(file(r#"{"a":{"dtype":"U8","shape":[],"data_offsets":[0,1]}}"#, 1)).unwrap();
        assert_eq!(opened.tensor("a").unwrap(), Tensor::from_u8(vec![0], &[]));
    }

    #[test]
    fn spec_the_buffer_is_indexed_without_holes() {
        let two = |a: (u64, u64), b: (u64, u64)| {
            let entry = |(begin, end): (u64, u64)| {
                format!(r#"{{"dtype":"U8","shape":[{}],"data_offsets":[{begin},{end}]}}"#, end - begin)
            };
            format!(r#"{{"a":{},"b":{}}}"#, entry(a), entry(b))
        };
        open(file(two((0, 4), (4, 8)), 8)).unwrap();
        open(file(two((4, 8), (0, 4)), 8)).unwrap();
        refused(file(two((0, 4), (5, 8)), 8), "tensor `b`: bytes 4..5 before it belong to no tensor");
        refused(file(two((1, 4), (4, 8)), 8), "tensor `a`: bytes 0..1 before it belong to no tensor");
        refused(file(two((0, 5), (4, 8)), 8), "tensor `b`: its bytes 4..8 overlap tensor `a`");
        refused(file(two((0, 8), (0, 8)), 8), "overlap tensor");
        refused(file(two((0, 8), (2, 2)), 8), "overlap tensor");
        refused(file(two((0, 4), (4, 8)), 9), "1 bytes after the last tensor belong to no tensor");
        refused(file("{}", 1), "1 bytes after the last tensor belong to no tensor");
        refused(file(two((0, 4), (4, 8)), 5), "is cut short: 3 bytes");
    }

    // Beyond the specification.

    #[test]
    fn a_file_cut_anywhere_is_refused() {
        let whole = file(ONE, 8);
        for len in 0..whole.len() {
            open(whole[..len].to_vec()).unwrap_err();
        }
        open(whole).unwrap();
    }

    #[test]
    fn a_file_cut_after_opening_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model.safetensors");
        fs::write(&path, file(ONE, 8)).unwrap();
        let opened = Checkpoint::open(dir.path()).unwrap();
        fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(8 + ONE.len() as u64 + 7).unwrap();
        let error = opened.tensor("a").unwrap_err().to_string();
        assert!(error.contains("model.safetensors: tensor `a`: the file was cut short"), "{error}");
    }

    #[test]
    fn a_git_lfs_pointer_is_recognised() {
        let pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n";
        refused(pointer.to_vec(), "git lfs pull");
    }

    #[test]
    fn hostile_names_stay_in_one_short_line() {
        let name = format!("{}\\n{}", "x".repeat(50), "y".repeat(5000));
        let header = format!(r#"{{"{name}":{{"dtype":"F32","shape":[2],"data_offsets":[0,7]}}}}"#);
        refused(file(header, 7), "takes 8 bytes");
        let error = open(file(ONE, 8)).unwrap().tensor("a\nb").unwrap_err().to_string();
        assert_eq!(error, r"some/file.safetensors: tensor `a\nb`: is missing; the checkpoint has 1 tensors");
    }

    /// A file of one tensor `a`.
    fn single(dtype: &str, shape: &[usize], data: &[u8]) -> Checkpoint {
        let header =
            format!(r#"{{"a":{{"dtype":"{dtype}","shape":{shape:?},"data_offsets":[0,{}]}}}}"#, data.len());
        let mut bytes = file(header, 0);
        bytes.extend(data);
        open(bytes).unwrap()
    }

    #[test]
    fn every_type_is_converted_or_refused_by_name() {
        let wide = [1.0f32, -0.5, 65504.0, 1e-7];
        let expected = |f: fn(f32) -> f32| Tensor::from_f32(wide.map(f).to_vec(), &[2, 2]);
        let bytes: Vec<u8> = wide.iter().flat_map(|x| x.to_le_bytes()).collect();
        assert_eq!(single("F32", &[2, 2], &bytes).tensor("a").unwrap(), expected(|x| x));
        let bytes: Vec<u8> = wide.iter().flat_map(|&x| f16::from_f32(x).to_le_bytes()).collect();
        let halves = single("F16", &[2, 2], &bytes);
        assert_eq!(halves.tensor("a").unwrap(), expected(|x| f16::from_f32(x).to_f32()));
        assert_eq!(halves.raw("a").unwrap(), expected(|x| x).to_f16());
        let bytes: Vec<u8> = wide.iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes()).collect();
        let brain = single("BF16", &[2, 2], &bytes);
        assert_eq!(brain.tensor("a").unwrap(), expected(|x| bf16::from_f32(x).to_f32()));
        assert_eq!(brain.raw("a").unwrap(), expected(|x| x).to_bf16());
        let bytes: Vec<u8> = wide.iter().flat_map(|&x| f64::from(x).to_le_bytes()).collect();
        assert_eq!(single("F64", &[2, 2], &bytes).tensor("a").unwrap(), expected(|x| x));

        let whole = [i32::MIN, -1, 0, i32::MAX];
        let expected = Tensor::from_i32(whole.to_vec(), &[4]);
        let bytes: Vec<u8> = whole.iter().flat_map(|x| x.to_le_bytes()).collect();
        assert_eq!(single("I32", &[4], &bytes).tensor("a").unwrap(), expected);
        let bytes: Vec<u8> = whole.iter().flat_map(|&x| i64::from(x).to_le_bytes()).collect();
        assert_eq!(single("I64", &[4], &bytes).tensor("a").unwrap(), expected);
        let bytes: Vec<u8> = [5i64, 1 << 31].iter().flat_map(|x| x.to_le_bytes()).collect();
        let error = single("I64", &[2], &bytes).tensor("a").unwrap_err().to_string();
        assert!(error.contains("tensor `a`: element 1 is 2147483648, which does not fit 32 bits"), "{error}");
        assert_eq!(single("I8", &[2], &[255, 1]).tensor("a").unwrap(), Tensor::from_i8(vec![-1, 1], &[2]));
        assert_eq!(single("U8", &[2], &[255, 1]).tensor("a").unwrap(), Tensor::from_u8(vec![255, 1], &[2]));

        for (dtype, size) in
            [("BOOL", 1), ("F8_E4M3", 1), ("I16", 2), ("U16", 2), ("U32", 4), ("U64", 8), ("C64", 8)]
        {
            let error = single(dtype, &[], &vec![0; size]).tensor("a").unwrap_err().to_string();
            assert!(error.contains("tensor `a`: has elements of type") && error.contains(dtype), "{error}");
        }
        for dtype in ["F64", "I64"] {
            single(dtype, &[], &[0; 8]).raw("a").unwrap_err();
        }
    }

    #[test]
    fn tensors_larger_than_the_buffer_are_whole() {
        let n = CHUNK + 7;
        let t = Tensor::from_f32((0..n).map(|i| i as f32).collect(), &[n]);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.safetensors");
        let all = [("f32".into(), t.clone()), ("bf16".into(), t.to_bf16()), ("f16".into(), t.to_f16())];
        write_safetensors(&path, &all, &BTreeMap::new()).unwrap();
        let opened = Checkpoint::open_file(&path).unwrap();
        for (name, tensor) in &all {
            assert_eq!(&opened.raw(name).unwrap(), tensor);
            assert!(opened.tensor(name).unwrap() == tensor.to_f32(), "{name}");
        }
    }

    #[test]
    fn the_first_element_that_is_not_finite_is_named() {
        let mut t = Tensor::zeros(&[2, 3, 4]);
        check_finite("dir", "w", &t).unwrap();
        t.f32_mut()[17] = f32::NEG_INFINITY;
        t.f32_mut()[20] = f32::NAN;
        for t in [t.clone(), t.to_bf16(), t.to_f16()] {
            let error = check_finite("dir", "w", &t).unwrap_err().to_string();
            assert!(error.contains("`w`: the element at [1, 1, 1] is -inf"), "{error}");
        }
        check_finite("dir", "w", &Tensor::from_i8(vec![-128], &[])).unwrap();
    }

    // Writing.

    #[test]
    fn a_written_file_is_the_reference_implementations() {
        let tensors = [
            ("b".to_string(), Tensor::from_f32(vec![1.0, -2.0], &[2, 1])),
            ("a\"\u{e9}".to_string(), Tensor::from_f32(vec![0.5], &[])),
            ("half".to_string(), Tensor::from_f32(vec![3.0; 3], &[3]).to_f16()),
            ("brain".to_string(), Tensor::from_f32(vec![3.0; 3], &[3]).to_bf16()),
            ("bytes".to_string(), Tensor::from_u8(vec![1, 2, 3], &[3])),
            ("codes".to_string(), Tensor::from_i8(vec![-1, 2, 3], &[3])),
            ("ids".to_string(), Tensor::from_i32(vec![-1, 70000], &[1, 2])),
            ("none".to_string(), Tensor::zeros(&[0, 5])),
        ];
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.safetensors");
        for metadata in [BTreeMap::new(), [("format".to_string(), "pt".to_string())].into()] {
            write_safetensors(&path, &tensors, &metadata).unwrap();
            let ours = fs::read(&path).unwrap();
            let opened = Checkpoint::open_file(&path).unwrap();
            let data: Vec<Vec<u8>> = tensors
                .iter()
                .map(|(_, t)| {
                    let mut bytes = Vec::new();
                    write_elements(&mut bytes, &Stored { name: String::new(), tensor: t, dtype: t.dtype() })
                        .unwrap();
                    bytes
                })
                .collect();
            let views = tensors.iter().zip(&data).map(|((name, t), bytes)| {
                let view =
                    ::safetensors::tensor::TensorView::new(file_dtype(t.dtype()), t.shape().to_vec(), bytes);
                (name.as_str(), view.unwrap())
            });
            let given = metadata.clone().into_iter().collect::<HashMap<_, _>>();
            let given = (!given.is_empty()).then_some(given);
            assert_eq!(ours, ::safetensors::serialize(views, given).unwrap());
            assert_eq!(opened.metadata(), &metadata);
            for (name, tensor) in &tensors {
                assert_eq!(&opened.raw(name).unwrap(), tensor);
            }
            let header = u64::from_le_bytes(ours[..8].try_into().unwrap());
            assert_eq!(header % 8, 0);
        }
    }

    #[test]
    fn names_that_cannot_be_written_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.safetensors");
        let t = Tensor::zeros(&[1]);
        for (names, reason) in [(["a", "a"], "is given twice"), (["a", "__metadata__"], "reserves this name")]
        {
            let tensors = names.map(|n| (n.to_string(), t.clone()));
            let error = write_safetensors(&path, &tensors, &BTreeMap::new()).unwrap_err().to_string();
            assert!(error.contains(reason), "{error}");
        }
        assert!(!path.exists());
    }

    // Folders and shards.

    /// A checkpoint of two shards, `a` in the first and `b` in the second, changed by `change`.
    fn sharded(change: impl FnOnce(&Path, &mut serde_json::Value)) -> Result<Checkpoint> {
        let dir = tempfile::tempdir().unwrap();
        for (shard, name, x) in [("1.safetensors", "a", 1.0), ("2.safetensors", "b", 2.0)] {
            let tensors = [(name.to_string(), Tensor::scalar(x))];
            write_safetensors(dir.path().join(shard), &tensors, &BTreeMap::new()).unwrap();
        }
        let mut index = serde_json::json!({
            "metadata": {"total_size": 8},
            "weight_map": {"a": "1.safetensors", "b": "2.safetensors"}
        });
        change(dir.path(), &mut index);
        fs::write(dir.path().join("model.safetensors.index.json"), index.to_string()).unwrap();
        let opened = Checkpoint::open(dir.path())?;
        assert_eq!(opened.tensor("a")?, Tensor::scalar(1.0));
        assert_eq!(opened.tensor("b")?, Tensor::scalar(2.0));
        Ok(opened)
    }

    #[track_caller]
    fn shards_refused(change: impl FnOnce(&Path, &mut serde_json::Value), reasons: &[&str]) {
        let error = sharded(change).unwrap_err().to_string();
        for reason in reasons {
            assert!(error.contains(reason), "{error}");
        }
        assert!(!error.contains('\n'), "{error}");
    }

    #[test]
    fn shards_are_read_as_one_checkpoint() {
        let opened = sharded(|_, _| ()).unwrap();
        assert_eq!(opened.names().collect::<Vec<_>>(), ["a", "b"]);
        assert_eq!(opened.info("b"), Some(&Info { dtype: Dtype::F32, shape: vec![1] }));
        assert_eq!(opened.info("c"), None);
    }

    #[test]
    fn shards_and_index_must_agree() {
        shards_refused(
            |dir, _| fs::remove_file(dir.join("2.safetensors")).unwrap(),
            &["2.safetensors: is missing", "index.json names it", "again"],
        );
        shards_refused(
            |_, index| index["weight_map"]["c"] = "2.safetensors".into(),
            &["2.safetensors: tensor `c`: is not there"],
        );
        shards_refused(
            |_, index| {
                index["weight_map"]["b"] = "1.safetensors".into();
                index["weight_map"]["a"] = "2.safetensors".into();
            },
            &["tensor `a`: is here, but", "puts it in 2.safetensors"],
        );
        shards_refused(
            |dir, _| {
                let both = ["b", "c"].map(|n| (n.to_string(), Tensor::scalar(2.0)));
                write_safetensors(dir.join("2.safetensors"), &both, &BTreeMap::new()).unwrap();
            },
            &["2.safetensors: tensor `c`: is here, but", "does not name it"],
        );
        shards_refused(
            |dir, _| {
                let both = ["a", "b"].map(|n| (n.to_string(), Tensor::scalar(2.0)));
                write_safetensors(dir.join("2.safetensors"), &both, &BTreeMap::new()).unwrap();
            },
            &["2.safetensors: tensor `a`: is also in", "1.safetensors"],
        );
        shards_refused(
            |dir, _| fs::write(dir.join("2.safetensors"), b"short").unwrap(),
            &["2.safetensors: is 5 bytes long"],
        );
    }

    #[test]
    fn shard_names_stay_in_the_folder() {
        for name in [
            "../x.safetensors",
            "/etc/x.safetensors",
            "a/b.safetensors",
            "./x.safetensors",
            "..",
            "",
            ".",
            "x.bin",
            "..\\x.safetensors",
            "C:x.safetensors",
            "x.safetensors/",
            "x\0.safetensors",
            "a//b.safetensors",
        ] {
            let index = serde_json::json!({"weight_map": {"w": name}}).to_string();
            let error = parse_index("index.json", index.as_bytes()).unwrap_err().to_string();
            assert!(error.starts_with("index.json: puts tensor `w` in"), "{error}");
        }
        let fine = br#"{"weight_map":{"w":"model-00001-of-00002.safetensors"}}"#;
        assert_eq!(parse_index("index.json", fine).unwrap()["w"], "model-00001-of-00002.safetensors");
    }

    #[test]
    fn a_broken_index_is_refused() {
        for (index, reason) in [
            ("", "is not a checkpoint's index"),
            ("[]", "is not a checkpoint's index"),
            ("{", "is not a checkpoint's index"),
            (r#"[{"a":"x.safetensors"}]"#, "an object with `weight_map`"),
            ("{}", "missing field `weight_map`"),
            (r#"{"weight_map":{}}"#, "names no tensors"),
            (r#"{"weight_map":[]}"#, "is not a checkpoint's index"),
            (r#"{"weight_map":{"a":1}}"#, "is not a checkpoint's index"),
            (r#"{"weight_map":{"a":"x.safetensors","a":"y.safetensors"}}"#, "the name `a` appears twice"),
            (r#"{"weight_map":{"a":"x.safetensors"},"weight_map":{}}"#, "duplicate field"),
        ] {
            let error = parse_index("index.json", index.as_bytes()).unwrap_err().to_string();
            assert!(error.starts_with("index.json: ") && error.contains(reason), "{index}: {error}");
        }
        parse_index("index.json", b"{\"weight_map\":{\"a\":\"\xff\"}}").unwrap_err();
    }

    #[test]
    fn a_folder_without_a_model_says_what_is_expected() {
        let dir = tempfile::tempdir().unwrap();
        let says = |path: &Path, text: &str| {
            let error = Checkpoint::open(path).unwrap_err().to_string();
            assert!(error.contains(text), "{error}");
        };
        says(dir.path(), "neither model.safetensors nor model.safetensors.index.json");
        says(&dir.path().join("x"), "no such folder");
        fs::write(dir.path().join("pytorch_model.bin"), b"PK").unwrap();
        says(dir.path(), "save_pretrained");
        says(&dir.path().join("pytorch_model.bin"), "is a file, not a checkpoint folder");
        fs::create_dir(dir.path().join("model.safetensors")).unwrap();
        says(dir.path(), "is not a regular file");
    }

    #[test]
    fn shared_checkpoints_open() {
        let shared = std::env::var("GPUSQ_SHARED_DIR")
            .unwrap_or_else(|_| concat!(env!("CARGO_MANIFEST_DIR"), "/../../../shared").into());
        let Ok(cases) = fs::read_dir(Path::new(&shared).join("golden")) else {
            eprintln!("skipped: no checkpoints under {shared}");
            return;
        };
        for case in cases {
            let dir = case.unwrap().path();
            if !dir.join("model.safetensors").exists() {
                continue;
            }
            for opened in [Checkpoint::open(&dir), Checkpoint::open_file(dir.join("golden.safetensors"))] {
                let opened = opened.unwrap();
                let bytes = fs::read(if opened.path() == dir {
                    dir.join("model.safetensors")
                } else {
                    opened.path().to_path_buf()
                })
                .unwrap();
                same_as_reference(&opened, &bytes);
            }
        }
    }

    /// That the reference implementation reads the same tensors from the same bytes.
    fn same_as_reference(opened: &Checkpoint, bytes: &[u8]) {
        let reference = ::safetensors::SafeTensors::deserialize(bytes).unwrap();
        assert_eq!(opened.names().count(), reference.len());
        for name in opened.names() {
            let (ours, theirs) = (opened.info(name).unwrap(), reference.tensor(name).unwrap());
            assert_eq!((ours.dtype, &ours.shape[..]), (theirs.dtype(), theirs.shape()));
            if let Ok(tensor) = opened.raw(name) {
                let mut written = Vec::new();
                let stored = Stored { name: String::new(), dtype: tensor.dtype(), tensor: &tensor };
                write_elements(&mut written, &stored).unwrap();
                assert_eq!(written, theirs.data(), "{name}");
            }
        }
    }

    proptest! {
        #[test]
        fn damaged_files_are_refused_or_read_as_the_reference_does(
            edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
            cut in prop::option::of(any::<prop::sample::Index>()),
        ) {
            let header = r#"{"__metadata__":{"k":"v"},"a":{"dtype":"F32","shape":[1,2],"data_offsets":[4,12]},"b":{"dtype":"I8","shape":[4],"data_offsets":[0,4]}}  "#;
            let mut bytes = file(header, 12);
            for (at, with) in edits {
                let at = at.index(bytes.len());
                // Digits, quotes and brackets lead further into the checks than any byte does.
                bytes[at] = if with < 200 { b"0123456789\"[]{},:ab"[usize::from(with) % 19] } else { with };
            }
            if let Some(cut) = cut {
                bytes.truncate(cut.index(bytes.len()));
            }
            if let Ok(opened) = open(bytes.clone()) {
                same_as_reference(&opened, &bytes);
            }
        }
    }
}
