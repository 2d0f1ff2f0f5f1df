//! Any bytes as the gpusq.json of a folder with a sound configuration and no weights: refused in one line
//! that names the folder.
#![no_main]

use std::cell::LazyCell;

use gpusq::model::Model;
use libfuzzer_sys::fuzz_target;

const CONFIG: &str = r#"{"model_type": "bert", "vocab_size": 8, "hidden_size": 4, "num_hidden_layers": 1,
    "num_attention_heads": 1, "intermediate_size": 4, "max_position_embeddings": 4, "type_vocab_size": 2}"#;

thread_local! {
    static DIR: LazyCell<tempfile::TempDir> = LazyCell::new(|| {
        let dir = tempfile::tempdir().expect("a temporary folder");
        std::fs::write(dir.path().join("config.json"), CONFIG).expect("room for a small file");
        dir
    });
}

fuzz_target!(|bytes: &[u8]| DIR.with(|dir| {
    std::fs::write(dir.path().join("gpusq.json"), bytes).expect("room for a small file");
    let error = Model::load(dir.path()).expect_err("there are no weights").to_string();
    assert!(error.starts_with(dir.path().to_str().expect("plain")) && !error.contains(['\n', '\r']), "{error}");
}));
