//! Any text as a config.json: refused in one line that names the file, or a specification whose weights have
//! sizes that do not overflow and that the family's tensor names cover once each.
#![no_main]

use std::collections::BTreeSet;
use std::path::Path;

use gpusq::arch::{Config, find, with_head};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    let path = Path::new("config.json");
    let config = Config::parse(path, text);
    let spec = config.and_then(|c| find(&c).and_then(|arch| (arch.spec)(&c)).map(|spec| (c, spec)));
    let (config, spec) = match spec {
        Ok(both) => both,
        Err(error) => {
            let error = error.to_string();
            return assert!(error.starts_with("config.json:") && !error.contains(['\n', '\r']), "{error}");
        }
    };
    // Thousands of layers are allowed, and their names would only slow the search down.
    if spec.stacks().any(|(_, s)| s.layers > 8) {
        return;
    }
    let weights = spec.weights();
    for (name, shape) in &weights {
        let elements = shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d));
        assert!(elements.is_some_and(|n| n > 0), "{name} {shape:?}");
    }
    let names: BTreeSet<&String> = weights.iter().map(|(n, _)| n).collect();
    assert_eq!(names.len(), weights.len());
    let entries = (find(&config).expect("found before").tensors)(&spec);
    let covered: BTreeSet<&String> = entries.iter().map(|e| &e.ours).collect();
    assert_eq!(covered.len(), entries.len());
    assert!(names.is_subset(&covered), "{:?}", names.difference(&covered).collect::<Vec<_>>());
    with_head(&config, &spec).expect("found before");
});
