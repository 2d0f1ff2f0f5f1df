//! Any bytes as a checkpoint's index: refused in one line, or shard names that stay in the folder.
#![no_main]

use std::path::Path;

use gpusq::format::safetensors::parse_index;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| match parse_index("fuzz", bytes) {
    Ok(weight_map) => {
        assert!(!weight_map.is_empty());
        for shard in weight_map.values() {
            assert_eq!(Path::new("dir").join(shard).parent(), Some(Path::new("dir")));
            assert!(shard.ends_with(".safetensors") && !shard.contains(['/', '\\']));
        }
    }
    Err(error) => assert!(!error.to_string().contains('\n')),
});
