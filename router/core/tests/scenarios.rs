//! Runs `tests/scenarios/*.txt`. `UPDATE=1` rewrites them, to be reviewed as prose.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::Path;

use headrace_core::testing::script::run;

#[test]
fn every_scenario_goes_as_written() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/scenarios");
    let update = std::env::var_os("UPDATE").is_some();
    let mut files: Vec<_> = folder
        .read_dir()
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    files.sort();
    assert!(
        files.len() > 15,
        "the scenarios are not where they should be"
    );
    for path in files {
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        let written = std::fs::read_to_string(&path).unwrap();
        let told = std::panic::catch_unwind(|| run(&written));
        let told = told.unwrap_or_else(|_| panic!("{name} does not run through"));
        if update {
            std::fs::write(&path, told).unwrap();
        } else {
            assert_eq!(told, written, "{name} goes otherwise; UPDATE=1 rewrites it");
        }
    }
}
