//! 2:4 weights without their dropped elements, in memory and as a file (FORMAT.md).
//!
//! The layout is row-major and independent of any kernel; kernels reorder it when they load it. It is also
//! canonical: equal weights give equal bytes, so files can be compared and hashed.

use std::collections::BTreeMap;
use std::path::Path;

use gpusq_tensor::ops::lsq;
use gpusq_tensor::{DType, Tensor, f16};
use rayon::prelude::*;

use crate::format::safetensors::{
    Checkpoint, Dtype, Stored, bad, check_finite, with_checksums, write_stored,
};
use crate::params::{Packed, Params, Weight};
use crate::{Error, Result};

/// Name of the packed model's file in its folder, beside `config.json`.
pub const PACKED_FILE: &str = "model.gpusq.safetensors";
/// Value of the key `format` in the file's metadata.
const FORMAT: &str = "gpusq-packed";
/// Value of the key `format_version`: the version of FORMAT.md that this program writes and reads.
const VERSION: &str = "1";
const VALUES: &str = ".values";
const META: &str = ".meta";
const SCALE: &str = ".scale";
/// Largest step size of a weight's row: code 127 is then within f16, as every weight is that is stored in it.
const MAX_WEIGHT_SCALE: f32 = 65504.0 / 127.0;
/// Largest step size of an activation: code 127 is then a finite f32.
const MAX_SITE_SCALE: f32 = f32::MAX / 127.0;

/// Packs a pruned weight with f16 values: `value` f32 `[out, in]` rounded to nearest-even f16, `mask` u8
/// `[out, in]` with 1 for kept elements. `name` is for errors.
///
/// # Errors
/// [`Error::Mismatch`] naming weight, row and group where the weight is not 2:4 (more than two of four
/// neighbours kept), where a kept element is not finite in f16, or when shapes disagree or `in` is not a
/// multiple of 4.
pub fn pack_f16(value: &Tensor, mask: &Tensor, name: &str) -> Result<Packed> {
    let round = |_, x| {
        let half = f16::from_f32(x);
        if half.is_finite() { Ok(half) } else { Err(format!("{x} is not finite in f16")) }
    };
    let (values, meta, cols) = pack(value, mask, name, f16::ZERO, round)?;
    let rows = value.rows();
    let values = Tensor::from_f16(values, &[rows, cols / 2]);
    Ok(Packed { values, meta: Tensor::from_u8(meta, &[rows, cols.div_ceil(8)]), scale: None, cols })
}

/// Packs a pruned weight with INT8 codes (see [`lsq::code`]): `value` f32 `[out, in]`, `mask` u8
/// `[out, in]` with 1 for kept elements, `scale` f32 `[out]`, one positive step size per row. `name` is for
/// errors.
///
/// # Errors
/// As [`pack_f16`]; also when a scale is not positive or too large for FORMAT.md.
pub fn pack_int8(value: &Tensor, mask: &Tensor, scale: &Tensor, name: &str) -> Result<Packed> {
    let rows = value.rows();
    if scale.shape() != [rows] {
        let message = format!("weight `{name}`: scales of shape {:?} for {rows} rows", scale.shape());
        return Err(Error::Mismatch(message));
    }
    let steps = scale.f32();
    if let Some((row, what)) = bad_row(steps) {
        return Err(Error::Mismatch(format!("weight `{name}`: row {row}: scale {what}")));
    }
    let quantise = |row: usize, x: f32| {
        if x.is_finite() { Ok(lsq::code(x, steps[row]) as i8) } else { Err(format!("{x} has no INT8 code")) }
    };
    let (values, meta, cols) = pack(value, mask, name, 0, quantise)?;
    let values = Tensor::from_i8(values, &[rows, cols / 2]);
    let meta = Tensor::from_u8(meta, &[rows, cols.div_ceil(8)]);
    Ok(Packed { values, meta, scale: Some(scale.clone()), cols })
}

/// Values, meta bytes and columns of the weight `value * mask`; `encode` gives the stored form of an element
/// of a row, or says why there is none.
fn pack<T: Copy + PartialEq>(
    value: &Tensor,
    mask: &Tensor,
    name: &str,
    zero: T,
    encode: impl Fn(usize, f32) -> std::result::Result<T, String>,
) -> Result<(Vec<T>, Vec<u8>, usize)> {
    let fail = |message: String| Error::Mismatch(format!("weight `{name}`: {message}"));
    let &[rows, cols] = value.shape() else {
        return Err(fail(format!("shape {:?} is not [out, in]", value.shape())));
    };
    if mask.shape() != value.shape() {
        return Err(fail(format!("a mask of shape {:?} for {:?}", mask.shape(), value.shape())));
    }
    if rows == 0 || cols == 0 || cols % 4 != 0 {
        return Err(fail(format!("{rows} x {cols} cannot be 2:4: the input width must be a multiple of 4")));
    }
    let mut values = Vec::with_capacity(rows * cols / 2);
    let mut meta = vec![0; rows * cols.div_ceil(8)];
    let (elements, keep) = (value.f32().as_chunks::<4>().0, mask.u8().as_chunks::<4>().0);
    for row in 0..rows {
        for group in 0..cols / 4 {
            let at = row * (cols / 4) + group;
            let here = |message: String| fail(format!("row {row}, group {group}: {message}"));
            if let Some(&odd) = keep[at].iter().find(|&&m| m > 1) {
                return Err(here(format!("the mask holds {odd}; it may hold 0 and 1")));
            }
            let kept: u8 = keep[at].iter().sum();
            if kept > 2 {
                return Err(here(format!(
                    "{kept} of 4 elements are kept, 2:4 allows 2; prune the weight first"
                )));
            }
            let mut stored = [zero; 4];
            for i in (0..4).filter(|&i| keep[at][i] == 1) {
                let code = encode(row, elements[at][i]).map_err(here)?;
                // -0.0 equals zero and is replaced by it.
                if code != zero {
                    stored[i] = code;
                }
            }
            let (first, second) = positions(stored.map(|x| x != zero));
            values.extend([stored[first], stored[second]]);
            meta[row * cols.div_ceil(8) + group / 2] |= nibble(first, second) << (4 * (group % 2));
        }
    }
    Ok((values, meta, cols))
}

/// The two positions that a group names: those of its nonzeros, and where there are fewer than two, the
/// lowest others, in rising order.
fn positions(nonzero: [bool; 4]) -> (usize, usize) {
    let mut kept = (0..4).filter(|&i| nonzero[i]);
    match (kept.next(), kept.next()) {
        (Some(a), Some(b)) => (a, b),
        (Some(a), None) if a > 0 => (0, a),
        _ => (0, 1),
    }
}

fn nibble(first: usize, second: usize) -> u8 {
    (first | second << 2) as u8
}

/// What is wrong with a step size that may be up to `max`, if anything is.
fn bad_step(scale: f32, max: f32) -> Option<String> {
    if !(scale.is_finite() && scale > 0.0) {
        Some(format!("{scale} is not positive and finite"))
    } else if scale > max {
        Some(format!("{scale:?} is larger than {max:?}"))
    } else {
        None
    }
}

/// The first row whose step size is wrong, and what is wrong with it.
fn bad_row(scales: &[f32]) -> Option<(usize, String)> {
    scales.iter().enumerate().find_map(|(row, &s)| Some((row, bad_step(s, MAX_WEIGHT_SCALE)?)))
}

/// The INT8 codes of a packed weight with the dropped ones as 0, row-major `[out, in]`. Panics if its values
/// are not i8.
pub fn unpack_codes(packed: &Packed) -> Vec<i8> {
    unpack(packed, packed.values.i8())
}

/// The packed weight as f32 `[out, in]`: `code * scale[row]`, or the f16 values.
pub fn unpack_f32(packed: &Packed) -> Tensor {
    let shape = [packed.values.rows(), packed.cols];
    let mut dense = unpack(packed, packed.values.to_f32().f32());
    if let Some(scale) = &packed.scale {
        for (row, &step) in dense.chunks_mut(packed.cols).zip(scale.f32()) {
            row.iter_mut().for_each(|x| *x *= step);
        }
    }
    Tensor::from_f32(dense, &shape)
}

fn unpack<T: Copy + Default>(packed: &Packed, values: &[T]) -> Vec<T> {
    let cols = packed.cols;
    let mut dense = vec![T::default(); packed.values.rows() * cols];
    let rows =
        dense.chunks_mut(cols).zip(values.chunks(cols / 2)).zip(packed.meta.u8().chunks(cols.div_ceil(8)));
    for ((dense, values), meta) in rows {
        for (group, (four, two)) in
            dense.as_chunks_mut::<4>().0.iter_mut().zip(values.as_chunks::<2>().0).enumerate()
        {
            let nibble = meta[group / 2] >> (4 * (group % 2));
            four[usize::from(nibble & 3)] = two[0];
            four[usize::from(nibble >> 2 & 3)] = two[1];
        }
    }
    dense
}

/// What is wrong with a packed weight, if anything is: every rule of FORMAT.md's "Packed weights".
fn check(packed: &Packed) -> std::result::Result<(), (&'static str, String)> {
    let (values, meta) = (&packed.values, &packed.meta);
    let &[rows, width] = values.shape() else {
        return Err((VALUES, format!("shape {:?} is not [out, in / 2]", values.shape())));
    };
    if rows == 0 || width == 0 || width % 2 != 0 {
        return Err((
            VALUES,
            format!("shape {:?} holds no whole groups of two kept elements", values.shape()),
        ));
    }
    if packed.cols != 2 * width {
        return Err((VALUES, format!("shape {:?} does not fit {} columns", values.shape(), packed.cols)));
    }
    let meta_width = width.div_ceil(4);
    if meta.dtype() != DType::U8 || meta.shape() != [rows, meta_width] {
        return Err((META, format!("{meta:?} should be U8[{rows}, {meta_width}]")));
    }
    match (&packed.scale, values.dtype()) {
        (Some(scale), DType::I8) => {
            if scale.dtype() != DType::F32 || scale.shape() != [rows] {
                return Err((SCALE, format!("{scale:?} should be F32[{rows}]")));
            }
            if let Some((row, what)) = bad_row(scale.f32()) {
                return Err((SCALE, format!("row {row}: {what}")));
            }
            check_groups(packed, values.i8(), |x| match x {
                -128 => Err("code -128 is outside -127..=127".into()),
                x => Ok(x != 0),
            })
        }
        (None, DType::F16) => check_groups(packed, values.f16(), |x| {
            if !x.is_finite() {
                Err(format!("{x} is not finite"))
            } else if x.to_bits() == 0x8000 {
                Err("-0.0 must be stored as +0.0".into())
            } else {
                Ok(x != f16::ZERO)
            }
        }),
        (None, DType::I8) => Err((SCALE, "is missing; I8 values need one step size per row".into())),
        (Some(_), DType::F16) => Err((SCALE, "must not be there beside F16 values".into())),
        (_, other) => Err((VALUES, format!("elements of type {other:?}; they must be I8 or F16"))),
    }
}

fn check_groups<T: Copy>(
    packed: &Packed,
    values: &[T],
    nonzero: impl Fn(T) -> std::result::Result<bool, String>,
) -> std::result::Result<(), (&'static str, String)> {
    let groups = packed.cols / 4;
    let meta_width = groups.div_ceil(2);
    let rows = values.as_chunks::<2>().0.chunks(groups).zip(packed.meta.u8().chunks(meta_width));
    for (row, (values, meta)) in rows.enumerate() {
        for (group, two) in values.iter().enumerate() {
            let here = |what: &str| format!("row {row}, group {group}: {what}");
            let nibble = meta[group / 2] >> (4 * (group % 2)) & 0xF;
            let (first, second) = (usize::from(nibble & 3), usize::from(nibble >> 2));
            if first >= second {
                return Err((META, here(&format!("index {first} is not below index {second}"))));
            }
            let mut kept = [false; 4];
            for (index, &value) in [first, second].into_iter().zip(two) {
                kept[index] = nonzero(value).map_err(|what| (VALUES, here(&what)))?;
            }
            if positions(kept) != (first, second) {
                let what = "a zero is not at the lowest free index, so the weight is not canonical";
                return Err((META, here(what)));
            }
        }
        if groups % 2 == 1 && meta[meta_width - 1] >> 4 != 0 {
            return Err((META, format!("row {row}: the unused last half byte is not 0")));
        }
    }
    Ok(())
}

/// The type that a dense tensor has in the file: F16 with two or more dimensions (embeddings, weights that
/// stay dense), F32 below (norms, biases, scales), where rounding costs accuracy and saves nothing.
fn dense_dtype(tensor: &Tensor) -> DType {
    if tensor.shape().len() >= 2 { DType::F16 } else { DType::F32 }
}

/// Whether `name` is the step size of an activation.
fn is_site_scale(name: &str) -> bool {
    let last = name.rsplit('.').next();
    last == Some("input_scale") || last == Some("output_scale")
}

fn check_dense(path: &Path, name: &str, tensor: &Tensor) -> Result<()> {
    check_finite(path, name, tensor)?;
    if is_site_scale(name) {
        if tensor.shape() != [1] {
            let message = format!("an activation's scale has shape [1], not {:?}", tensor.shape());
            return Err(bad(path, name, message));
        }
        if let Some(what) = bad_step(tensor.item(), MAX_SITE_SCALE) {
            return Err(bad(path, name, format!("scale {what}")));
        }
    }
    Ok(())
}

/// Rounds the dense weights to what [`write_packed`] stores, so that a model gives the same results bit for
/// bit before it is saved and after it is loaded: tensors with two or more dimensions to the nearest f16.
///
/// # Errors
/// [`Error::Mismatch`] when a finite element is too large for f16.
pub fn round_dense(params: &mut Params) -> Result<()> {
    for (name, weight) in params.iter_mut() {
        let Weight::Dense(tensor) = weight else { continue };
        if dense_dtype(tensor) == DType::F16 {
            if let Some(x) = beyond_f16(tensor) {
                return Err(Error::Mismatch(format!("weight `{name}`: {x} is too large for f16 (65504)")));
            }
            *tensor = tensor.to_f16().to_f32();
        }
    }
    Ok(())
}

/// The first element of `tensor` that is finite and has no finite f16.
pub(crate) fn beyond_f16(tensor: &Tensor) -> Option<f32> {
    tensor.f32().iter().copied().find(|x| x.is_finite() && f16::from_f32(*x).is_infinite())
}

/// Writes a packed model, whole or not at all. Every weight is [`Weight::Packed`] or [`Weight::Dense`] in
/// f32; dense ones of two or more dimensions are stored as F16. `metadata` is free text for the header.
///
/// # Errors
/// [`Error::Tensor`] for a weight that is not packed yet, not finite, too large for f16, against FORMAT.md,
/// or under a reserved name; [`Error::File`] for a reserved metadata key; [`Error::Io`] when writing fails.
pub fn write_packed(
    path: impl AsRef<Path>,
    params: &Params,
    metadata: &BTreeMap<String, String>,
) -> Result<()> {
    let path = path.as_ref();
    let mut header = metadata.clone();
    for (key, value) in [("format", FORMAT), ("format_version", VERSION)] {
        if header.insert(key.into(), value.into()).is_some() {
            return Err(Error::file(path, format!("the metadata key `{key}` is set by the format")));
        }
    }
    let mut stored = Vec::new();
    for (name, weight) in params.iter() {
        check_name(path, name)?;
        let mut add = |suffix, tensor, dtype| {
            stored.push(Stored { name: format!("{name}{suffix}"), tensor, dtype });
        };
        match weight {
            Weight::Packed(packed) => {
                check(packed).map_err(|(suffix, what)| bad(path, &format!("{name}{suffix}"), what))?;
                add(VALUES, &packed.values, packed.values.dtype());
                add(META, &packed.meta, DType::U8);
                if let Some(scale) = &packed.scale {
                    add(SCALE, scale, DType::F32);
                }
            }
            Weight::Dense(tensor) => {
                if tensor.dtype() != DType::F32 {
                    return Err(bad(path, name, format!("dense weights are f32, not {:?}", tensor.dtype())));
                }
                check_dense(path, name, tensor)?;
                let dtype = dense_dtype(tensor);
                if let (DType::F16, Some(x)) = (dtype, beyond_f16(tensor)) {
                    return Err(bad(path, name, format!("{x} is too large for f16 (65504)")));
                }
                add("", tensor, dtype);
            }
            Weight::Masked { .. } | Weight::Fake { .. } => {
                return Err(bad(path, name, "is masked but not packed; pack it first"));
            }
        }
    }
    let header = with_checksums(path, &stored, &header)?;
    write_stored(path, stored, &header)
}

/// Reads a packed model: weights under the names they were written with, dense ones in f32, and the free
/// text of its header.
///
/// # Errors
/// [`Error::Io`], or [`Error::File`] and [`Error::Tensor`] wherever the file breaks FORMAT.md.
pub fn read_packed(path: impl AsRef<Path>) -> Result<(Params, BTreeMap<String, String>)> {
    read_packed_checkpoint(&Checkpoint::open_file(path)?)
}

/// [`read_packed`] from an opened safetensors file.
///
/// # Errors
/// As [`read_packed`].
pub fn read_packed_checkpoint(file: &Checkpoint) -> Result<(Params, BTreeMap<String, String>)> {
    let path = file.path();
    let mut metadata = file.metadata().clone();
    if metadata.remove("format").as_deref() != Some(FORMAT) {
        let message = format!("is not a packed model: its metadata lacks format = {FORMAT}");
        return Err(Error::file(path, message));
    }
    match metadata.remove("format_version") {
        Some(version) if version == VERSION => {}
        Some(version) => {
            let version = version.escape_debug().take(20).collect::<String>();
            let message = format!("has format version {version}, this program reads {VERSION}; update gpusq");
            return Err(Error::file(path, message));
        }
        None => {
            return Err(Error::file(path, "its metadata lacks format_version; write it again with gpusq"));
        }
    }
    let read = |name: &str| {
        if let Some(weight) = name.strip_suffix(VALUES) {
            let packed = read_weight(file, weight)?;
            check(&packed).map_err(|(suffix, what)| bad(path, &format!("{weight}{suffix}"), what))?;
            Ok(Some((weight.to_string(), Weight::Packed(packed))))
        } else if let Some(weight) = [META, SCALE].into_iter().find_map(|suffix| name.strip_suffix(suffix)) {
            match file.info(&format!("{weight}{VALUES}")) {
                None => Err(bad(path, name, format!("has no `{weight}{VALUES}` beside it"))),
                Some(_) => Ok(None),
            }
        } else {
            Ok(Some((name.to_string(), Weight::Dense(read_dense(file, name)?))))
        }
    };
    // On all threads: the checks take longer than the disk. What is wrong first, in the file's order, is said.
    let names: Vec<&str> = file.names().collect();
    let all: Vec<Result<Option<(String, Weight)>>> = names.par_iter().map(|name| read(name)).collect();
    let mut params = Params::new();
    for one in all {
        if let Some((name, weight)) = one? {
            insert(&mut params, path, &name, weight)?;
        }
    }
    Ok((params, metadata))
}

/// A weight's own name must not look like a part of another.
fn check_name(path: &Path, name: &str) -> Result<()> {
    match [VALUES, META, SCALE].into_iter().find(|suffix| name.ends_with(suffix)) {
        Some(suffix) => {
            Err(bad(path, name, format!("names that end in `{suffix}` belong to packed weights")))
        }
        None => Ok(()),
    }
}

fn insert(params: &mut Params, path: &Path, name: &str, weight: Weight) -> Result<()> {
    check_name(path, name)?;
    if params.get(name).is_some() {
        return Err(bad(path, name, "is there both packed and dense"));
    }
    params.insert(name, weight);
    Ok(())
}

fn read_weight(file: &Checkpoint, name: &str) -> Result<Packed> {
    let part = |suffix: &str, allowed: &[Dtype]| -> Result<Tensor> {
        let part = format!("{name}{suffix}");
        match file.info(&part) {
            None => Err(bad(file.path(), &part, format!("is missing; packed weight `{name}` needs it"))),
            Some(info) if !allowed.contains(&info.dtype) => {
                Err(bad(file.path(), &part, format!("has type {:?}; it must be {allowed:?}", info.dtype)))
            }
            Some(_) => file.raw(&part),
        }
    };
    let values = part(VALUES, &[Dtype::I8, Dtype::F16])?;
    let meta = part(META, &[Dtype::U8])?;
    let has_scale = file.info(&format!("{name}{SCALE}")).is_some();
    let scale =
        if values.dtype() == DType::I8 || has_scale { Some(part(SCALE, &[Dtype::F32])?) } else { None };
    let cols = values.width().checked_mul(2).ok_or_else(|| {
        bad(file.path(), &format!("{name}{VALUES}"), format!("shape {:?} is too wide", values.shape()))
    })?;
    Ok(Packed { values, meta, scale, cols })
}

fn read_dense(file: &Checkpoint, name: &str) -> Result<Tensor> {
    let path = file.path();
    let (dtype, rank) = file.info(name).map_or((Dtype::F32, 0), |info| (info.dtype, info.shape.len()));
    let expected = if rank >= 2 { Dtype::F16 } else { Dtype::F32 };
    if dtype != expected {
        let message = format!("has type {dtype:?}; with {rank} dimensions it must be {expected:?}");
        return Err(bad(path, name, message));
    }
    let tensor = file.tensor(name)?;
    check_dense(path, name, &tensor)?;
    Ok(tensor)
}

/// Bits that a model takes in the packed file, without names and header.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sizes {
    /// Values and indices of the packed weights.
    pub packed_bits: u64,
    /// The same weights as dense FP16.
    pub dense_fp16_bits: u64,
    /// Step sizes of weight rows and activations.
    pub scale_bits: u64,
    /// Everything else, as stored; weights that are not packed yet count as dense.
    pub rest_bits: u64,
}

impl Sizes {
    /// Packed over dense FP16 bits: exactly 0.3125 for INT8 and 0.5625 for FP16 where every input width is a
    /// multiple of 8, and half a byte a row more where it is not. 1 when nothing is packed.
    pub fn ratio(&self) -> f64 {
        if self.dense_fp16_bits == 0 { 1.0 } else { self.packed_bits as f64 / self.dense_fp16_bits as f64 }
    }
}

/// Counts the bits of a model by kind.
pub fn sizes(params: &Params) -> Sizes {
    let bits = |t: &Tensor, dtype: DType| t.len() as u64 * dtype.size() as u64 * 8;
    let mut sizes = Sizes::default();
    for (name, weight) in params.iter() {
        match weight {
            Weight::Packed(p) => {
                sizes.packed_bits += bits(&p.values, p.values.dtype()) + bits(&p.meta, DType::U8);
                sizes.dense_fp16_bits += (p.values.rows() * p.cols) as u64 * 16;
                sizes.scale_bits += p.scale.as_ref().map_or(0, |s| bits(s, DType::F32));
            }
            Weight::Dense(t) if is_site_scale(name) => sizes.scale_bits += bits(t, DType::F32),
            Weight::Dense(t) | Weight::Masked { value: t, .. } | Weight::Fake { value: t, .. } => {
                sizes.rest_bits += bits(t, dense_dtype(t));
            }
        }
    }
    sizes
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn mask_of(value: &Tensor) -> Tensor {
        Tensor::from_u8(value.f32().iter().map(|&x| u8::from(x != 0.0)).collect(), value.shape())
    }

    /// Any 2:4 weight of up to 5 rows and 9 groups (so widths of both kinds) whose elements come from
    /// `element`, with its mask, which may keep fewer than two of a group, or a zero.
    fn two_of_four<S: Strategy<Value = f32> + Clone + 'static>(
        element: S,
    ) -> impl Strategy<Value = (Tensor, Tensor)> {
        (1usize..=5, 1usize..=9).prop_flat_map(move |(rows, groups)| {
            let group = (
                prop::array::uniform4(element.clone()),
                prop::sample::select((0u8..16).filter(|m| m.count_ones() <= 2).collect::<Vec<_>>()),
            );
            prop::collection::vec(group, rows * groups).prop_map(move |all| {
                let (mut value, mut mask) = (Vec::new(), Vec::new());
                for (four, bits) in all {
                    for i in 0..4 {
                        let keep = bits >> i & 1;
                        value.push(four[i]);
                        mask.push(keep);
                    }
                }
                let shape = [rows, groups * 4];
                (Tensor::from_f32(value, &shape), Tensor::from_u8(mask, &shape))
            })
        })
    }

    fn pruned(value: &Tensor, mask: &Tensor) -> Vec<f32> {
        value.f32().iter().zip(mask.u8()).map(|(&x, &m)| if m == 1 { x } else { 0.0 }).collect()
    }

    proptest! {
        #[test]
        fn unpacking_int8_gives_the_codes_back(
            (codes, mask) in two_of_four((-127i8..=127).prop_map(f32::from)),
            step in 1e-3f32..10.0,
        ) {
            let rows = codes.rows();
            let scale: Vec<f32> = (0..rows).map(|r| step * (1.0 + r as f32)).collect();
            let cols = codes.width();
            let value = codes.f32().iter().enumerate().map(|(i, &c)| c * scale[i / cols]).collect();
            let value = Tensor::from_f32(value, codes.shape());
            let scale = Tensor::from_f32(scale, &[rows]);
            let packed = pack_int8(&value, &mask, &scale, "w").unwrap();
            prop_assert!(check(&packed).is_ok(), "{:?}", check(&packed));
            let expected: Vec<i8> = pruned(&value, &mask).iter().enumerate()
                .map(|(i, &x)| lsq::code(x, scale.f32()[i / cols]) as i8).collect();
            prop_assert_eq!(unpack_codes(&packed), expected);

            let dense = unpack_f32(&packed);
            prop_assert_eq!(dense.shape(), codes.shape());
            // Packing what was unpacked changes nothing, whichever mask led there.
            prop_assert_eq!(pack_int8(&dense, &mask_of(&dense), &scale, "w").unwrap(), packed);
        }

        #[test]
        fn unpacking_f16_gives_the_values_back(
            (value, mask) in two_of_four(prop_oneof![Just(0.0f32), Just(-0.0), -6e4f32..6e4, -1e-6f32..1e-6]),
        ) {
            let packed = pack_f16(&value, &mask, "w").unwrap();
            prop_assert!(check(&packed).is_ok(), "{:?}", check(&packed));
            let expected: Vec<f32> =
                pruned(&value, &mask).iter().map(|&x| f16::from_f32(x).to_f32()).collect();
            let dense = unpack_f32(&packed);
            prop_assert_eq!(dense.f32(), &expected[..]);
            prop_assert!(dense.f32().iter().all(|x| x.to_bits() != (-0.0f32).to_bits()));
            prop_assert_eq!(pack_f16(&dense, &mask_of(&dense), "w").unwrap(), packed);
        }

        #[test]
        fn any_other_group_is_refused_by_name(
            (value, mask) in two_of_four(Just(1.0f32)),
            row in any::<prop::sample::Index>(),
            group in any::<prop::sample::Index>(),
            bits in prop::sample::select((0u8..16).filter(|m| m.count_ones() > 2).collect::<Vec<_>>()),
        ) {
            let (row, group) = (row.index(value.rows()), group.index(value.width() / 4));
            let mut mask = mask;
            let at = row * value.width() + group * 4;
            for i in 0..4 {
                mask.u8_mut()[at + i] = bits >> i & 1;
            }
            let error = pack_f16(&value, &mask, "encoder.0.attn.q.weight").unwrap_err().to_string();
            let place = format!("weight `encoder.0.attn.q.weight`: row {row}, group {group}: ");
            prop_assert!(error.starts_with(&place), "{}", error);
        }
    }

    #[test]
    fn every_pair_of_kept_positions_has_its_nibble() {
        let expected =
            [((0, 1), 0x4), ((0, 2), 0x8), ((1, 2), 0x9), ((0, 3), 0xC), ((1, 3), 0xD), ((2, 3), 0xE)];
        for ((a, b), nibble) in expected {
            let mut value = vec![0.0; 4];
            (value[a], value[b]) = (3.0, -5.0);
            let value = Tensor::from_f32(value, &[1, 4]);
            let packed = pack_int8(&value, &mask_of(&value), &Tensor::scalar(1.0), "w").unwrap();
            assert_eq!(packed.meta.u8(), [nibble], "{a}, {b}");
            assert_eq!(packed.values.i8(), [3, -5]);
        }
    }

    #[test]
    fn groups_with_fewer_nonzeros_name_the_lowest_free_positions() {
        for (at, nibble, values) in [
            (None, 0x4, [0, 0]),
            (Some(0), 0x4, [7, 0]),
            (Some(1), 0x4, [0, 7]),
            (Some(2), 0x8, [0, 7]),
            (Some(3), 0xC, [0, 7]),
        ] {
            let mut value = vec![0.0; 4];
            if let Some(at) = at {
                value[at] = 7.0;
            }
            let value = Tensor::from_f32(value, &[1, 4]);
            // The mask may keep a zero, or not.
            for mask in [[1, 0, 0, 1], [0, 1, 1, 0], [0, 0, 1, 1]] {
                let mut mask = mask;
                if let Some(at) = at.filter(|&at| mask[at] == 0) {
                    mask = [0; 4];
                    mask[at] = 1;
                }
                let mask = Tensor::from_u8(mask.to_vec(), &[1, 4]);
                let packed = pack_int8(&value, &mask, &Tensor::scalar(1.0), "w").unwrap();
                assert_eq!((packed.meta.u8(), packed.values.i8()), (&[nibble][..], &values[..]), "{at:?}");
            }
        }
    }

    #[test]
    fn groups_fill_a_byte_from_its_low_half() {
        let value = Tensor::from_f32(vec![1., 2., 0., 0., 0., 0., 3., 4., 0., 5., 0., 6.], &[1, 12]);
        let packed = pack_f16(&value, &mask_of(&value), "w").unwrap();
        assert_eq!(packed.meta.u8(), [0xE4, 0x0D]);
    }

    #[test]
    fn what_cannot_be_packed_is_named() {
        let ok = Tensor::from_f32(vec![1.0, 0.0, 0.0, 2.0], &[1, 4]);
        let mask = mask_of(&ok);
        let one = Tensor::scalar(1.0);
        let says = |r: Result<Packed>, text: &str| {
            let e = r.unwrap_err().to_string();
            assert!(e.contains("`w`") && e.contains(text) && !e.contains('\n'), "{e}");
        };
        let nan = Tensor::from_f32(vec![f32::NAN, 0.0, 0.0, 2.0], &[1, 4]);
        says(pack_int8(&nan, &mask, &one, "w"), "row 0, group 0: NaN has no INT8 code");
        says(pack_f16(&nan, &mask, "w"), "row 0, group 0: NaN is not finite");
        let big = Tensor::from_f32(vec![0.0, 0.0, 0.0, 7e4], &[1, 4]);
        says(pack_f16(&big, &mask, "w"), "70000 is not finite in f16");
        says(pack_f16(&ok, &Tensor::from_u8(vec![2, 0, 0, 0], &[1, 4]), "w"), "the mask holds 2");
        says(pack_f16(&ok, &Tensor::from_u8(vec![0; 8], &[2, 4]), "w"), "mask of shape [2, 4]");
        let six = Tensor::zeros(&[1, 6]);
        says(pack_f16(&six, &mask_of(&six), "w"), "multiple of 4");
        let flat = Tensor::zeros(&[4]);
        says(pack_f16(&flat, &mask_of(&flat), "w"), "is not [out, in]");
        for step in [0.0, -1.0, f32::NAN, f32::INFINITY] {
            says(pack_int8(&ok, &mask, &Tensor::scalar(step), "w"), "row 0: scale");
        }
        says(pack_int8(&ok, &mask, &Tensor::zeros(&[2]), "w"), "scales of shape [2] for 1 rows");
        // A dropped element is nobody's concern.
        let dropped = Tensor::from_f32(vec![1.0, f32::NAN, 0.0, 2.0], &[1, 4]);
        pack_f16(&dropped, &mask, "w").unwrap();
    }

    #[test]
    fn sizes_are_exact() {
        let value = Tensor::from_f32([1.0, 0.0, 0.0, 2.0].repeat(48 * 6), &[48, 24]);
        let scale = Tensor::full(&[48], 0.1);
        let mut int8 = Params::new();
        int8.insert("w", Weight::Packed(pack_int8(&value, &mask_of(&value), &scale, "w").unwrap()));
        int8.insert("w.input_scale", Weight::Dense(Tensor::scalar(0.5)));
        int8.insert("norm.weight", Weight::Dense(Tensor::zeros(&[24])));
        int8.insert("embed", Weight::Dense(Tensor::zeros(&[10, 24])));
        let counted = sizes(&int8);
        let expected = Sizes {
            packed_bits: 48 * 24 * 5,
            dense_fp16_bits: 48 * 24 * 16,
            scale_bits: 49 * 32,
            rest_bits: 24 * 32 + 240 * 16,
        };
        assert_eq!(counted, expected);
        assert_eq!(counted.ratio(), 0.3125);

        let mut half = Params::new();
        half.insert("w", Weight::Packed(pack_f16(&value, &mask_of(&value), "w").unwrap()));
        assert_eq!(sizes(&half).ratio(), 0.5625);
        assert_eq!(sizes(&half).scale_bits, 0);

        // A width of 4 modulo 8 pays half a byte a row.
        let value = value.reshape(&[96, 12]);
        let mut odd = Params::new();
        odd.insert("w", Weight::Packed(pack_f16(&value, &mask_of(&value), "w").unwrap()));
        assert_eq!(sizes(&odd).packed_bits, 96 * 12 * 9 + 96 * 4);
    }
}
