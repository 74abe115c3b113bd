//! What callers see when the group is lost: every stream ends with a reason, and the engine says
//! why.

use std::time::Duration;

use tokio::time::Instant;

use super::fake::{Fake, Fault};
use super::{Engine, config, dial, expected, read};
use crate::error::{EngineError, ShardError};
use crate::handle::{EngineState, start_with};
use crate::{FinishReason, SubmitError};

/// Runs two streams into a fault of the last rank and returns what the driver ends with.
async fn lose(ranks: u32, fault: Fault) -> ShardError {
    let mut group = Fake::paced(ranks);
    group.last_mut().expect("a group has ranks").fault = fault;
    let engine = Engine::ready(group).await;
    let mut streams = [engine.stream(4, 100).await, engine.stream(9, 100).await];
    for (stream, prompt) in streams.iter_mut().zip([4, 9]) {
        let (tokens, reason) = read(stream).await;
        assert_eq!(reason, FinishReason::GroupLost);
        let drawn = u32::try_from(tokens.len()).expect("few");
        assert_eq!(
            tokens,
            expected(prompt, drawn),
            "what came before was right"
        );
    }
    engine
        .wait_for(|state| matches!(state, EngineState::Down { .. }))
        .await;
    assert!(matches!(
        engine.submit(4, 1).await,
        Err(SubmitError::Down { .. })
    ));
    engine.handle.drain(Duration::from_secs(1)).await;
    match engine.task.await.expect("the driver does not panic") {
        Err(EngineError::Group(error)) => error,
        other => panic!("the group is lost, not {other:?}"),
    }
}

#[tokio::test(start_paused = true)]
async fn a_stream_that_ends_loses_the_group() {
    let error = lose(1, Fault::End(5)).await;
    assert!(
        matches!(error, ShardError::StreamEnded { rank: 0, .. }),
        "{error}"
    );
    let error = lose(2, Fault::Fail(5)).await;
    assert_eq!(
        error.to_string(),
        "the stream of rank 1 ended: out of memory"
    );
}

#[tokio::test(start_paused = true)]
async fn a_step_that_takes_too_long_loses_the_group() {
    let started = Instant::now();
    let error = lose(2, Fault::Hang(7)).await;
    assert!(matches!(error, ShardError::StepDeadline { .. }), "{error}");
    assert_eq!(
        started.elapsed().as_secs(),
        config(1).step_deadline.as_secs()
    );
}

#[tokio::test(start_paused = true)]
async fn ranks_that_disagree_lose_the_group() {
    let error = lose(3, Fault::Digest(4)).await;
    assert!(
        matches!(error, ShardError::DigestMismatch { rank: 2, .. }),
        "{error}"
    );
}

#[tokio::test(start_paused = true)]
async fn results_out_of_order_lose_the_group() {
    let error = lose(1, Fault::Skip(3)).await;
    assert!(
        matches!(error, ShardError::OutOfOrder { rank: 0, .. }),
        "{error}"
    );
    let error = lose(2, Fault::Twice(3)).await;
    assert!(
        matches!(error, ShardError::OutOfOrder { rank: 1, .. }),
        "{error}"
    );
}

#[tokio::test(start_paused = true)]
async fn results_that_make_no_sense_lose_the_group() {
    let error = lose(1, Fault::Garbage(3)).await;
    assert!(
        matches!(error, ShardError::Malformed { rank: 0, .. }),
        "{error}"
    );
    let error = lose(1, Fault::Rows(3)).await;
    assert!(matches!(error, ShardError::Contradiction(_)), "{error}");
}

#[tokio::test(start_paused = true)]
async fn an_idle_group_that_dies_is_noticed() {
    let mut group = Fake::paced(1);
    group[0].fault = Fault::EndAfter(2);
    let engine = Engine::ready(group).await;
    read(&mut engine.stream(4, 3).await).await;
    engine
        .wait_for(|state| matches!(state, EngineState::Down { .. }))
        .await;
}

/// What bringing this group up ends with.
async fn refuse(config: crate::EngineConfig, group: Vec<Fake>) -> String {
    let (handle, task) = start_with(config, dial(group));
    let error = task
        .await
        .expect("the driver does not panic")
        .expect_err("it is refused");
    let EngineState::Down { reason } = handle.state() else {
        panic!("the engine is down")
    };
    assert_eq!(error.to_string(), *reason);
    error.to_string()
}

#[tokio::test(start_paused = true)]
async fn a_group_that_does_not_fit_together_is_refused_with_the_numbers() {
    let mut group = Fake::group(2);
    group[1].describe.vocab_size = 999;
    let message = refuse(config(2), group).await;
    assert_eq!(
        message,
        "rank 1 disagrees with rank 0 about the vocabulary: 999 instead of 1000"
    );

    let mut group = Fake::group(2);
    group[1].blocks = 17;
    let message = refuse(config(2), group).await;
    assert_eq!(
        message,
        "rank 1 disagrees with rank 0 about blocks of the pool: 17 instead of 1025"
    );

    let config = crate::EngineConfig {
        block_tokens: 5,
        ..config(1)
    };
    let message = refuse(config, Fake::group(1)).await;
    assert_eq!(
        message,
        "blocks of 5 tokens are not supported; supported are [4, 16]"
    );
}

#[tokio::test(start_paused = true)]
async fn a_group_that_is_not_ready_in_time_is_given_up() {
    let mut group = Fake::group(2);
    group[1].prepare_time = Duration::from_secs(3600);
    let message = refuse(config(2), group).await;
    assert_eq!(
        message,
        "the shards were not ready within 60s: preparing took too long"
    );
}
