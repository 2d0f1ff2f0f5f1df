//! Any bytes as a tokenizer's file, of the kind that the first byte picks: refused in one line, or a tokenizer
//! that keeps to the length and to its vocabulary.
#![no_main]

use std::cell::LazyCell;

use gpusq::task::Tokenizer;
use libfuzzer_sys::fuzz_target;

thread_local! {
    static DIR: LazyCell<tempfile::TempDir> = LazyCell::new(|| tempfile::tempdir().expect("a temporary folder"));
}

fuzz_target!(|bytes: &[u8]| DIR.with(|dir| {
    let Some((pick, bytes)) = bytes.split_first() else { return };
    let write = |name: &str, bytes: &[u8]| std::fs::write(dir.path().join(name), bytes).expect("room for a small file");
    let remove = |name: &str| drop(std::fs::remove_file(dir.path().join(name)));
    ["tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "merges.txt"].into_iter().for_each(remove);
    match pick % 4 {
        0 => write("tokenizer.json", bytes),
        1 => write("vocab.txt", bytes),
        2 => {
            write("vocab.txt", b"[PAD]\n[UNK]\n[CLS]\n[SEP]\na\n");
            write("tokenizer_config.json", bytes);
        }
        _ => {
            // The two files of byte-level BPE, with a zero byte between them.
            let mut parts = bytes.splitn(2, |&b| b == 0);
            write("vocab.json", parts.next().unwrap_or_default());
            write("merges.txt", parts.next().unwrap_or_default());
            write("tokenizer_config.json", br#"{"tokenizer_class": "GPT2Tokenizer"}"#);
        }
    }
    let one_line = |error: gpusq::Error| assert!(!error.to_string().contains(['\n', '\r']), "{error}");
    let tokenizer = match Tokenizer::load(dir.path()) {
        Ok(tokenizer) => tokenizer,
        Err(error) => return one_line(error),
    };
    for (a, b) in [("a b", None), ("Caf\u{e9} a", Some("b\u{6c34} a")), ("", Some(""))] {
        let limit = tokenizer.added(b.is_some()) + 3;
        match tokenizer.encode(a, b, limit) {
            Ok(e) => {
                assert!(e.ids.len() <= limit && e.types.len() == e.ids.len());
                assert!(e.ids.iter().all(|&id| (id as usize) < tokenizer.vocab_size()));
            }
            Err(error) => one_line(error),
        }
        match tokenizer.pieces(a) {
            Ok(pieces) => assert!(pieces.spans.iter().all(|s| a.get(s.clone()).is_some())),
            Err(error) => one_line(error),
        }
    }
}));
