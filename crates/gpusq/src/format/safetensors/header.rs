//! A file's header: read whole and checked before any tensor is.

use std::collections::BTreeMap;
use std::fmt;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

use serde::de::{Deserialize, Deserializer, Error as _, MapAccess, Visitor, value};

use super::{Dtype, MAX_HEADER, METADATA, bad, one_line, shown};
use crate::format::unique::{Unique, twice};
use crate::{Error, Result};

/// Most dimensions a tensor may have, as in PyTorch and NumPy.
const MAX_RANK: usize = 64;

/// What a header says about one tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Info {
    /// Element type in the file.
    pub dtype: Dtype,
    /// Extent of each dimension; empty for a scalar.
    pub shape: Vec<usize>,
}

pub(super) struct Header {
    pub(super) metadata: BTreeMap<String, String>,
    /// Position of the first element in the file, type and shape.
    pub(super) tensors: BTreeMap<String, (u64, Info)>,
}

/// Reads the header and checks it against the file's length.
pub(super) fn read_header(path: &Path, source: &mut (impl Read + Seek + ?Sized)) -> Result<Header> {
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
