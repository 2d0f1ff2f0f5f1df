//! ARCHITECTURE.md, held by the code: who may know of whom, and what each table of the library promises.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use gpusq::arch::ARCHS;
use gpusq::config::{Config, PRESETS, settings};
use gpusq::reproduce::EXPERIMENTS;
use gpusq::sparsity::CRITERIA;
use gpusq::task::TASKS;

/// The library's modules from the bottom up. A module may use those of earlier rows only, neither its own
/// row's nor later ones. A new module gets its place here and its lines in ARCHITECTURE.md.
const LAYERS: &[&[&str]] = &[
    &["error"],
    &["textfile"],
    &["spec", "params", "sparsity", "task", "report"],
    &["arch", "format", "inputs", "config"],
    &["model"],
    &["forward", "engine", "hub", "outdir"],
    &["quant", "distill"],
    &["train"],
    &["evaluate", "preflight"],
    &["bench", "infer", "compress"],
    &["reproduce"],
];

/// What `lib.rs` gives every module: not modules of their own.
const ROOT: &[&str] = &["Error", "Result", "tensor"];

fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// Every Rust file under `folder`, with its text.
fn sources(folder: &Path) -> Vec<(PathBuf, String)> {
    let mut out = Vec::new();
    let mut folders = vec![folder.to_path_buf()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|e| e == "rs") {
                let text = std::fs::read_to_string(&path).unwrap();
                out.push((path, text));
            }
        }
    }
    assert!(!out.is_empty(), "no source in {}", folder.display());
    out
}

/// `text` without comments and without its unit tests, which come last in a file.
fn code(text: &str) -> String {
    let text = text.split("#[cfg(test)]\nmod tests").next().unwrap_or_default();
    let uncommented = text.lines().map(|line| match line.find("//") {
        // Not the slashes of an address in a string.
        Some(at) if !line[..at].ends_with(':') => &line[..at],
        _ => line,
    });
    uncommented.collect::<Vec<_>>().join("\n")
}

/// The words of `code`: runs of letters, digits and underscores.
fn words(code: &str) -> BTreeSet<&str> {
    code.split(|c: char| !c.is_alphanumeric() && c != '_').collect()
}

/// The names that follow `crate::` in `code`, directly or in braces.
fn used(code: &str) -> BTreeSet<String> {
    let name = |text: &str| text.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect::<String>();
    let mut out = BTreeSet::new();
    for rest in code.split("crate::").skip(1) {
        let Some(list) = rest.strip_prefix('{') else {
            out.insert(name(rest));
            continue;
        };
        let (mut depth, mut first) = (0, true);
        for (i, c) in list.char_indices() {
            match c {
                '{' => depth += 1,
                '}' if depth == 0 => break,
                '}' => depth -= 1,
                ',' if depth == 0 => first = true,
                c if first && !c.is_whitespace() => {
                    out.insert(name(&list[i..]));
                    first = false;
                }
                _ => {}
            }
        }
    }
    out
}

/// The library's files, each with the module of `lib.rs` it belongs to.
fn library() -> Vec<(String, PathBuf, String)> {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let files = sources(&src).into_iter().map(|(path, text)| {
        let first = path.strip_prefix(&src).unwrap().components().next().unwrap();
        let module = Path::new(first.as_os_str()).file_stem().unwrap().to_str().unwrap().to_string();
        (module, path, text)
    });
    files.filter(|(module, _, _)| module != "lib").collect()
}

#[test]
fn used_names_are_found() {
    let text = code(
        "use crate::{Error, a::{b, c}, d};\nuse crate::e::f; // crate::g\nlet x = crate::h::i();\n\
         #[cfg(test)]\nmod tests { use crate::j; }",
    );
    let found: Vec<String> = used(&text).into_iter().collect();
    assert_eq!(found, ["Error", "a", "d", "e", "h"]);
}

#[test]
fn modules_look_down_only() {
    let place = |module: &str| LAYERS.iter().position(|layer| layer.contains(&module));
    let files = library();
    let modules: BTreeSet<&str> = files.iter().map(|(module, _, _)| module.as_str()).collect();
    let listed: BTreeSet<&str> = LAYERS.iter().flat_map(|layer| layer.iter().copied()).collect();
    assert_eq!(modules, listed, "LAYERS above and the modules of src/ differ");
    let mut wrong = Vec::new();
    for (module, path, text) in &files {
        let text = code(text);
        for name in used(&text).iter().filter(|n| *n != module && !ROOT.contains(&n.as_str())) {
            if place(name) >= place(module) {
                wrong.push(format!("{}: `{module}` uses `{name}`", path.display()));
            }
        }
        // The way around `crate::`.
        let top = path.file_stem().is_some_and(|stem| stem.to_str() == Some(module));
        if text.contains("super::super::") || top && text.contains("super::") {
            wrong.push(format!("{}: write crate:: for what lies outside the module", path.display()));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn the_engine_knows_no_training_and_families_know_no_compression() {
    let mut wrong = Vec::new();
    for (module, path, text) in library() {
        let text = code(&text);
        match module.as_str() {
            "engine" => {
                let words = words(&text);
                let bad =
                    ["Tape", "Var", "tape", "train", "distill"].into_iter().filter(|w| words.contains(w));
                wrong.extend(bad.map(|w| format!("{} says `{w}`", path.display())));
            }
            "arch" => {
                let text = text.to_lowercase();
                let bad = ["sparse", "int8", "cuda"].into_iter().filter(|w| text.contains(w));
                wrong.extend(bad.map(|w| format!("{} says `{w}`", path.display())));
            }
            _ => {}
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn only_the_numerics_crate_is_unsafe() {
    for root in ["gpusq/src/lib.rs", "cli/src/main.rs"] {
        let text = std::fs::read_to_string(workspace().join("crates").join(root)).unwrap();
        assert!(text.contains("#![forbid(unsafe_code)]"), "{root} does not forbid unsafe code");
    }
    // Tests, benchmarks and examples are crates of their own, which no attribute covers.
    for folder in ["crates/gpusq", "crates/cli", "fuzz/fuzz_targets"] {
        for (path, text) in sources(&workspace().join(folder)) {
            for form in [concat!("unsafe", " {"), concat!("unsafe", " fn"), concat!("unsafe", " impl")] {
                assert!(!code(&text).contains(form), "{} has `{form}`", path.display());
            }
        }
    }
}

#[test]
fn only_the_program_prints() {
    for name in ["tensor", "gpusq"] {
        let root = workspace().join("crates").join(name);
        let manifest = std::fs::read_to_string(root.join("Cargo.toml")).unwrap();
        for dependency in ["clap", "indicatif"] {
            assert!(!manifest.contains(dependency), "{name} depends on {dependency}; it belongs in cli");
        }
        // Unit tests in a file of their own say what they skip, as those at the end of a file do.
        for (path, text) in sources(&root.join("src")).iter().filter(|(path, _)| !path.ends_with("tests.rs"))
        {
            for word in ["print!", "println!", "dbg!"] {
                // `println!` also stands for `eprintln!`, and `print!` for `eprint!`.
                assert!(!code(text).contains(word), "{} has {word}; report an event", path.display());
            }
        }
    }
}

#[test]
fn tables_have_unique_documented_names() {
    let tables: [(&str, Vec<(&str, &str)>); 5] = [
        ("ARCHS", ARCHS.iter().map(|a| (a.name, a.doc)).collect()),
        ("TASKS", TASKS.iter().map(|t| (t.name, t.about)).collect()),
        ("CRITERIA", CRITERIA.iter().map(|c| (c.name, c.doc)).collect()),
        ("EXPERIMENTS", EXPERIMENTS.iter().map(|e| (e.name, e.about)).collect()),
        ("PRESETS", PRESETS.iter().map(|p| (p.name, p.doc)).collect()),
    ];
    for (table, rows) in tables {
        let names: BTreeSet<&str> = rows.iter().map(|(name, _)| *name).collect();
        assert_eq!(names.len(), rows.len(), "{table} has a name twice");
        for (name, doc) in rows {
            assert!(!doc.is_empty() && doc != name, "{table}: `{name}` is not documented");
        }
    }
    let names: BTreeSet<String> = settings().iter().map(|s| s.name()).collect();
    assert_eq!(names.len(), settings().len(), "a setting has its name twice");
    for task in TASKS {
        assert!(!task.metrics.is_empty(), "{} has no metric", task.name);
    }
    for preset in PRESETS {
        let config = Config::load(None, Some(preset.name), &[]).unwrap();
        assert_ne!(config, Config::default(), "preset {} changes nothing", preset.name);
    }
}

#[test]
fn golden_cases_cover_every_family() {
    let root = std::env::var_os("GPUSQ_GOLDEN_DIR")
        .map_or_else(|| workspace().join("../shared/golden"), PathBuf::from);
    let Ok(cases) = std::fs::read_dir(&root) else {
        println!("skipped: no {}; set GPUSQ_GOLDEN_DIR", root.display());
        return;
    };
    let mut covered = BTreeSet::new();
    for case in cases {
        let path = case.unwrap().path().join("config.json");
        if path.is_file() {
            let config: serde_json::Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
            covered.insert(config["model_type"].as_str().unwrap().to_string());
        }
    }
    for arch in ARCHS {
        assert!(covered.contains(arch.name), "no golden case of {} in {}", arch.name, root.display());
    }
}
