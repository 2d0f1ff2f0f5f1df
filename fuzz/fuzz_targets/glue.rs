//! Any bytes as a GLUE file, as the task that the first byte picks: refused in one line that names the file,
//! or examples that fit the length and have a target that the task allows.
#![no_main]

use std::cell::LazyCell;

use gpusq::task::{HeadKind, Split, TASKS, Target, Tokenizer};
use libfuzzer_sys::fuzz_target;

const WORDS: [&str; 8] = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "b", "##c", "."];
const LENGTH: usize = 12;

thread_local! {
    static DIR: LazyCell<tempfile::TempDir> = LazyCell::new(|| tempfile::tempdir().expect("a temporary folder"));
    static TOKENIZER: LazyCell<Tokenizer> = LazyCell::new(|| Tokenizer::word_piece(&WORDS).expect("has its special tokens"));
}

fuzz_target!(|bytes: &[u8]| {
    let Some((pick, bytes)) = bytes.split_first() else { return };
    let task = TASKS.iter().filter(|t| t.head != HeadKind::Span).cycle().nth(*pick as usize).expect("endless");
    DIR.with(|dir| {
        let file = dir.path().join("train.tsv");
        std::fs::write(&file, bytes).expect("room for a small file");
        match TOKENIZER.with(|t| task.load(dir.path(), Split::Train, t, LENGTH)) {
            Ok(data) => {
                assert!(!data.examples.is_empty());
                for e in &data.examples {
                    assert!(e.ids.len() <= LENGTH && e.types.len() == e.ids.len());
                    assert!(match (e.target, task.head) {
                        (Target::Class(c), HeadKind::Classes(n)) => (c as usize) < n,
                        (Target::Value(v), HeadKind::Value) => v.is_finite(),
                        _ => false,
                    });
                }
                let width = if let HeadKind::Classes(n) = task.head { n } else { 1 };
                data.score(&vec![vec![0.5; width]; data.examples.len()]);
            }
            Err(error) => {
                let error = error.to_string();
                assert!(error.starts_with(file.to_str().expect("plain")) && !error.contains(['\n', '\r']), "{error}");
            }
        }
    });
});
