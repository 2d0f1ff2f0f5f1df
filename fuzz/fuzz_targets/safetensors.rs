//! Any bytes as a safetensors file: refused in one line, or read as the reference implementation reads them.
#![no_main]

use gpusq::format::safetensors::{Checkpoint, check_finite};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let checkpoint = match Checkpoint::from_bytes("fuzz", bytes.to_vec()) {
        Ok(checkpoint) => checkpoint,
        Err(error) => return assert!(!error.to_string().contains('\n')),
    };
    let reference = safetensors::SafeTensors::deserialize(bytes).expect("the reference reads what we read");
    assert_eq!(checkpoint.names().count(), reference.len());
    for name in checkpoint.names() {
        let info = checkpoint.info(name).expect("a listed tensor");
        let theirs = reference.tensor(name).expect("a tensor of both");
        assert_eq!((info.dtype, &info.shape[..]), (theirs.dtype(), theirs.shape()));
        if let Ok(raw) = checkpoint.raw(name) {
            assert_eq!(raw.len() * raw.dtype().size(), theirs.data().len());
        }
        match checkpoint.tensor(name) {
            Ok(tensor) => {
                assert_eq!(tensor.shape(), info.shape);
                let _ = check_finite("fuzz", name, &tensor);
            }
            Err(error) => assert!(!error.to_string().contains('\n')),
        }
    }
});
