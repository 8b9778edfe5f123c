//! The benchmark itself, run briefly with what needs no other build product.

use serde_json::Value;
use std::process::{Command, Output};

fn bench(args: &[&str]) -> std::io::Result<Output> {
    // Beside the build, so that the files are on a disk; nobody believes the numbers of a test, so
    // that it need not wait for a quiet machine.
    let mut command = Command::new(env!("CARGO_BIN_EXE_durovfs-bench"));
    command.args(["--settle=0", "--dir", env!("CARGO_TARGET_TMPDIR")]);
    command.args(args).output()
}

#[test]
fn a_run_measures_each_system_with_its_processes() {
    // Broken: scripts/bench would fail, or print numbers of commits that no replica synced.
    let output = bench(&[
        "--systems=plain,pipeline,pipeline-loop",
        "--rounds=2",
        "--seconds=0.3",
        "--callers=1,3",
        "--json",
    ])
    .unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["results"].as_array().unwrap().len(), 2);
    for result in report["results"].as_array().unwrap() {
        for system in ["plain", "pipeline", "pipeline-loop"] {
            let samples = result["samples"][system].as_array().unwrap();
            assert_eq!(samples.len(), 2, "{system}");
            for sample in samples {
                assert!(
                    sample["p50_us"].as_f64().unwrap() > 0.0,
                    "{system}: {sample}"
                );
                assert!(
                    sample["p99_us"].as_f64() >= sample["p50_us"].as_f64(),
                    "{system}"
                );
            }
        }
        let bytes = report["commit_bytes"].as_f64().unwrap();
        let samples = result["samples"]["pipeline"].as_array().unwrap();
        let written = |sample: &Value| {
            sample["per_commit"]["replicas"]["disk_bytes"]
                .as_f64()
                .unwrap()
        };
        // Each commit is on five disks, three of them before it is answered; a page that two
        // commits of one batch share is written once.
        assert!(
            samples
                .iter()
                .all(|sample| written(sample) >= 3.0 * bytes * 0.9),
            "{samples:?}"
        );
    }
}

#[test]
fn a_run_without_the_build_products_says_what_to_do() {
    // Broken: somebody who starts the binary alone would get a puzzle.
    let output = bench(&["--systems=durovfs", "--products=/nonexistent"]).unwrap();
    assert_eq!(output.status.code(), Some(1));
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(
        errors.contains("is not there: build it, or use scripts/bench"),
        "{errors}"
    );
}
