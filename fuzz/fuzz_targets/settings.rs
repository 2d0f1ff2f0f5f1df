//! Any bytes as a settings file: refused in one line that names the file, or settings that written out read
//! back as the same.
#![no_main]

use std::cell::LazyCell;

use gpusq::config::Config;
use libfuzzer_sys::fuzz_target;

thread_local! {
    static DIR: LazyCell<tempfile::TempDir> = LazyCell::new(|| tempfile::tempdir().expect("a temporary folder"));
}

fuzz_target!(|bytes: &[u8]| DIR.with(|dir| {
    let file = dir.path().join("settings.toml");
    let read = |bytes: &[u8]| {
        std::fs::write(&file, bytes).expect("room for a small file");
        Config::load(Some(&file), None, &[])
    };
    match read(bytes) {
        Ok(config) => {
            assert_eq!(read(config.to_toml().as_bytes()).expect("what was written can be read"), config);
        }
        Err(error) => {
            let error = error.to_string();
            assert!(error.starts_with(file.to_str().expect("plain")) && !error.contains(['\n', '\r']), "{error}");
        }
    }
}));
