use std::collections::{BTreeMap, HashMap};
use std::fs;

use proptest::prelude::*;

use super::writer::{file_dtype, write_elements};
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
    for (shape, begin, end) in [("[2]", 0, 7), ("[2]", 0, 9), ("[3]", 0, 8), ("[]", 0, 8), ("[0]", 0, 8)] {
        let header = format!(r#"{{"a":{{"dtype":"F32","shape":{shape},"data_offsets":[{begin},{end}]}}}}"#);
        refused(file(header, end), "tensor `a`: shape");
    }
    refused(
        file(r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[8,0]}}"#, 8),
        "end at 0, before their begin at 8",
    );
    for shape in
        ["[4294967296,4294967296]", "[9223372036854775807]", "[0,9223372036854775807,9223372036854775807]"]
    {
        let header = format!(r#"{{"a":{{"dtype":"F32","shape":{shape},"data_offsets":[0,0]}}}}"#);
        refused(file(header, 0), "overflows");
    }
    let header = format!(r#"{{"a":{{"dtype":"F32","shape":[1{}],"data_offsets":[0,4]}}}}"#, ",1".repeat(64));
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
    for (names, reason) in [(["a", "a"], "is given twice"), (["a", "__metadata__"], "reserves this name")] {
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
