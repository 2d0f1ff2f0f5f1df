//! An opened checkpoint, of one file or of shards, and its elements.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io::{self, Cursor, Read, Seek, SeekFrom};
use std::path::{Component, Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use gpusq_tensor::{Tensor, bf16, f16};
use half::slice::HalfFloatSliceExt;
use serde::de::{Deserialize, Deserializer, Error as _, IgnoredAny, MapAccess, Visitor};

use super::checksum::{self, Sum};
use super::header::{Info, read_header};
use super::{CHUNK, Dtype, MAX_HEADER, bad, one_line, shown};
use crate::format::unique::Unique;
use crate::{Error, Result, textfile};

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
    /// What its bytes must sum to, where the file says so.
    checksum: Option<u32>,
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
        let mut header = read_header(path, &mut *source)?;
        let there = |name: &str| header.tensors.contains_key(name);
        let checksums = checksum::take(path, &mut header.metadata, there)?;
        let tensors = header.tensors.into_iter().map(|(name, (begin, info))| {
            let checksum = checksums.get(&name).copied();
            let located = Located { shard: 0, begin, info, checksum };
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

    /// The file that holds the tensor `name` or, if there is none, where it would be: the only file, or the folder
    /// of the shards.
    pub fn path_of(&self, name: &str) -> &Path {
        match (self.tensors.get(name), &self.shards[..]) {
            (Some(at), shards) => &shards[at.shard].path,
            (None, [only]) => &only.path,
            (None, _) => &self.path,
        }
    }

    /// The free-form text of the header, without checksums. With several shards, the first to have a key gives its value.
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
    /// [`Error::Tensor`] when there is no such tensor, its type is another, an I64 does not fit an i32, or its
    /// bytes are not those of its checksum, where the file has one;
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
    /// [`Error::Tensor`] when there is no such tensor, its type is another, or its bytes are not those of its
    /// checksum, where the file has one; [`Error::Io`] when the file cannot be read.
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
            bad(self.path_of(name), name, message)
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
        let mut sum = Sum::default();
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
            if at.checksum.is_some() {
                sum.add(bytes);
            }
            decode(bytes, &mut out).map_err(|message| bad(&shard.path, name, message))?;
            position += bytes.len() as u64;
            left -= bytes.len();
        }
        let found = sum.value();
        match at.checksum.filter(|stored| *stored != found) {
            Some(stored) => Err(checksum::differs(&shard.path, name, stored, found)),
            None => Ok(out),
        }
    }
}

impl fmt::Debug for Checkpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Checkpoint({}, {} tensors)", self.path.display(), self.tensors.len())
    }
}

fn elements<const N: usize, T>(bytes: &[u8], from: impl Fn([u8; N]) -> T) -> impl Iterator<Item = T> {
    bytes.as_chunks::<N>().0.iter().map(move |&b| from(b))
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
    let Index(weight_map) = serde_json::from_slice(textfile::unmarked(bytes))
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
