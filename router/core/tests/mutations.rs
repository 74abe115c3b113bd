//! Seeded mistakes: the referee, the audit or the oracle notices every one of them, in a tenth of a
//! second; and the referee and the oracle alone notice most.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Instant;

use headrace_core::mutation::Mutation;
use headrace_core::testing::world::{Choices, Watch, play};

/// Random worlds in which a mistake is noticed, the same on every machine; a quiet core plays them in
/// a tenth of a second.
const WORLDS_MAX: u64 = 200;

/// Plays random worlds until one of them breaks: how many it took, and the sentence.
fn hunt(mutation: Mutation, watch: Watch) -> Option<(u64, String)> {
    for seed in 0..WORLDS_MAX {
        let world = || play(&mut Choices::random(seed), 150, watch, Some(mutation));
        if let Err(panic) = catch_unwind(AssertUnwindSafe(world)) {
            let literal = panic.downcast_ref::<&str>().map(ToString::to_string);
            let sentence = literal.or_else(|| panic.downcast_ref::<String>().cloned());
            return Some((seed + 1, sentence.unwrap_or_default()));
        }
    }
    None
}

/// The mistakes that nobody noticed, and a line for each mistake.
fn hunt_all(watch: Watch) -> (Vec<Mutation>, String) {
    let (mut missed, mut report) = (Vec::new(), Vec::new());
    for mutation in Mutation::ALL {
        let begun = Instant::now();
        let noticed = hunt(mutation, watch);
        let ms = begun.elapsed().as_millis();
        if noticed.is_none() {
            missed.push(mutation);
        }
        let (worlds, sentence) = noticed.unwrap_or((0, "NOT NOTICED".to_owned()));
        let line = sentence.lines().next().unwrap_or_default();
        report.push(format!("{mutation:?}: {ms} ms, {worlds} worlds: {line}"));
    }
    (missed, report.join("\n"))
}

#[test]
fn every_seeded_mistake_is_noticed() {
    // A caught panic is a success here and needs no backtrace.
    std::panic::set_hook(Box::new(|_| {}));
    let (missed, report) = hunt_all(Watch::All);
    let (missed_without_audit, without_audit) = hunt_all(Watch::NoAudit);
    drop(std::panic::take_hook());
    println_lines(&format!("{report}\n\nWithout the audit:\n{without_audit}"));
    assert!(missed.is_empty(), "missed {missed:?} of\n{report}");
    let noticed = Mutation::ALL.len() - missed_without_audit.len();
    assert!(
        noticed >= 20,
        "without the audit missed {missed_without_audit:?} of\n{without_audit}"
    );
}

#[expect(
    clippy::print_stdout,
    reason = "`cargo test -- --nocapture` shows the times"
)]
fn println_lines(text: &str) {
    println!("{text}");
}
