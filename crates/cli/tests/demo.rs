//! `gpusq demo` as a new user runs it: the built program, an empty folder, nothing else.

use std::process::Command;
use std::time::Instant;

use serde_json::Value;

#[test]
fn demo_keeps_the_score_and_packed_equals_fake_quantised() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("demo");
    let start = Instant::now();
    let run = Command::new(env!("CARGO_BIN_EXE_gpusq"))
        .args(["demo", "--json", "--out"])
        .arg(&out)
        .output()
        .unwrap();
    assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
    let text = String::from_utf8(run.stdout).unwrap();
    let events: Vec<Value> = text.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    println!("demo: {:.0} s", start.elapsed().as_secs_f64());

    let done = events.last().unwrap();
    assert_eq!(done["event"], "done");
    let score = |stage: usize| done["stages"][stage]["scores"][0][1].as_f64().unwrap();
    // A bag of words reaches 63 % on this task.
    assert!(score(0) > 90.0, "dense {}", score(0));
    assert!(score(2) > score(0) - 1.0, "dense {}, 2:4 INT8 {}", score(0), score(2));

    // The engine's score equals the fake-quantised one, for both compressions.
    let scored: Vec<(&str, f64)> = events
        .iter()
        .filter(|e| e["event"] == "scored")
        .map(|e| (e["stage"].as_str().unwrap(), e["scores"]["accuracy"].as_f64().unwrap()))
        .collect();
    let of = |name: &str| -> Vec<f64> { scored.iter().filter(|s| s.0 == name).map(|s| s.1).collect() };
    assert_eq!(of("2:4 INT8").len(), 2);
    assert_eq!(of("2:4 INT8"), of("2:4 INT8 (packed)"));

    for file in
        ["report.html", "run.json", "compressed/packed/model.gpusq.safetensors", "compressed/report.html"]
    {
        assert!(out.join(file).is_file(), "{file} is missing");
    }
    let page = std::fs::read_to_string(out.join("report.html")).unwrap();
    assert!(page.contains("31.25 %") && page.contains("without distillation"));
}
