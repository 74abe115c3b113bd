//! Seeded mistakes: the referee, the audit or the oracle notices every one of them, within a second.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use headrace_core::mutation::Mutation;
use headrace_core::testing::world::{Choices, play};

/// Plays random worlds until one of them breaks: how many it took, and the sentence.
fn hunt(mutation: Mutation) -> Option<(u64, String)> {
    let begun = Instant::now();
    for seed in 0.. {
        let world = AssertUnwindSafe(|| play(&mut Choices::random(seed), 150, Some(mutation)));
        if let Err(panic) = catch_unwind(world) {
            let literal = panic.downcast_ref::<&str>().map(ToString::to_string);
            let sentence = literal.or_else(|| panic.downcast_ref::<String>().cloned());
            return Some((seed + 1, sentence.unwrap_or_default()));
        }
        if begun.elapsed() > Duration::from_secs(20) {
            return None;
        }
    }
    None
}

#[test]
fn every_seeded_mistake_is_noticed_within_a_second() {
    std::panic::set_hook(Box::new(|_| {}));
    let mut report = Vec::new();
    let mut missed = Vec::new();
    for mutation in Mutation::ALL {
        let begun = Instant::now();
        let caught = hunt(mutation);
        let ms = begun.elapsed().as_millis();
        if caught.is_none() || ms > 1000 {
            missed.push(mutation);
        }
        let (worlds, sentence) = caught.unwrap_or((0, "NOT NOTICED".to_owned()));
        let line = sentence.lines().next().unwrap_or_default();
        report.push(format!("{mutation:?}: {ms} ms, {worlds} worlds: {line}"));
    }
    drop(std::panic::take_hook());
    let report = report.join("\n");
    std::fs::write(
        concat!(env!("CARGO_TARGET_TMPDIR"), "/mutations.txt"),
        &report,
    )
    .expect("the target folder is writable");
    assert!(missed.is_empty(), "missed {missed:?} of\n{report}");
}
