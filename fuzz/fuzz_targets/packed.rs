//! Any bytes as a packed model: refused in one line, or a model that unpacks and that written again is the
//! same model.
#![no_main]

use gpusq::format::packed::{read_packed, read_packed_checkpoint, sizes, unpack_f32, write_packed};
use gpusq::format::safetensors::Checkpoint;
use gpusq::params::Weight;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let read = Checkpoint::from_bytes("fuzz", bytes.to_vec()).and_then(|c| read_packed_checkpoint(&c));
    let (params, metadata) = match read {
        Ok(read) => read,
        Err(error) => return assert!(!error.to_string().contains('\n')),
    };
    for (_, weight) in params.iter() {
        if let Weight::Packed(packed) = weight {
            assert_eq!(unpack_f32(packed).shape(), [packed.values.rows(), packed.cols]);
        }
    }
    assert!(sizes(&params).ratio() > 0.0);
    let dir = tempfile::tempdir().expect("a temporary folder");
    let path = dir.path().join("m");
    write_packed(&path, &params, &metadata).expect("what was read can be written");
    assert_eq!(read_packed(&path).expect("what was written can be read"), (params, metadata));
});
