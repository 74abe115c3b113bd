//! What callers see of shards that behave.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use headrace_core::ids::TokenId;
use headrace_core::plan::StepPlan;
use tokio::time::{Instant, sleep, timeout};

use super::fake::{BLOCK_TOKENS, Fake, STEP};
use super::{Engine, config, expected, read};
use crate::handle::{EngineState, start, start_with};
use crate::sink::TokenEvent;
use crate::{Attached, FinishReason, SubmitError};

#[tokio::test(start_paused = true)]
async fn many_requests_stream_their_own_tokens() {
    for depth in 1..=3 {
        for ranks in [1, 2] {
            let config = crate::EngineConfig {
                depth,
                ..config(ranks)
            };
            let group = Fake::group(u32::try_from(ranks).expect("few"));
            let seen: Vec<_> = group.iter().map(|fake| Arc::clone(&fake.seen)).collect();
            let engine = Engine::ready_with(config, group).await;
            let mut streams = Vec::new();
            for n in 0..48 {
                streams.push((5 + n, 1 + n % 7, engine.stream(5 + n, 1 + n % 7).await));
            }
            for (prompt, tokens_max, stream) in &mut streams {
                let tokens = expected(*prompt, *tokens_max);
                assert_eq!(read(stream).await, (tokens, FinishReason::Length));
            }
            assert_eq!(
                seen[0].plans(),
                seen[ranks - 1].plans(),
                "every rank gets the same plans"
            );
            assert!(seen[0].prepared.load(Ordering::Relaxed));
            assert_eq!(engine.metric("tgi_batch_current_size"), 0);
            assert_eq!(engine.metric("tgi_batch_current_max_tokens"), 0);
        }
    }
}

#[tokio::test(start_paused = true)]
async fn events_begin_with_the_cached_tokens_and_end_with_the_reason() {
    let engine = Engine::ready(Fake::group(1)).await;
    read(&mut engine.stream(9, 2).await).await;
    let mut stream = engine.stream(9, 2).await;
    let mut events = Vec::new();
    while let Some(more) = Some(stream.next().await).filter(|events| !events.is_empty()) {
        events.extend(more);
    }
    assert_eq!(
        events[0],
        TokenEvent::Started {
            cached_tokens: 2 * BLOCK_TOKENS
        }
    );
    assert!(matches!(events[1], TokenEvent::Token(_)));
    assert_eq!(events[3..], [TokenEvent::Finished(FinishReason::Length)]);
}

#[tokio::test(start_paused = true)]
async fn a_sequence_is_said_to_start_when_its_first_step_is_sent_not_when_it_is_done() {
    let engine = Engine::ready(Fake::paced(1)).await;
    let submitted = Instant::now();
    let mut stream = engine.stream(9, 2).await;
    let started = TokenEvent::Started { cached_tokens: 0 };
    assert_eq!(stream.next().await, [started]);
    assert_eq!(submitted.elapsed(), Duration::ZERO);
    read(&mut stream).await;
    assert_eq!(submitted.elapsed() / 2, STEP);
}

#[tokio::test(start_paused = true)]
async fn prompt_logprobs_of_all_chunks_come_in_order() {
    let engine = Engine::ready(Fake::group(1)).await;
    let facts = engine.handle.facts().expect("ready");
    let spec = crate::RequestSpec {
        prompt: (0..300).map(TokenId).collect(),
        sampling: crate::Sampling::default(),
        ending: vec![],
        tokens_max: Some(crate::Tokens(2)),
        prompt_logprobs: true,
        masked: false,
        trace: None,
    };
    let request = crate::Request::new(spec, &facts.limits).expect("it fits");
    let mut stream = engine.handle.submit(request).await.expect("there is room");
    let mut logprobs = Vec::new();
    while let Some(events) = Some(stream.next().await).filter(|events| !events.is_empty()) {
        for event in events {
            if let TokenEvent::PromptLogprobs(more) = event {
                logprobs.extend(more);
            }
        }
    }
    assert_eq!(logprobs.len(), 300);
    assert!(
        logprobs[1..].is_sorted_by(|a, b| a.logprob > b.logprob),
        "in the order of the prompt"
    );
    let best: Vec<u32> = logprobs.iter().map(|token| token.best.0).collect();
    assert_eq!(best, (0..300).collect::<Vec<_>>());
}

#[tokio::test(start_paused = true)]
async fn a_dropped_stream_frees_its_blocks_within_a_step() {
    let group = Fake::paced(1);
    let seen = Arc::clone(&group[0].seen);
    let engine = Engine::ready_with(
        crate::EngineConfig {
            prefix_caching: false,
            ..config(1)
        },
        group,
    )
    .await;
    let free = engine.metric("headrace_kv_blocks");
    let mut other = engine.stream(4, 3000).await;
    let mut stream = engine.stream(40, 3000).await;
    let cancelled = loop {
        let events = stream.next().await;
        if events
            .iter()
            .any(|event| matches!(event, TokenEvent::Token(_)))
        {
            break seen.plans().len();
        }
    };
    let held = engine.metric("headrace_kv_blocks_free");
    assert!(held <= free - 11, "{held} of {free} blocks are free");
    drop(stream);
    sleep(STEP * 4).await;
    let plans = seen.plans();
    // Two plans may have been on their way; the next one releases the slot.
    let after: &[StepPlan] = &plans[cancelled + 2..];
    assert!(
        plans[cancelled..]
            .iter()
            .any(|plan| plan.release_slot == [1]),
        "the shard is told"
    );
    assert!(
        after.iter().all(|plan| plan.row_slot == [0]),
        "only the other one still runs"
    );
    assert!(engine.metric("headrace_kv_blocks_free") >= free - 4);
    assert!(!other.next().await.is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_submission_given_up_while_it_waits_leaves_nothing_behind() {
    let engine = Engine::ready(Fake::paced(1)).await;
    for _ in 0..50 {
        // Polled once: the command is on its way, the answer is not there.
        let submission = engine.submit(8, 100);
        drop(timeout(Duration::ZERO, submission).await);
    }
    sleep(STEP * 5).await;
    assert_eq!(engine.metric("tgi_batch_current_size"), 0);
    assert_eq!(engine.metric("tgi_queue_size"), 0);
}

#[tokio::test(start_paused = true)]
async fn a_sequence_ends_at_its_deadline_whether_it_waits_or_runs() {
    let config = crate::EngineConfig {
        running_max: 1,
        prefix_caching: false,
        ..config(1)
    };
    let engine = Engine::ready_with(config, Fake::paced(1)).await;
    let free = engine.metric("headrace_kv_blocks_free");
    let begun = Instant::now();
    let mut streams = Vec::new();
    // The first runs; the others wait for its slot, and the last one gets it.
    for steps in [Some(20), Some(7), None] {
        let deadline = steps.map(|steps| begun + STEP * steps);
        let request = engine.request(8, if steps.is_some() { 3000 } else { 3 });
        let stream = engine
            .handle
            .submit_with(
                request,
                Attached {
                    deadline,
                    ..Attached::default()
                },
            )
            .await;
        streams.push(stream.expect("there is room"));
    }
    assert_eq!(
        read(&mut streams[1]).await,
        (vec![], FinishReason::Deadline)
    );
    assert_eq!(begun.elapsed(), STEP * 7);
    let (tokens, reason) = read(&mut streams[0]).await;
    assert_eq!(reason, FinishReason::Deadline);
    assert_eq!(begun.elapsed(), STEP * 20);
    assert_eq!(
        tokens,
        expected(8, u32::try_from(tokens.len()).expect("few"))
    );
    assert!(tokens.len() > 10, "{tokens:?}");
    assert_eq!(
        read(&mut streams[2]).await,
        (expected(8, 3), FinishReason::Length)
    );
    sleep(STEP * 4).await;
    assert_eq!(engine.metric("headrace_kv_blocks_free"), free);
    assert_eq!(engine.metric("tgi_batch_current_max_tokens"), 0);
    assert_eq!(
        engine.deadlines_passed(),
        [("running".into(), 1), ("waiting".into(), 1)]
    );
}

#[tokio::test(start_paused = true)]
async fn a_sequence_that_ends_before_its_deadline_is_forgotten_with_it() {
    let engine = Engine::ready(Fake::paced(1)).await;
    let request = engine.request(8, 3);
    let deadline = Some(Instant::now() + STEP * 50);
    let stream = engine
        .handle
        .submit_with(
            request,
            Attached {
                deadline,
                ..Attached::default()
            },
        )
        .await;
    let mut stream = stream.expect("there is room");
    assert_eq!(
        read(&mut stream).await,
        (expected(8, 3), FinishReason::Length)
    );
    sleep(STEP * 100).await;
    assert_eq!(
        engine.deadlines_passed(),
        [("running".into(), 0), ("waiting".into(), 0)]
    );
}

#[tokio::test(start_paused = true)]
async fn a_stop_string_ends_the_sequence_but_not_the_stream_before_its_time() {
    let engine = Engine::ready(Fake::paced(1)).await;
    let mut stream = engine.stream(4, 3000).await;
    stream.next().await;
    stream.finish(FinishReason::StopText);
    stream.finish(FinishReason::Cancelled);
    let (tokens, reason) = read(&mut stream).await;
    assert_eq!(reason, FinishReason::StopText);
    assert!(tokens.len() < 10);
}

#[tokio::test(start_paused = true)]
async fn a_full_queue_refuses_with_its_numbers() {
    let config = crate::EngineConfig {
        running_max: 1,
        queue_max: 2,
        ..config(1)
    };
    let engine = Engine::ready_with(config, Fake::paced(1)).await;
    let running = engine.stream(4, 1000).await;
    sleep(STEP * 3).await;
    let waiting = [engine.stream(4, 10).await, engine.stream(4, 10).await];
    let refused = engine.submit(4, 10).await.err();
    assert_eq!(
        refused,
        Some(SubmitError::QueueFull {
            waiting: 2,
            queue_max: 2
        })
    );
    assert_eq!(engine.metric("tgi_queue_size"), 2);
    drop(running);
    for mut stream in waiting {
        assert_eq!(
            read(&mut stream).await,
            (expected(4, 10), FinishReason::Length)
        );
    }
}

#[tokio::test(start_paused = true)]
async fn a_reader_that_does_not_read_stalls_nobody_and_loses_nothing() {
    let engine = Engine::ready(Fake::paced(1)).await;
    let mut slow = engine.stream(6, 200).await;
    let mut quick = engine.stream(7, 200).await;
    let started = Instant::now();
    assert_eq!(
        read(&mut quick).await,
        (expected(7, 200), FinishReason::Length)
    );
    assert!(started.elapsed() < STEP * 210, "one token a step");
    let events = slow.next().await;
    assert_eq!(events.len(), 202, "everything waits, in one piece");
    assert_eq!(
        events.last(),
        Some(&TokenEvent::Finished(FinishReason::Length))
    );
}

#[tokio::test(start_paused = true)]
async fn a_drain_lets_streams_end_and_refuses_new_ones() {
    let engine = Engine::ready(Fake::paced(2)).await;
    let mut stream = engine.stream(4, 50).await;
    let drain = {
        let handle = engine.handle.clone();
        tokio::spawn(async move { handle.drain(Duration::from_secs(60)).await })
    };
    engine
        .wait_for(|state| *state == EngineState::Draining)
        .await;
    assert_eq!(engine.submit(4, 1).await.err(), Some(SubmitError::Draining));
    assert_eq!(
        read(&mut stream).await,
        (expected(4, 50), FinishReason::Length)
    );
    drain.await.expect("the drain ends");
    assert!(matches!(engine.handle.state(), EngineState::Down { .. }));
    assert!(matches!(
        engine.submit(4, 1).await,
        Err(SubmitError::Down { .. })
    ));
    assert!(matches!(engine.task.await, Ok(Ok(()))));
}

#[tokio::test(start_paused = true)]
async fn a_drain_cuts_what_does_not_end_in_time() {
    let engine = Engine::ready(Fake::paced(1)).await;
    let mut stream = engine.stream(4, 3000).await;
    let started = Instant::now();
    engine.handle.drain(STEP * 20).await;
    assert!(started.elapsed() < STEP * 24);
    assert_eq!(read(&mut stream).await.1, FinishReason::Cancelled);
    assert!(matches!(engine.task.await, Ok(Ok(()))));
}

#[tokio::test(start_paused = true)]
async fn an_engine_without_handles_ends_after_its_streams() {
    let Engine { handle, task, .. } = Engine::ready(Fake::paced(1)).await;
    let facts = handle.facts().expect("ready");
    let spec = crate::RequestSpec {
        prompt: vec![TokenId(1)],
        sampling: crate::Sampling::default(),
        ending: vec![],
        tokens_max: Some(crate::Tokens(5)),
        prompt_logprobs: false,
        masked: false,
        trace: None,
    };
    let request = crate::Request::new(spec, &facts.limits).expect("it fits");
    let mut stream = handle.submit(request).await.expect("there is room");
    drop(handle);
    assert_eq!(
        read(&mut stream).await,
        (expected(1, 5), FinishReason::Length)
    );
    assert!(matches!(task.await, Ok(Ok(()))));
}

#[tokio::test(start_paused = true)]
async fn requests_are_refused_while_the_shards_load() {
    let mut group = Fake::group(1);
    group[0].prepare_time = Duration::from_secs(5);
    let (handle, task) = start_with(config(1), super::dial(group));
    assert_eq!(handle.state(), EngineState::Loading);
    assert_eq!(handle.facts(), None);
    let mut watch = handle.watch();
    let ready = watch
        .wait_for(|state| matches!(state, EngineState::Ready(_)))
        .await;
    drop(ready.expect("it loads"));
    let facts = handle.facts().expect("it is ready");
    assert_eq!(facts.limits.blocks.0, 1025);
    assert_eq!(facts.limits.watermark.0, 52);
    assert_eq!(facts.limits.slots, 32);
    assert_eq!(facts.describe.architecture, "FakeForCausalLM");
    drop(handle);
    assert!(matches!(task.await, Ok(Ok(()))));
}

#[tokio::test(start_paused = true)]
async fn a_drain_while_loading_ends_at_once() {
    let mut group = Fake::group(1);
    group[0].prepare_time = Duration::from_secs(50);
    let (handle, task) = start_with(config(1), super::dial(group));
    sleep(Duration::from_secs(1)).await;
    handle.drain(Duration::from_secs(60)).await;
    assert!(matches!(task.await, Ok(Ok(()))));
}

#[tokio::test]
async fn a_shard_on_a_unix_socket_may_start_late() {
    let folder = std::env::temp_dir().join(format!("headrace-engine-{}", std::process::id()));
    std::fs::create_dir_all(&folder).expect("the temporary folder is writable");
    let socket = folder.join("late.sock");
    let config = crate::EngineConfig {
        sockets: vec![socket.clone()],
        ..config(1)
    };
    let (handle, task) = start(config);
    tokio::task::yield_now().await;
    assert_eq!(handle.state(), EngineState::Loading);

    let listener = tokio::net::UnixListener::bind(&socket).expect("the socket is new");
    let incoming = tokio_stream::wrappers::UnixListenerStream::new(listener);
    let fake = Fake::group(1).remove(0);
    let server = tokio::spawn(
        tonic::transport::Server::builder()
            .serve_with_incoming(headrace_wire::ShardServer::new(fake), incoming),
    );
    let metrics = prometheus::Registry::new();
    let engine = Engine {
        handle,
        task,
        metrics,
    };
    engine
        .wait_for(|state| matches!(state, EngineState::Ready(_)))
        .await;
    assert_eq!(
        read(&mut engine.stream(3, 20).await).await.0,
        expected(3, 20)
    );
    engine.handle.drain(Duration::from_secs(1)).await;
    server.abort();
    std::fs::remove_dir_all(&folder).expect("it is ours");
}
