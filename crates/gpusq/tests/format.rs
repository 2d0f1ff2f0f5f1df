//! FORMAT.md, rule by rule: a file that keeps a rule is read, and one that breaks it is refused with one
//! line that names the place.

use std::collections::BTreeMap;
use std::path::Path;

use gpusq::Result;
use gpusq::compress::{calibration, prune_weights};
use gpusq::config::Config;
use gpusq::format::packed::{
    pack_f16, pack_int8, read_packed, round_dense, sizes, unpack_codes, unpack_f32, write_packed,
};
use gpusq::format::safetensors::{Checkpoint, Dtype, write_safetensors};
use gpusq::forward::Compute;
use gpusq::model::Model;
use gpusq::params::{Params, Weight};
use gpusq::quant::calibrate;
use gpusq::task::{Example, HeadKind, Target};
use gpusq::tensor::{Tensor, f16};
use gpusq::train::batch::collate;

type Tensors = Vec<(String, Tensor)>;

fn metadata(version: &str) -> BTreeMap<String, String> {
    [("format", "gpusq-packed"), ("format_version", version)].map(|(k, v)| (k.into(), v.into())).into()
}

/// A file that keeps every rule: an INT8 weight of 2 x 12, an F16 weight of 1 x 8, and dense tensors.
fn valid() -> Tensors {
    let half = |v: &[f32]| v.iter().map(|&x| f16::from_f32(x)).collect();
    [
        ("q.weight.values", Tensor::from_i8(vec![3, -5, 0, 7, 1, 2, 0, 0, 127, -127, 4, 4], &[2, 6])),
        ("q.weight.meta", Tensor::from_u8(vec![0x8D, 0x09, 0xE4, 0x0C], &[2, 2])),
        ("q.weight.scale", Tensor::from_f32(vec![0.5, 2.0], &[2])),
        ("head.weight.values", Tensor::from_f16(half(&[1.5, -2.0, 0.0, 0.25]), &[1, 4])),
        ("head.weight.meta", Tensor::from_u8(vec![0xCE], &[1, 1])),
        ("attn.input_scale", Tensor::scalar(0.1)),
        ("attn.output_scale", Tensor::scalar(0.2)),
        ("embed.weight", Tensor::from_f16(half(&[1.0, 2.0, 3.0, 4.0]), &[2, 2])),
        ("norm.weight", Tensor::from_f32(vec![1.0, 1.1], &[2])),
    ]
    .map(|(name, t)| (name.to_string(), t))
    .into()
}

fn read(tensors: &Tensors, metadata: &BTreeMap<String, String>) -> Result<Params> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gpusq.safetensors");
    write_safetensors(&path, tensors, metadata).unwrap();
    read_packed(&path).map(|(params, _)| params)
}

/// The valid file with one tensor replaced, added or (`None`) taken out.
fn with(changes: &[(&str, Option<Tensor>)]) -> Tensors {
    let mut tensors = valid();
    for (name, tensor) in changes {
        tensors.retain(|(n, _)| n != name);
        if let Some(tensor) = tensor {
            tensors.push((name.to_string(), tensor.clone()));
        }
    }
    tensors
}

/// That the changed file is refused in one line that names the file, the tensor and the reason.
#[track_caller]
fn refused(changes: &[(&str, Option<Tensor>)], tensor: &str, reason: &str) {
    let error = read(&with(changes), &metadata("1")).unwrap_err().to_string();
    assert!(error.contains("model.gpusq.safetensors"), "{error}");
    assert!(error.contains(&format!("`{tensor}`")), "{error}");
    assert!(error.contains(reason), "{error}");
    assert!(!error.contains('\n'), "{error}");
}

fn halves(values: [f32; 4]) -> Option<Tensor> {
    Some(Tensor::from_f16(values.map(f16::from_f32).to_vec(), &[1, 4]))
}

#[test]
fn the_valid_file_is_read() {
    let params = read(&valid(), &metadata("1")).unwrap();
    let names: Vec<&str> = params.iter().map(|(name, _)| name).collect();
    assert_eq!(
        names,
        ["attn.input_scale", "attn.output_scale", "embed.weight", "head.weight", "norm.weight", "q.weight"]
    );
    let Some(Weight::Packed(q)) = params.get("q.weight") else { panic!("q is packed") };
    assert_eq!(
        unpack_codes(q),
        [0, 3, 0, -5, 0, 0, 7, 0, 0, 1, 2, 0, 0, 0, 0, 0, 0, 0, 127, -127, 4, 0, 0, 4]
    );
    assert_eq!(unpack_f32(q).shape(), [2, 12]);
    assert_eq!(unpack_f32(q).f32()[..4], [0.0, 1.5, 0.0, -2.5]);
    assert_eq!(unpack_f32(q).f32()[18], 254.0);
    let Some(Weight::Packed(head)) = params.get("head.weight") else { panic!("head is packed") };
    assert_eq!(unpack_f32(head).f32(), [0.0, 0.0, 1.5, -2.0, 0.0, 0.0, 0.0, 0.25]);
    let Some(Weight::Dense(embed)) = params.get("embed.weight") else { panic!("embed is dense") };
    assert_eq!(embed, &Tensor::from_f32(vec![1.0, 2.0, 3.0, 4.0], &[2, 2]));
}

#[test]
fn rule_1_the_container_must_be_valid_safetensors() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gpusq.safetensors");
    write_safetensors(&path, &valid(), &metadata("1")).unwrap();
    let whole = std::fs::read(&path).unwrap();
    read_packed(&path).unwrap();
    for cut in [0, 7, 8, 100, whole.len() - 1] {
        std::fs::write(&path, &whole[..cut]).unwrap();
        let error = read_packed(&path).unwrap_err().to_string();
        assert!(error.contains("model.gpusq.safetensors"), "{error}");
    }
}

#[test]
fn rule_2_the_format_must_be_named() {
    for other in [None, Some("pt")] {
        let mut metadata = metadata("1");
        metadata.remove("format");
        metadata.extend(other.map(|v| ("format".to_string(), v.to_string())));
        let error = read(&valid(), &metadata).unwrap_err().to_string();
        assert!(error.contains("is not a packed model"), "{error}");
    }
}

#[test]
fn rule_3_the_version_must_be_known() {
    for version in ["2", "0", "", "1.0", "01", "1\n"] {
        let error = read(&valid(), &metadata(version)).unwrap_err().to_string();
        assert!(error.contains("format version") && !error.contains('\n'), "{error}");
    }
    let mut without = metadata("1");
    without.remove("format_version");
    assert!(read(&valid(), &without).unwrap_err().to_string().contains("lacks format_version"));
    let mut more = metadata("1");
    more.insert("note".into(), "anything".into());
    read(&valid(), &more).unwrap();
}

#[test]
fn rule_4_a_weight_must_not_be_both_packed_and_dense() {
    refused(
        &[
            ("norm.weight.values", halves([1.0; 4])),
            ("norm.weight.meta", Some(Tensor::from_u8(vec![0x44], &[1, 1]))),
        ],
        "norm.weight",
        "both packed and dense",
    );
}

#[test]
fn rule_5_names_must_not_end_in_a_suffix() {
    for name in ["x.values", "x.meta", "x.scale"] {
        let changes = [
            (&*format!("{name}.values"), halves([1.0; 4])),
            (&*format!("{name}.meta"), Some(Tensor::from_u8(vec![0x44], &[1, 1]))),
        ];
        let error = read(&with(&changes), &metadata("1")).unwrap_err().to_string();
        assert!(error.contains(name), "{error}");
        let mut params = Params::new();
        params.insert(name, Weight::Dense(Tensor::zeros(&[1])));
        let dir = tempfile::tempdir().unwrap();
        let error = write_packed(dir.path().join("m"), &params, &BTreeMap::new()).unwrap_err().to_string();
        assert!(error.contains("belong to packed weights"), "{error}");
    }
}

#[test]
fn rule_6_values_must_have_meta() {
    refused(&[("q.weight.meta", None)], "q.weight.meta", "is missing");
}

#[test]
fn rule_7_meta_and_scale_must_have_values() {
    refused(&[("q.weight.values", None)], "q.weight.meta", "has no `q.weight.values` beside it");
    refused(
        &[("q.weight.values", None), ("q.weight.meta", None)],
        "q.weight.scale",
        "has no `q.weight.values` beside it",
    );
}

#[test]
fn rule_8_values_must_be_i8_or_f16_with_two_dimensions() {
    let name = "head.weight.values";
    refused(&[(name, Some(Tensor::zeros(&[1, 4])))], name, "has type F32");
    refused(&[(name, Some(Tensor::from_u8(vec![0; 4], &[1, 4])))], name, "has type U8");
    for shape in [&[][..], &[4], &[1, 1, 4]] {
        let n = shape.iter().product();
        refused(&[(name, Some(Tensor::from_f16(vec![f16::ONE; n], shape)))], name, "is not [out, in / 2]");
    }
}

#[test]
fn rule_9_values_must_hold_whole_groups() {
    for shape in [[0, 4], [1, 0], [0, 0], [1, 1], [1, 3], [2, 5]] {
        let values = Tensor::from_f16(vec![f16::ONE; shape[0] * shape[1]], &shape);
        refused(&[("head.weight.values", Some(values))], "head.weight.values", "no whole groups");
    }
}

#[test]
fn rule_10_meta_must_be_u8_of_its_shape() {
    let name = "q.weight.meta";
    refused(&[(name, Some(Tensor::from_i8(vec![4; 4], &[2, 2])))], name, "has type I8");
    for shape in [&[4][..], &[2, 1], &[2, 3], &[1, 4], &[4, 1], &[2, 2, 1]] {
        let n = shape.iter().product();
        refused(&[(name, Some(Tensor::from_u8(vec![4; n], shape)))], name, "should be U8[2, 2]");
    }
}

#[test]
fn rule_11_the_first_index_must_be_less_than_the_second() {
    let fine = [0x4, 0x8, 0x9, 0xC, 0xD, 0xE];
    for nibble in 0..16u8 {
        let meta = Tensor::from_u8(vec![nibble | 0x40], &[1, 1]);
        let changes = [("head.weight.meta", Some(meta)), ("head.weight.values", halves([1.0; 4]))];
        if fine.contains(&nibble) {
            let params = read(&with(&changes), &metadata("1")).unwrap();
            let Some(Weight::Packed(head)) = params.get("head.weight") else { panic!("head is packed") };
            let kept: Vec<usize> = (0..4).filter(|&i| unpack_f32(head).f32()[i] != 0.0).collect();
            assert_eq!(kept, [usize::from(nibble & 3), usize::from(nibble >> 2)]);
        } else {
            refused(&changes, "head.weight.meta", "row 0, group 0: index");
        }
    }
    // The place is that of the broken group.
    let meta = Tensor::from_u8(vec![0x8D, 0x09, 0x54, 0x0C], &[2, 2]);
    refused(
        &[("q.weight.meta", Some(meta))],
        "q.weight.meta",
        "row 1, group 1: index 1 is not below index 1",
    );
}

#[test]
fn rule_12_an_unused_half_byte_must_be_zero() {
    let meta = Tensor::from_u8(vec![0x8D, 0x09, 0xE4, 0x4C], &[2, 2]);
    refused(&[("q.weight.meta", Some(meta))], "q.weight.meta", "row 1: the unused last half byte is not 0");
}

#[test]
fn rule_13_missing_nonzeros_must_name_the_lowest_indices() {
    // (half byte, values of group 0, allowed)
    let cases = [
        (0x4, [0.0, 0.0], true),
        (0xE, [0.0, 0.0], false),
        (0x8, [0.0, 0.0], false),
        (0x4, [1.0, 0.0], true),
        (0xC, [1.0, 0.0], false),
        (0x4, [0.0, 1.0], true),
        (0x9, [1.0, 0.0], false),
        (0x8, [0.0, 1.0], true),
        (0x9, [0.0, 1.0], false),
        (0xC, [0.0, 1.0], true),
        (0xD, [0.0, 1.0], false),
        (0xE, [1.0, 0.0], false),
    ];
    for (nibble, [a, b], allowed) in cases {
        let changes = [
            ("head.weight.meta", Some(Tensor::from_u8(vec![nibble | 0xE0], &[1, 1]))),
            ("head.weight.values", halves([a, b, 1.0, 1.0])),
        ];
        if allowed {
            read(&with(&changes), &metadata("1")).unwrap();
        } else {
            refused(&changes, "head.weight.meta", "row 0, group 0: a zero is not at the lowest free index");
        }
    }
}

#[test]
fn rule_14_zero_must_be_positive() {
    refused(
        &[("head.weight.values", halves([1.5, -2.0, -0.0, 0.25]))],
        "head.weight.values",
        "group 1: -0.0",
    );
}

#[test]
fn rule_15_f16_values_must_be_finite() {
    for x in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let changes = [("head.weight.values", halves([1.5, -2.0, 0.0, x]))];
        refused(&changes, "head.weight.values", "row 0, group 1");
    }
}

#[test]
fn rule_16_code_minus_128_must_not_occur() {
    let values = Tensor::from_i8(vec![3, -5, 0, 7, 1, 2, 0, 0, 127, -128, 4, 4], &[2, 6]);
    refused(&[("q.weight.values", Some(values))], "q.weight.values", "row 1, group 1: code -128");
}

#[test]
fn rule_17_codes_must_have_a_scale_for_each_row() {
    let name = "q.weight.scale";
    refused(&[(name, None)], name, "is missing");
    refused(&[(name, Some(Tensor::from_f16(vec![f16::ONE; 2], &[2])))], name, "has type F16");
    for shape in [&[][..], &[1], &[3], &[2, 1]] {
        refused(&[(name, Some(Tensor::full(shape, 1.0)))], name, "should be F32[2]");
    }
}

#[test]
fn rule_18_scales_must_be_positive_and_not_too_large() {
    let most = 65504.0f32 / 127.0;
    read(&with(&[("q.weight.scale", Some(Tensor::from_f32(vec![1e-30, most], &[2])))]), &metadata("1"))
        .unwrap();
    let (value, mask) = (Tensor::full(&[1, 4], 1.0), Tensor::from_u8(vec![1, 1, 0, 0], &[1, 4]));
    for x in [most.next_up(), 1e6, f32::MAX] {
        let scale = Tensor::from_f32(vec![0.5, x], &[2]);
        refused(&[("q.weight.scale", Some(scale))], "q.weight.scale", "is larger than 515.77");
        let error = pack_int8(&value, &mask, &Tensor::scalar(x), "w").unwrap_err().to_string();
        assert!(error.contains("`w`: row 0: scale") && error.contains("is larger than 515.77"), "{error}");
    }
    for x in [0.0, -0.0, -1.0, f32::NAN, f32::INFINITY] {
        let scale = Tensor::from_f32(vec![0.5, x], &[2]);
        refused(&[("q.weight.scale", Some(scale))], "q.weight.scale", "row 1: ");
    }
}

#[test]
fn rule_19_f16_values_must_have_no_scale() {
    refused(&[("head.weight.scale", Some(Tensor::scalar(1.0)))], "head.weight.scale", "must not be there");
}

#[test]
fn rule_20_dense_matrices_must_be_f16() {
    for shape in [&[2, 2][..], &[1, 4], &[2, 1, 2]] {
        refused(&[("embed.weight", Some(Tensor::zeros(shape)))], "embed.weight", "it must be F16");
    }
}

#[test]
fn rule_21_dense_vectors_must_be_f32() {
    for (shape, n) in [(&[2][..], 2), (&[], 1)] {
        let tensor = Tensor::from_f16(vec![f16::ONE; n], shape);
        refused(&[("norm.weight", Some(tensor))], "norm.weight", "it must be F32");
    }
    refused(&[("norm.weight", Some(Tensor::from_i32(vec![1], &[1])))], "norm.weight", "it must be F32");
    read(&with(&[("norm.weight", Some(Tensor::zeros(&[])))]), &metadata("1")).unwrap();
}

#[test]
fn rule_22_dense_elements_must_be_finite() {
    let vector = Tensor::from_f32(vec![1.0, f32::NAN], &[2]);
    refused(&[("norm.weight", Some(vector))], "norm.weight", "the element at [1] is NaN");
    let matrix = Tensor::from_f16(vec![f16::ONE, f16::ONE, f16::INFINITY, f16::ONE], &[2, 2]);
    refused(&[("embed.weight", Some(matrix))], "embed.weight", "the element at [1, 0] is inf");
}

#[test]
fn rule_23_activation_scales_must_be_one_positive_number() {
    for name in ["attn.input_scale", "attn.output_scale", "input_scale"] {
        for x in [0.0, -1.0] {
            refused(&[(name, Some(Tensor::scalar(x)))], name, "is not positive");
        }
        refused(&[(name, Some(Tensor::scalar(3e36)))], name, "is larger than 2.67");
        read(&with(&[(name, Some(Tensor::scalar(f32::MAX / 127.0)))]), &metadata("1")).unwrap();
        for shape in [&[][..], &[2], &[0]] {
            refused(&[(name, Some(Tensor::full(shape, 1.0)))], name, "has shape [1]");
        }
    }
    // Only the whole last part counts.
    read(&with(&[("my_input_scale", Some(Tensor::zeros(&[3])))]), &metadata("1")).unwrap();
}

/// The header and the elements of a file.
fn parts(path: &Path) -> (String, Vec<u8>) {
    let bytes = std::fs::read(path).unwrap();
    let end = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    (String::from_utf8(bytes[8..end].to_vec()).unwrap(), bytes[end..].to_vec())
}

#[test]
fn rule_24_a_checksum_must_be_that_of_its_tensor() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gpusq.safetensors");
    written(&model(), &path);
    let (header, elements) = parts(&path);
    let put = |header: &str, elements: &[u8]| {
        std::fs::write(
            &path,
            [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), elements].concat(),
        )
        .unwrap();
        read_packed(&path).map_err(|e| e.to_string())
    };
    let (params, metadata) = put(&header, &elements).unwrap();
    assert!(!metadata.keys().any(|k| k.contains("crc32")), "{metadata:?}");

    // Any one bit of any element.
    let file = Checkpoint::open_file(&path).unwrap();
    let names: Vec<String> = file.names().map(String::from).collect();
    for at in 0..elements.len() {
        let mut flipped = elements.clone();
        flipped[at] ^= 1 << (at % 8);
        let error = put(&header, &flipped).unwrap_err();
        assert!(error.contains(path.to_str().unwrap()) && error.contains("; the file is damaged"), "{error}");
        assert!(names.iter().any(|n| error.contains(&format!("`{n}`"))), "{error}");
    }

    // CRC-32 of zlib: that of these four bytes is known from elsewhere.
    let scale = header.find("\"gpusq.crc32.a.input_scale\":\"").unwrap();
    let digits = scale + "\"gpusq.crc32.a.input_scale\":\"".len();
    assert_eq!(0.3f32.to_le_bytes(), [0x9a, 0x99, 0x99, 0x3e]);
    assert_eq!(&header[digits..digits + 8], "6099715b");
    for (from, to, reason) in [
        (&header[digits..digits + 8], "00000000", "and 00000000 was written"),
        (&header[digits..digits + 8], "0000000G", "8 hexadecimal digits"),
        (&header[digits..digits + 8], "+0000000", "8 hexadecimal digits"),
        ("gpusq.crc32.a.input_scale", "gpusq.crc32.a.input_scald", "is not there, but has a checksum"),
    ] {
        let error = put(&header.replacen(from, to, 1), &elements).unwrap_err();
        assert!(error.contains("`a.input_scal") && error.contains(reason), "{error}");
    }

    // Files of early versions have none.
    let mut json: serde_json::Value = serde_json::from_str(&header).unwrap();
    let text = json["__metadata__"].as_object_mut().unwrap();
    let before = text.len();
    text.retain(|key, _| !key.starts_with("gpusq.crc32."));
    assert_eq!(before - text.len(), names.len(), "one checksum a tensor");
    assert_eq!(put(&json.to_string(), &elements).unwrap().0, params);
}

fn model() -> Params {
    let value = Tensor::from_f32((0..24).map(|i| (i as f32 - 11.5) * 0.37).collect(), &[2, 12]);
    let mask = Tensor::from_u8([1, 0, 0, 1].repeat(6), &[2, 12]);
    let scale = Tensor::from_f32(vec![0.05, 0.04], &[2]);
    let mut params = Params::new();
    params.insert("a.weight", Weight::Packed(pack_int8(&value, &mask, &scale, "a.weight").unwrap()));
    params.insert("b.weight", Weight::Packed(pack_f16(&value, &mask, "b.weight").unwrap()));
    params.insert("a.input_scale", Weight::Dense(Tensor::scalar(0.3)));
    params.insert("norm.bias", Weight::Dense(Tensor::from_f32(vec![0.1, 1e30], &[2])));
    params.insert("embed", Weight::Dense(Tensor::from_f32(vec![0.1, 0.2, 0.3, 0.4], &[2, 2])));
    params
}

fn written(params: &Params, path: &Path) -> Vec<u8> {
    let metadata = [("seed".to_string(), "7".to_string()), ("model".to_string(), "tiny".to_string())].into();
    write_packed(path, params, &metadata).unwrap();
    std::fs::read(path).unwrap()
}

/// A small model dense, pruned and quantised.
fn stages(layers: usize) -> [Model; 3] {
    let text = r#"{"model_type":"bert","architectures":["BertModel"],"vocab_size":24,"hidden_size":8,
        "num_hidden_layers":LAYERS,"num_attention_heads":2,"intermediate_size":16,"max_position_embeddings":8}"#;
    let text = text.replace("LAYERS", &layers.to_string());
    let config = gpusq::arch::Config::parse(Path::new("config.json"), &text).unwrap();
    let mut dense = Model::random(config, 3).unwrap();
    dense.set_head(HeadKind::Classes(2), 3).unwrap();
    let mut pruned = dense.clone();
    prune_weights(&mut pruned, &Config::default().prune, &[], Compute::CPU).unwrap();
    let mut quantized = pruned.clone();
    let example = Example { ids: vec![2, 7, 9, 3], types: vec![0; 4], target: Target::Class(0) };
    let batch = collate(&[example], &[0], HeadKind::Classes(2), 0);
    calibrate(&mut quantized, &[batch.inputs], &calibration(&Config::default().quantize), Compute::CPU)
        .unwrap();
    [dense, pruned, quantized]
}

#[test]
fn rule_25_what_is_stored_must_be_of_the_stage() {
    let [dense, pruned, quantized] = stages(1);
    let (half, int8) = (pruned.packed().unwrap(), quantized.packed().unwrap());
    let weight = "encoder.0.attn.q.weight";
    for (model, is, says, tensor) in [
        (&half, "packed-f16", "packed-int8", weight),
        (&int8, "packed-int8", "packed-f16", weight),
        (&quantized, "quantized", "pruned", "gpusq."),
        (&quantized, "quantized", "dense", "gpusq."),
        (&pruned, "pruned", "quantized", "gpusq."),
        (&dense, "dense", "pruned", weight),
    ] {
        let dir = tempfile::tempdir().unwrap();
        model.save(dir.path(), None).unwrap();
        Model::load(dir.path()).unwrap();
        let manifest = dir.path().join("gpusq.json");
        let text = std::fs::read_to_string(&manifest).unwrap();
        assert!(text.contains(is), "{text}");
        std::fs::write(&manifest, text.replace(is, says)).unwrap();
        let error = Model::load(dir.path()).unwrap_err().to_string();
        assert!(error.contains(&format!("tensor `{tensor}")), "{is} as {says}: {error}");
        assert!(error.contains(dir.path().to_str().unwrap()), "{error}");
    }

    // One weight dense that should be packed, and one packed that should be dense.
    for (name, with, reason) in [
        (weight, "embed.word", "is stored dense, and gpusq.json says \"packed-f16\""),
        ("encoder.embed.type", weight, "only weights of linear maps may be packed"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let mut changed = half.clone();
        let shape = match changed.params.get(name).unwrap() {
            Weight::Packed(p) => vec![p.values.shape()[0], p.cols],
            _ => changed.params.dense(name).shape().to_vec(),
        };
        let weight = match half.params.get(with).unwrap() {
            Weight::Packed(_) => {
                let mask = [1, 1, 0, 0].repeat(shape[0] * shape[1] / 4);
                let mask = Tensor::from_u8(mask, &shape);
                Weight::Packed(pack_f16(&Tensor::full(&shape, 1.0), &mask, name).unwrap())
            }
            _ => Weight::Dense(Tensor::full(&shape, 1.0)),
        };
        changed.params.insert(name, weight);
        changed.save(dir.path(), None).unwrap();
        let error = Model::load(dir.path()).unwrap_err().to_string();
        assert!(error.contains(name) && error.contains(reason), "{error}");
    }
}

#[test]
fn a_model_comes_back_as_it_was_written() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gpusq.safetensors");
    let mut params = model();
    let first = written(&params, &path);
    round_dense(&mut params).unwrap();
    let (read, metadata) = read_packed(&path).unwrap();
    assert_eq!(read, params);
    assert_eq!(
        metadata.into_iter().collect::<Vec<_>>(),
        [("model".into(), "tiny".into()), ("seed".into(), "7".into())]
    );
    // Equal weights give equal bytes.
    assert_eq!(written(&read, &path), first);

    let file = Checkpoint::open_file(&path).unwrap();
    let types =
        ["a.weight.values", "b.weight.values", "embed", "norm.bias"].map(|n| file.info(n).unwrap().dtype);
    assert_eq!(types, [Dtype::I8, Dtype::F16, Dtype::F16, Dtype::F32]);

    // The accounted bits are the file's bytes after its header.
    let counted = sizes(&read);
    let header = 8 + u64::from_le_bytes(first[..8].try_into().unwrap());
    let bits = counted.packed_bits + counted.scale_bits + counted.rest_bits;
    assert_eq!(bits, (first.len() as u64 - header) * 8);
}

#[test]
fn the_writer_keeps_the_rules_too() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m");
    let refuses = |weight: Weight, reason: &str| {
        let mut params = model();
        params.insert("embed", weight);
        let error = write_packed(&path, &params, &BTreeMap::new()).unwrap_err().to_string();
        assert!(error.contains("`embed") && error.contains(reason), "{error}");
        assert!(std::fs::read_dir(dir.path()).unwrap().next().is_none(), "something was left behind");
    };
    let value = Tensor::full(&[1, 4], 1.0);
    let mask = Tensor::from_u8(vec![1, 1, 0, 0], &[1, 4]);
    refuses(Weight::Masked { value: value.clone(), mask: mask.clone() }, "pack it first");
    refuses(Weight::Dense(Tensor::full(&[1, 4], f32::NAN)), "must be finite");
    refuses(Weight::Dense(Tensor::full(&[1, 4], 1e5)), "too large for f16");
    refuses(Weight::Dense(mask.clone()), "dense weights are f32");
    let mut packed = pack_int8(&value, &mask, &Tensor::scalar(1.0), "embed").unwrap();
    packed.scale = None;
    refuses(Weight::Packed(packed.clone()), "is missing");
    packed.scale = Some(Tensor::scalar(1.0));
    packed.cols = 8;
    refuses(Weight::Packed(packed), "does not fit 8 columns");
    for key in ["format", "format_version", "gpusq.crc32.embed"] {
        let metadata = [(key.to_string(), "1".to_string())].into();
        let error = write_packed(&path, &model(), &metadata).unwrap_err().to_string();
        assert!(error.contains(key), "{error}");
    }
}

#[test]
fn the_specification_lists_every_name() {
    let text = include_str!("../../../FORMAT.md");
    let sizes = r#""vocab_size":24,"hidden_size":8,"num_hidden_layers":1,"num_attention_heads":2"#;
    let bart = r#""d_model":8,"encoder_layers":1,"decoder_layers":1,"encoder_attention_heads":2,
        "decoder_attention_heads":2,"encoder_ffn_dim":16,"decoder_ffn_dim":16"#;
    let mut names = std::collections::BTreeSet::new();
    for (family, class, more) in [
        ("bert", "BertForSequenceClassification", r#""intermediate_size":16,"type_vocab_size":2"#),
        ("llama", "LlamaForCausalLM", r#""intermediate_size":16,"tie_word_embeddings":false"#),
        ("opt", "OPTForCausalLM", r#""ffn_dim":16,"word_embed_proj_dim":4"#),
        ("bart", "BartForConditionalGeneration", bart),
    ] {
        let json = format!(
            r#"{{"model_type":"{family}","architectures":["{class}"],{sizes},"max_position_embeddings":8,{more}}}"#
        );
        let config = gpusq::arch::Config::parse(Path::new("config.json"), &json).unwrap();
        let spec = (gpusq::arch::find(&config).unwrap().spec)(&config).unwrap();
        let linears = spec.linears();
        names.extend(spec.weights().into_iter().map(|(name, _)| name));
        names.extend(linears.iter().map(|l| l.input_scale()));
        assert!(linears.iter().all(|l| l.output_scale() == format!("{}.output_scale", l.name)));
    }
    assert!(names.len() > 60, "{names:?}");
    for name in names {
        let pattern = name.replace("encoder.", "STACK.").replace("decoder.", "STACK.").replace(".0.", ".N.");
        assert!(text.contains(&format!("`{pattern}`")), "FORMAT.md does not have `{pattern}`");
    }
}

#[test]
fn the_specification_numbers_what_is_tested() {
    let text = include_str!("../../../FORMAT.md");
    let rules =
        text.lines().filter(|l| l.split_once(". ").is_some_and(|(n, _)| n.parse::<u32>().is_ok())).count();
    let source = include_str!("format.rs");
    let tests = (1..).take_while(|n| source.contains(&format!("fn rule_{n}_"))).count();
    assert_eq!(rules, tests, "FORMAT.md has {rules} rules and there are tests for {tests}");
}

#[test]
fn rule_26_files_beside_a_packed_model_must_be_those_it_was_saved_with() {
    let [dense, pruned, quantized] = stages(1);
    let (from, dir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    std::fs::write(from.path().join("vocab.txt"), "[PAD]\n[UNK]\nword\n").unwrap();
    let packed = quantized.packed().unwrap();
    packed.save(dir.path(), Some(from.path())).unwrap();
    Model::load(dir.path()).unwrap();
    let [vocab, config, manifest] = ["vocab.txt", "config.json", "gpusq.json"].map(|f| dir.path().join(f));
    for path in [&vocab, &config] {
        let whole = std::fs::read(path).unwrap();
        std::fs::write(path, &whole[..whole.len() - 2]).unwrap();
        let error = Model::load(dir.path()).unwrap_err().to_string();
        assert!(error.contains(path.to_str().unwrap()), "{error}");
        assert!(error.contains("is not the file that the model was saved with"), "{error}");
        std::fs::remove_file(path).unwrap();
        let error = Model::load(dir.path()).unwrap_err().to_string();
        assert!(error.contains(path.to_str().unwrap()) || error.contains("has no config.json"), "{error}");
        std::fs::write(path, whole).unwrap();
    }
    Model::load(dir.path()).unwrap();
    let text = std::fs::read_to_string(&manifest).unwrap();
    std::fs::write(&manifest, text.replace("vocab.txt", "../vocab.txt")).unwrap();
    let error = Model::load(dir.path()).unwrap_err().to_string();
    assert!(error.contains("`files` names ../vocab.txt, which is no file of a model"), "{error}");
    std::fs::write(&manifest, text).unwrap();
    // A change that is meant.
    std::fs::write(&vocab, "[PAD]\n[UNK]\nlexeme\n").unwrap();
    let mut json: serde_json::Value = serde_json::from_slice(&std::fs::read(&manifest).unwrap()).unwrap();
    assert!(json["files"].as_object_mut().unwrap().remove("vocab.txt").is_some());
    std::fs::write(&manifest, json.to_string()).unwrap();
    Model::load(dir.path()).unwrap();
    // Folders of early versions have none, and people edit those of other stages.
    json.as_object_mut().unwrap().remove("files").unwrap();
    std::fs::write(&manifest, json.to_string()).unwrap();
    Model::load(dir.path()).unwrap();
    for other in [&dense, &pruned, &quantized] {
        let dir = tempfile::tempdir().unwrap();
        other.save(dir.path(), Some(from.path())).unwrap();
        assert!(!std::fs::read_to_string(dir.path().join("gpusq.json")).unwrap().contains("files"));
    }
}

#[test]
fn rule_27_every_packed_weight_must_have_a_place() {
    let [_, _, quantized] = stages(2);
    let dir = tempfile::tempdir().unwrap();
    quantized.packed().unwrap().save(dir.path(), None).unwrap();
    let [config, manifest] = ["config.json", "gpusq.json"].map(|f| dir.path().join(f));
    let mut json: serde_json::Value = serde_json::from_slice(&std::fs::read(&manifest).unwrap()).unwrap();
    json.as_object_mut().unwrap().remove("files").unwrap();
    std::fs::write(&manifest, json.to_string()).unwrap();
    let mut json: serde_json::Value = serde_json::from_slice(&std::fs::read(&config).unwrap()).unwrap();
    for (layers, reason) in [(1, "has no place in the model"), (3, "is missing")] {
        json["num_hidden_layers"] = layers.into();
        std::fs::write(&config, json.to_string()).unwrap();
        let error = Model::load(dir.path()).unwrap_err().to_string();
        let first = layers.min(2);
        assert!(error.contains(&format!("`encoder.{first}.")) && error.contains(reason), "{error}");
    }
}
