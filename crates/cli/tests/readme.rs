//! The README's commands are commands of this program.

use std::process::Command;

#[test]
fn commands_of_the_readme_parse() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../README.md");
    let readme = std::fs::read_to_string(path).unwrap().replace("\\\n", " ");
    let commands: Vec<&str> = readme.lines().filter_map(|line| line.trim().strip_prefix("gpusq ")).collect();
    assert!(commands.len() > 3, "the README has only {commands:?}");
    for line in commands {
        // What stands before `--help` is checked, and nothing is run.
        let words = line.split('#').next().unwrap().split_whitespace().chain(["--help"]);
        let output = Command::new(env!("CARGO_BIN_EXE_gpusq")).args(words).output().unwrap();
        let message = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "`gpusq {line}`: {message}");
    }
}

/// Rows of the README's tables whose first cell begins with a claim's name, as that name and the other cells.
fn claimed(readme: &str) -> Vec<(String, Vec<String>)> {
    let rows = readme.lines().filter(|line| line.starts_with("| `"));
    let cells = rows.map(|row| row.trim_matches('|').split('|').map(|cell| cell.trim().to_string()));
    let named = |mut cells: Vec<String>| {
        let name = cells.remove(0).split('`').nth(1).unwrap_or_default().to_string();
        (name, cells)
    };
    let dotted = |name: &str| ["train.", "encoder.", "accuracy."].iter().any(|kind| name.starts_with(kind));
    cells.map(|row| named(row.collect())).filter(|(name, _)| dotted(name)).collect()
}

/// Whether a number in `text`, or a hundred times it, is `value` to two decimals.
fn says(text: &str, value: f64) -> bool {
    let numbers = text.split(|c: char| !c.is_ascii_digit() && !"+-.eE".contains(c));
    let near = |x: f64| (x - value).abs() < 0.005 + 1e-9;
    numbers.filter_map(|n| n.parse::<f64>().ok()).any(|n| near(n) || near(100.0 * n))
}

#[test]
fn figures_of_the_readme_are_claims_with_raw_output() {
    let root = concat!(env!("CARGO_MANIFEST_DIR"), "/../..");
    let readme = std::fs::read_to_string(format!("{root}/README.md")).unwrap();
    let text = std::fs::read_to_string(format!("{root}/results/claims.json")).unwrap();
    let claims: Vec<serde_json::Value> = serde_json::from_str(&text).unwrap();
    let mut ids = std::collections::BTreeSet::new();
    for claim in &claims {
        let id = claim["id"].as_str().unwrap();
        assert!(ids.insert(id), "{id} is claimed twice");
        for key in ["unit", "against", "raw", "command", "machine", "date", "commit"] {
            assert!(claim[key].as_str().is_some_and(|text| !text.is_empty()), "{id} has no {key}");
        }
        let raw = claim["raw"].as_str().unwrap();
        assert!(std::path::Path::new(&format!("{root}/results/{raw}")).is_file(), "{id}: no results/{raw}");
        assert!(claim["value"].is_number() && claim["ratio"].is_number(), "{id}");
        let (value, raw_text) =
            (&claim["value"], std::fs::read_to_string(format!("{root}/results/{raw}")).unwrap());
        assert!(says(&raw_text, value.as_f64().unwrap()), "{id}: results/{raw} does not say {value}");
    }
    let find = |id: &str| claims.iter().find(|c| c["id"] == id).unwrap_or_else(|| panic!("{id} is no claim"));
    let rows = claimed(&readme);
    assert!(rows.len() > 5, "the README has only {rows:?}");
    for (name, cells) in rows {
        let shown = |value: &serde_json::Value| format!("{:.2}", value.as_f64().unwrap());
        if !name.starts_with("accuracy.") {
            let claim = find(&name);
            let [ours, against, ratio] = &cells[..] else { panic!("{name}: {cells:?}") };
            let value = format!("{} {}", shown(&claim["value"]), claim["unit"].as_str().unwrap());
            assert_eq!((ours, against.as_str()), (&value, claim["against"].as_str().unwrap()), "{name}");
            assert_eq!(ratio, &shown(&claim["ratio"]), "{name}");
        } else {
            let variants = ["dense.nokd", "gemm.kd", "gemm_mha.kd", "gemm.nokd", "gemm_mha.nokd"];
            assert_eq!(cells.len(), variants.len(), "{name}");
            for (cell, variant) in cells.iter().zip(variants) {
                let id = format!("{name}.{variant}");
                assert_eq!(cell, &shown(&find(&id)["value"]), "{id}");
            }
        }
    }
}
