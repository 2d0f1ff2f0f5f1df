//! Any bytes as the saved state of a training stage: refused in one line that names the file, or a state whose
//! masks are 2:4 and whose numbers are finite, and that saved again reads back as the same.
#![no_main]

use std::cell::LazyCell;

use gpusq::params::{Params, Weight};
use gpusq::tensor::Tensor;
use gpusq::train::State;
use libfuzzer_sys::fuzz_target;

thread_local! {
    static DIR: LazyCell<tempfile::TempDir> = LazyCell::new(|| tempfile::tempdir().expect("a temporary folder"));
}

/// A model with a weight of each kind that is trained.
fn params() -> Params {
    let mask = Tensor::from_u8(vec![1, 1, 0, 0], &[1, 4]);
    let mut params = Params::new();
    params.insert("d", Weight::Dense(Tensor::zeros(&[2])));
    params.insert("m", Weight::Masked { value: Tensor::zeros(&[1, 4]), mask: mask.clone() });
    params.insert("f", Weight::Fake { value: Tensor::zeros(&[1, 4]), mask, scale: Tensor::scalar(1.0) });
    params.insert("f.input_scale", Weight::Dense(Tensor::scalar(1.0)));
    params
}

fuzz_target!(|bytes: &[u8]| DIR.with(|dir| {
    let file = dir.path().join("state");
    let read = || {
        let mut params = params();
        State::load(&file, &mut params).map(|state| (state, params))
    };
    std::fs::write(&file, bytes).expect("room for a small file");
    let (state, params) = match read() {
        Ok(read) => read,
        Err(error) => {
            let error = error.to_string();
            return assert!(error.starts_with(file.to_str().expect("plain")) && !error.contains(['\n', '\r']), "{error}");
        }
    };
    for (name, weight) in params.iter() {
        let (value, mask, scale) = match weight {
            Weight::Dense(value) => (value, None, None),
            Weight::Masked { value, mask } => (value, Some(mask), None),
            Weight::Fake { value, mask, scale } => (value, Some(mask), Some(scale)),
            Weight::Packed(_) => unreachable!("not in the model"),
        };
        assert!(value.f32().iter().all(|x| x.is_finite()), "{name}");
        assert!(mask.is_none_or(|m| m.u8().iter().map(|&kept| u32::from(kept)).sum::<u32>() == 2), "{name}");
        assert!(scale.is_none_or(|s| s.item() > 0.0), "{name}");
    }
    let save = |state: &State, params: &Params| {
        state.save(&file, params).expect("what was read can be saved");
        std::fs::read(&file).expect("it was just written")
    };
    let saved = save(&state, &params);
    let (state, params) = read().expect("what was saved can be read");
    assert!(save(&state, &params) == saved);
}));
