//! Any bytes as a SQuAD file: refused in one line that names the file, or windows that fit the length with
//! answers inside them, which score 100 when a model finds them.
#![no_main]

use std::cell::LazyCell;

use gpusq::task::{Split, Target, Tokenizer, task};
use libfuzzer_sys::fuzz_target;

const WORDS: [&str; 10] = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "b", "##c", ".", "who", "?"];
const LENGTH: usize = 16;

thread_local! {
    static DIR: LazyCell<tempfile::TempDir> = LazyCell::new(|| tempfile::tempdir().expect("a temporary folder"));
    static TOKENIZER: LazyCell<Tokenizer> = LazyCell::new(|| Tokenizer::word_piece(&WORDS).expect("has its special tokens"));
}

fuzz_target!(|bytes: &[u8]| DIR.with(|dir| {
    let file = dir.path().join("train-v1.1.json");
    std::fs::write(&file, bytes).expect("room for a small file");
    let task = task("squad").expect("in the table");
    match TOKENIZER.with(|t| task.load(dir.path(), Split::Train, t, LENGTH)) {
        Ok(data) => {
            let mut outputs = Vec::new();
            for e in &data.examples {
                assert!(e.ids.len() <= LENGTH && e.types.len() == e.ids.len());
                let Target::Span { start, end } = e.target else { panic!("{:?}", e.target) };
                assert!(start <= end && (end as usize) < e.ids.len());
                let mut logits = vec![0.0; 2 * e.ids.len()];
                logits[start as usize] = 1.0;
                logits[e.ids.len() + end as usize] = 1.0;
                outputs.push(logits);
            }
            let scores = data.score(&outputs);
            assert!(scores.0.iter().all(|(_, v)| (0.0..=100.0).contains(v)), "{scores}");
        }
        Err(error) => {
            let error = error.to_string();
            assert!(error.starts_with(file.to_str().expect("plain")) && !error.contains(['\n', '\r']), "{error}");
        }
    }
}));
