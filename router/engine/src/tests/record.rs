//! The record of a run can be read back.

use std::time::Duration;

use headrace_wire::{decode_plan, decode_prepare, decode_result};

use super::fake::Fake;
use super::{Engine, config, read};

/// Kind and bytes of every record.
fn records(file: &[u8]) -> Vec<(u8, &[u8])> {
    let body = file
        .strip_prefix(b"HEADRACE\x01\0\0\0")
        .expect("magic and version");
    let mut rest = body;
    let mut records = Vec::new();
    while let [kind, a, b, c, d, tail @ ..] = rest {
        let len = u32::from_le_bytes([*a, *b, *c, *d]) as usize;
        records.push((*kind, &tail[..len]));
        rest = &tail[len..];
    }
    assert!(rest.is_empty(), "no record is cut short");
    records
}

fn record_to(path: std::path::PathBuf) -> crate::Record {
    let serve = bytes::Bytes::from_static(b"{}");
    crate::Record { path, serve }
}

#[tokio::test(start_paused = true)]
async fn a_record_holds_every_plan_and_result_after_the_preparation() {
    let path = std::env::temp_dir().join(format!("headrace-{}.plans", std::process::id()));
    let config = crate::EngineConfig {
        record: Some(record_to(path.clone())),
        ..config(2)
    };
    let group = Fake::group(2);
    let seen = std::sync::Arc::clone(&group[0].seen);
    let engine = Engine::ready_with(config, group).await;
    for n in 1..20 {
        read(&mut engine.stream(n, n).await).await;
    }
    engine.handle.drain(Duration::from_secs(1)).await;
    engine.task.await.expect("no panic").expect("no fault");

    let file = std::fs::read(&path).expect("it was written");
    std::fs::remove_file(&path).expect("it is ours");
    let records = records(&file);
    assert_eq!(records[0], (5, &b"{}"[..]));
    assert_eq!(records[1].0, 4);
    assert_eq!(records[2].0, 1);
    assert_eq!(
        decode_prepare(records[2].1).expect("a request").blocks_max,
        1025
    );
    let plans: Vec<_> = records.iter().filter(|record| record.0 == 2).collect();
    let results: Vec<_> = records.iter().filter(|record| record.0 == 3).collect();
    assert_eq!(records.len(), 3 + plans.len() + results.len());
    let plans: Vec<_> = plans
        .iter()
        .map(|plan| decode_plan(plan.1).expect("a plan"))
        .collect();
    assert_eq!(plans, seen.plans());
    for (plan, result) in plans.iter().zip(&results) {
        assert_eq!(decode_result(result.1).expect("a result").step, plan.step);
    }
    assert_eq!(plans.len(), results.len());
}

#[tokio::test(start_paused = true)]
async fn a_record_that_cannot_be_written_is_refused_at_start() {
    let path = std::path::PathBuf::from("/nowhere/at/all.plans");
    let config = crate::EngineConfig {
        record: Some(record_to(path)),
        ..config(1)
    };
    let (_handle, task) = crate::handle::start_with(config, super::dial(Fake::group(1)));
    let error = task.await.expect("no panic").expect_err("it is refused");
    assert!(
        error
            .to_string()
            .starts_with("cannot record plans to /nowhere/at/all.plans")
    );
}
