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
