//! What is noted of a traced sequence, and what its plans tell the shards.

use std::sync::Arc;

use headrace_core::plan::{StepPlan, row_flag};

use super::fake::{Fake, STEP};
use super::{Engine, config, read};
use crate::{Attached, EngineConfig, FinishReason, SeqTrace, SpanOf, WaitReason};

const TRACE: [u8; 16] = [3; 16];

/// The spans that a plan's rows name, and whether they say that they are sampled.
fn named(plan: &StepPlan) -> Vec<(u64, u8)> {
    let contexts = plan.trace_context.iter();
    let named = contexts.map(|context| {
        assert_eq!(context[..16], TRACE);
        let span = context[16..24].try_into().expect("eight bytes");
        (u64::from_be_bytes(span), context[24])
    });
    named.collect()
}

#[tokio::test(start_paused = true)]
async fn every_row_of_a_sampled_sequence_names_its_span() {
    let group = Fake::paced(1);
    let seen = Arc::clone(&group[0].seen);
    let engine = Engine::ready(group).await;
    let trace = Arc::new(SeqTrace::new(TRACE, true, 5));
    let request = engine.request(300, 4);
    let submitted = engine.handle.submit_with(
        request,
        Attached {
            trace: Some(Arc::clone(&trace)),
            ..Attached::default()
        },
    );
    let mut stream = submitted.await.expect("there is room");
    let (tokens, _) = read(&mut stream).await;

    let plans = seen.plans();
    let spans: Vec<_> = plans.iter().flat_map(named).collect();
    // Three chunks of 128 tokens at most, then three tokens more; a fourth row may be one too many.
    let chunks = (0..3).map(|index| (trace.span_id(SpanOf::Chunk(index)), 1));
    let decode = (trace.span_id(SpanOf::Decode), 1);
    assert_eq!(spans[..3], chunks.collect::<Vec<_>>());
    assert!(spans[3..].iter().all(|span| *span == decode), "{spans:?}");

    let notes = trace.notes();
    let started = notes.started.expect("it started");
    assert_eq!((started.waited_for, started.cached), (None, 0));
    let told: Vec<_> = notes
        .chunks
        .iter()
        .map(|c| (c.step, c.start, c.tokens))
        .collect();
    assert_eq!(told, [(0, 0, 128), (1, 128, 128), (2, 256, 44)]);
    let chunk = notes.chunks[0];
    assert_eq!(chunk.done.expect("it is done") - chunk.planned, STEP);
    let decode = notes.decode.expect("it decoded");
    assert_eq!(decode.steps as usize, spans.len() - 3);
    assert_eq!(notes.tokens as usize, tokens.len());
    let (ended, reason) = notes.finished.expect("it ended");
    assert_eq!(reason, FinishReason::Length);
    assert_eq!(ended - notes.first_token.expect("there was one"), 3 * STEP);
}

#[tokio::test(start_paused = true)]
async fn who_is_not_sampled_is_noted_and_tells_the_shards_nothing() {
    let group = Fake::paced(1);
    let seen = Arc::clone(&group[0].seen);
    let engine = Engine::ready(group).await;
    let trace = Arc::new(SeqTrace::new(TRACE, false, 5));
    let request = engine.request(9, 3);
    let submitted = engine.handle.submit_with(
        request,
        Attached {
            trace: Some(Arc::clone(&trace)),
            ..Attached::default()
        },
    );
    let mut stream = submitted.await.expect("there is room");
    let mut other = engine.stream(9, 3).await;
    read(&mut stream).await;
    read(&mut other).await;
    assert!(seen.plans().iter().all(|plan| plan.trace_row.is_empty()));
    assert_eq!(trace.notes().chunks.len(), 1);
    assert_eq!(trace.notes().tokens, 3);
}

#[tokio::test(start_paused = true)]
async fn what_a_sequence_waited_for_is_noted() {
    let limits = EngineConfig {
        running_max: 1,
        ..config(1)
    };
    let engine = Engine::ready_with(limits, Fake::paced(1)).await;
    let mut first = engine.stream(9, 8).await;
    first.next().await;
    let trace = Arc::new(SeqTrace::new(TRACE, true, 5));
    let request = engine.request(9, 2);
    let submitted = engine.handle.submit_with(
        request,
        Attached {
            trace: Some(Arc::clone(&trace)),
            ..Attached::default()
        },
    );
    let mut second = submitted.await.expect("there is room");
    read(&mut first).await;
    read(&mut second).await;
    let started = trace.notes().started.expect("it started");
    assert_eq!(started.waited_for, Some(WaitReason::Slots));
    assert!(started.at - trace.notes().submitted >= STEP);
}

#[tokio::test(start_paused = true)]
async fn a_preempted_sequence_notes_when_it_went_back() {
    let mut group = Fake::paced(1);
    // Room for two prompts and little more.
    group[0].blocks = 1 + 24;
    let seen = Arc::clone(&group[0].seen);
    let limits = EngineConfig {
        prefix_caching: false,
        ..config(1)
    };
    let engine = Engine::ready_with(limits, group).await;
    let trace = Arc::new(SeqTrace::new(TRACE, true, 5));
    let mut first = engine.stream(24, 60).await;
    let request = engine.request(24, 60);
    let submitted = engine.handle.submit_with(
        request,
        Attached {
            trace: Some(Arc::clone(&trace)),
            ..Attached::default()
        },
    );
    let mut second = submitted.await.expect("there is room");
    read(&mut first).await;
    read(&mut second).await;
    let notes = trace.notes();
    assert_eq!(notes.sent_back.len(), 1);
    assert_eq!(notes.tokens, 60);
    // What it knew is computed again, in chunks behind the first.
    assert!(notes.chunks.len() > 1 && notes.chunks[1].planned > notes.sent_back[0]);
    let plans = seen.plans();
    let rows = plans.iter().flat_map(|plan| {
        let flags = plan.trace_row.iter().map(|row| usize::try_from(*row));
        flags.map(|row| plan.row_flags[row.expect("a row")] & row_flag::FROM_SLOT == 0)
    });
    assert_eq!(
        rows.filter(|is_chunk| *is_chunk).count(),
        notes.chunks.len()
    );
}
