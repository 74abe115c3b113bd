//! Steps keep to the target of the gaps between tokens, on shards whose prompts take time.

use std::sync::Arc;
use std::time::Duration;

use headrace_core::plan::{StepPlan, row_flag};
use tokio::time::Instant;

use super::fake::Fake;
use super::{Engine, config, expected, read};
use crate::FinishReason;
use crate::config::EngineConfig;
use crate::sink::TokenEvent;

const STEP: Duration = Duration::from_millis(2);
const TOKEN: Duration = Duration::from_micros(100);
const TARGET: Duration = Duration::from_millis(50);
/// What fits into the target beside one decoding row.
const FITS: usize = 480;
const PROMPT: u32 = 3000;

fn wide(target: Option<Duration>) -> EngineConfig {
    EngineConfig {
        step_tokens_max: 4096,
        prefill_tokens_max: 4096,
        itl_target: target,
        prefix_caching: false,
        ..config(1)
    }
}

/// One stream runs, and another with a long prompt joins it; then a third of the same kind. Gives
/// the prompt tokens of the steps in which somebody decoded, and the longest gap of the first
/// stream while the third joined.
async fn joined(config: EngineConfig) -> (Vec<usize>, Duration) {
    let mut group = Fake::group(1);
    group[0].describe.vocab_size = 2 * PROMPT;
    group[0].step_time = STEP;
    group[0].token_time = TOKEN;
    let seen = Arc::clone(&group[0].seen);
    let engine = Arc::new(Engine::ready_with(config, group).await);
    let mut first = engine.stream(40, 1000).await;
    while !matches!(first.next().await.last(), Some(TokenEvent::Token(_))) {}

    let mut second = engine.stream(PROMPT, 2).await;
    let tokens = expected(PROMPT, 2);
    assert_eq!(read(&mut second).await, (tokens, FinishReason::Length));
    // What came meanwhile comes in one piece, and is not looked at.
    first.next().await;

    let mut third = engine.stream(PROMPT + 7, 2).await;
    let third = tokio::spawn(async move { read(&mut third).await });
    let (mut last, mut longest) = (Instant::now(), Duration::ZERO);
    while !third.is_finished() {
        first.next().await;
        longest = longest.max(last.elapsed());
        last = Instant::now();
    }
    let (tokens, _) = third.await.expect("it is read");
    assert_eq!(tokens, expected(PROMPT + 7, 2));
    drop(first);

    let mixed = |plan: &StepPlan| {
        let decodes = plan
            .row_flags
            .iter()
            .any(|flags| flags & row_flag::FROM_SLOT != 0);
        (decodes && !plan.token_id.is_empty()).then_some(plan.token_id.len())
    };
    let chunks: Vec<usize> = seen.plans().iter().filter_map(mixed).collect();
    let (steps, sum) = engine.histogram("headrace_mixed_step_prompt_tokens");
    assert_eq!(steps, chunks.len() as u64);
    assert_eq!(format!("{sum}"), chunks.iter().sum::<usize>().to_string());
    (chunks, longest)
}

#[tokio::test(start_paused = true)]
async fn chunks_become_as_large_as_the_target_allows() {
    let config = wide(Some(TARGET));
    let (chunks, longest) = joined(config).await;
    assert!(chunks.iter().all(|&chunk| chunk <= 512), "{chunks:?}");
    // The second prompt's steps taught it; the third's use what there is.
    let taught = &chunks[chunks.len() / 2 + 1..chunks.len() - 1];
    let wanted = FITS * 3 / 4..=FITS;
    assert!(
        taught.iter().all(|chunk| wanted.contains(chunk)),
        "{chunks:?}"
    );
    assert!(longest <= TARGET, "{longest:?}");
    assert!(longest >= TARGET * 3 / 4, "{longest:?}");
}

#[tokio::test(start_paused = true)]
async fn the_limit_of_prompt_tokens_stays_an_upper_bound() {
    let config = EngineConfig {
        prefill_tokens_max: 200,
        ..wide(Some(TARGET))
    };
    let (chunks, _) = joined(config).await;
    assert!(chunks.iter().all(|&chunk| chunk <= 200), "{chunks:?}");
    assert!(chunks.len() >= 2 * 3000 / 200);
}

#[tokio::test(start_paused = true)]
async fn prompts_go_on_although_the_target_cannot_be_met() {
    let config = wide(Some(Duration::from_millis(1)));
    let (chunks, _) = joined(config).await;
    let after_the_first = &chunks[4..];
    let least = |&chunk: &usize| chunk <= 136;
    assert!(after_the_first.iter().all(least), "{chunks:?}");
    assert!(chunks.len() <= 2 * 3000 / 120, "{chunks:?}");
}

#[tokio::test(start_paused = true)]
async fn without_a_target_a_prompt_is_one_step() {
    let config = wide(None);
    let (chunks, longest) = joined(config).await;
    assert_eq!(chunks, [3000, 3007]);
    assert!(longest > TARGET * 5);
}
