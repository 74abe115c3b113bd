//! `plan` and `commit` at 256 decoding rows, with and without a long queue, and prompts.
//!
//! Budgets: `plan` 200 µs, `commit` 100 µs. Results are made up here: only the scheduler is timed.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::hint::black_box;
use std::time::{Duration, Instant};

use criterion::{Criterion, criterion_group, criterion_main};
use headrace_core::Scheduler;
use headrace_core::event::SeqEvent;
use headrace_core::ids::{BlockSize, Blocks, TokenId, Tokens};
use headrace_core::limits::Limits;
use headrace_core::plan::{StepPlan, StepResult, row_flag};
use headrace_core::request::{Request, RequestSpec, Sampling};

const ROWS: u32 = 256;
const PROMPT: u32 = 512;
/// Decode steps of one world, then it is built anew.
const STEPS: u64 = 400;

fn limits() -> Limits {
    Limits {
        block_size: BlockSize::new(16).unwrap(),
        blocks: Blocks(32_768),
        slots: 2 * ROWS,
        state_slots: 2 * ROWS,
        running_max: ROWS,
        step_tokens_max: Tokens(8192),
        prefill_tokens_max: Tokens(8192),
        prompt_logprob_tokens_max: Tokens(512),
        context_tokens_max: Tokens(131_072),
        vocab_size: 128_000,
        queue_max: 20_000,
        depth: 2,
        watermark: Limits::default_watermark(Blocks(32_768)),
        share_within_step: true,
        prefix_caching: true,
    }
}

/// A prompt of its own, behind a system prompt that all have.
fn admit(scheduler: &mut Scheduler, salt: u32, length: u32) {
    let own = |i: u32| salt.wrapping_mul(2_654_435_761).wrapping_add(i * 40_503) % 128_000;
    let token = |i: u32| TokenId(if i < 64 { i } else { own(i) });
    let spec = RequestSpec {
        prompt: (0..length).map(token).collect(),
        sampling: Sampling::default(),
        ending: vec![TokenId(127_999)],
        tokens_max: Some(Tokens(2000)),
        prompt_logprobs: false,
        masked: false,
        trace: None,
    };
    scheduler
        .admit(Request::new(spec, &limits()).unwrap())
        .unwrap();
}

fn answer(plan: &StepPlan) -> StepResult {
    let sampled = |(_, flags): &(i32, &i32)| **flags & row_flag::SAMPLE != 0;
    let rows = (0..).zip(&plan.row_flags).filter(sampled);
    let row_index: Vec<i32> = rows.map(|(row, _)| row).collect();
    let rows = row_index.len();
    let step = i32::try_from(plan.step.0 % 100_000).unwrap();
    let token = |row: &i32| (row * 31 + step * 7) % 100_000;
    StepResult {
        step: plan.step,
        token_id: row_index.iter().map(token).collect(),
        row_index,
        row_flags: vec![0; rows],
        logprob: vec![-1.0; rows],
        top_count: vec![0; rows],
        ..StepResult::default()
    }
}

/// All 256 sequences decode, one plan in flight.
fn decoding(waiting: u32) -> (Scheduler, StepResult) {
    let mut scheduler = Scheduler::new(limits());
    for i in 0..ROWS + waiting {
        admit(&mut scheduler, i, PROMPT);
    }
    let mut events = Vec::new();
    loop {
        let plan = scheduler.plan().unwrap();
        let result = answer(&plan);
        if plan.rows() == ROWS as usize && plan.token_id.is_empty() {
            return (scheduler, result);
        }
        scheduler.commit(&result, &mut events).unwrap();
    }
}

/// Times one of the two calls of a decode step, with two plans in flight.
fn decode(iterations: u64, waiting: u32, plan_timed: bool) -> Duration {
    let mut spent = Duration::ZERO;
    let mut events: Vec<SeqEvent> = Vec::new();
    let (mut scheduler, mut oldest) = decoding(waiting);
    for i in 0..iterations {
        if i % STEPS == STEPS - 1 {
            (scheduler, oldest) = decoding(waiting);
        }
        let begun = Instant::now();
        let plan = scheduler.plan().unwrap();
        let planned = begun.elapsed();
        assert_eq!(plan.rows(), ROWS as usize);
        let next = answer(&plan);
        scheduler.recycle(plan);
        events.clear();
        let begun = Instant::now();
        scheduler.commit(&oldest, &mut events).unwrap();
        spent += if plan_timed { planned } else { begun.elapsed() };
        black_box(&events);
        oldest = next;
    }
    spent
}

/// Times the plan that admits prompts of `length` tokens in all, new or cached.
fn prompts(iterations: u64, count: u32, length: u32, cached: bool) -> Duration {
    let mut spent = Duration::ZERO;
    for _ in 0..iterations {
        let mut scheduler = Scheduler::new(limits());
        if cached {
            for i in 0..count {
                admit(&mut scheduler, i, length);
            }
            let plan = scheduler.plan().unwrap();
            scheduler.commit(&answer(&plan), &mut Vec::new()).unwrap();
        }
        for i in 0..count {
            admit(&mut scheduler, i, length);
        }
        let begun = Instant::now();
        let plan = scheduler.plan().unwrap();
        spent += begun.elapsed();
        assert!(plan.rows() >= count as usize);
    }
    spent
}

/// Times plans in a pool that is too small for its 256 sequences: some of them preempt.
fn crowded(iterations: u64) -> Duration {
    let limits = Limits {
        blocks: Blocks(8_000),
        watermark: Blocks(0),
        ..limits()
    };
    let mut spent = Duration::ZERO;
    let mut events = Vec::new();
    let mut scheduler = Scheduler::new(limits.clone());
    let mut preempted = false;
    for i in 0..iterations {
        if i % STEPS == 0 {
            scheduler = Scheduler::new(limits.clone());
            (0..ROWS).for_each(|salt| admit(&mut scheduler, salt, PROMPT));
        }
        let begun = Instant::now();
        let plan = scheduler.plan().unwrap();
        spent += begun.elapsed();
        scheduler.commit(&answer(&plan), &mut events).unwrap();
        scheduler.recycle(plan);
        events.clear();
        preempted |= scheduler.stats().preemptions > 0;
    }
    assert!(preempted || iterations < STEPS, "nothing was preempted");
    spent
}

fn benches(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("scheduler");
    group
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(2));
    group.sample_size(20);
    group.bench_function("plan, 256 rows", |b| b.iter_custom(|n| decode(n, 0, true)));
    group.bench_function("commit, 256 rows", |b| {
        b.iter_custom(|n| decode(n, 0, false));
    });
    group.bench_function("plan, 256 rows, 10k waiting", |b| {
        b.iter_custom(|n| decode(n, 10_000, true));
    });
    group.bench_function("plan, 16 new prompts of 512", |b| {
        b.iter_custom(|n| prompts(n, 16, 512, false));
    });
    group.bench_function("plan, 16 cached prompts of 512", |b| {
        b.iter_custom(|n| prompts(n, 16, 512, true));
    });
    group.bench_function("plan, a cached prompt of 8192", |b| {
        b.iter_custom(|n| prompts(n, 1, 8192, true));
    });
    group.bench_function("plan, 256 sequences in too small a pool", |b| {
        b.iter_custom(crowded);
    });
    group.finish();
}

criterion_group!(all, benches);
criterion_main!(all);
