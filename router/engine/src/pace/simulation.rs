//! The real scheduler and the real pacer before a made-up H200: a closed loop of clients, 512 tokens
//! in and 256 out. What the target costs and gains is read off here, and the defaults rest on it.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use headrace_core::event::SeqEvent;
use headrace_core::ids::{BlockSize, Blocks, SeqId, TokenId, Tokens};
use headrace_core::limits::Limits;
use headrace_core::plan::{StepPlan, StepResult, row_flag};
use headrace_core::request::{Request, RequestSpec, Sampling};
use headrace_core::scheduler::Scheduler;

use super::{Pacer, StepShape};

const PROMPT: u32 = 512;
const ANSWER: u32 = 256;
const VOCAB: u32 = 1_000_000;
/// From a result to the request that its client sends next, in microseconds.
const ROUND_TRIP: f64 = 3_000.0;
/// Over which the first requests arrive.
const RAMP: f64 = 40_000.0;

/// Tokens of a step and the milliseconds of its matrix products, Llama-3.1-8B in bf16 on an H200.
const PRODUCTS: [(f64, f64); 9] = [
    (1.0, 4.07),
    (8.0, 4.10),
    (32.0, 4.24),
    (64.0, 4.36),
    (128.0, 4.82),
    (256.0, 7.12),
    (512.0, 11.6),
    (2048.0, 42.7),
    (8192.0, 169.0),
];

/// Microseconds of a step: products, keys and values read at the memory's speed, the attention of
/// prompts, and something for everything else. Up to 2 % of it is noise.
fn step_us(shape: &StepShape, noise: f64) -> f64 {
    let tokens = f64::from(shape.decode_rows + shape.prompt_tokens);
    let at = PRODUCTS.partition_point(|&(n, _)| n < tokens).clamp(1, 8);
    let ((a, from), (b, to)) = (PRODUCTS[at - 1], PRODUCTS[at]);
    let products = from + (to - from) * (tokens - a) / (b - a);
    let reads = shape.decode_context as f64 * 131_072.0 / 4.19e9;
    let pairs = shape.prompt_pairs as f64 * 1e-6;
    1000.0 * (0.8 + products + reads + pairs) * (1.0 + 0.02 * noise)
}

/// What the clients saw; times are milliseconds.
#[derive(Debug)]
struct Seen {
    tokens_per_s: f64,
    ttft_p50: f64,
    ttft_p99: f64,
    itl_p50: f64,
    itl_p99: f64,
    itl_max: f64,
    steps: u32,
}

struct Simulation {
    scheduler: Scheduler,
    pacer: Pacer,
    /// When requests arrive, in order.
    arrivals: VecDeque<f64>,
    /// Requests that may still be sent.
    unsent: u32,
    born: BTreeMap<SeqId, f64>,
    last: BTreeMap<SeqId, f64>,
    /// Results that are coming: when, how long after the one before, and what.
    coming: VecDeque<(f64, f64, StepResult)>,
    device_free: f64,
    ttft: Vec<f64>,
    gaps: Vec<f64>,
    ended: u32,
    state: u64,
}

// === impl Simulation ===

impl Simulation {
    fn new(clients: u32, requests: u32, target_ms: u64) -> Self {
        let limits = Limits {
            block_size: BlockSize::new(16).expect("not zero"),
            blocks: Blocks(40_000),
            slots: 1024,
            state_slots: 1,
            running_max: 512,
            step_tokens_max: Tokens(8192),
            prefill_tokens_max: Tokens(8192),
            prompt_logprob_tokens_max: Tokens(512),
            context_tokens_max: Tokens(131_072),
            vocab_size: VOCAB,
            queue_max: 4096,
            depth: 2,
            watermark: Limits::default_watermark(Blocks(40_000)),
            share_within_step: true,
            prefix_caching: false,
        };
        let target = (target_ms > 0).then(|| Duration::from_millis(target_ms));
        Self {
            scheduler: Scheduler::new(limits),
            pacer: Pacer::new(target),
            arrivals: (0..clients)
                .map(|i| RAMP * f64::from(i) / f64::from(clients))
                .collect(),
            unsent: requests - clients,
            born: BTreeMap::new(),
            last: BTreeMap::new(),
            coming: VecDeque::new(),
            device_free: 0.0,
            ttft: Vec::new(),
            gaps: Vec::new(),
            ended: 0,
            state: 0x9e37_79b9_7f4a_7c15,
        }
    }

    fn run(mut self, requests: u32) -> Seen {
        let (mut now, mut steps) = (0.0_f64, 0);
        while self.ended < requests {
            while self.arrivals.front().is_some_and(|&at| at <= now) {
                let at = self.arrivals.pop_front().expect("its front was just read");
                self.arrive(at);
            }
            let allowance = self.pacer.allowance(&self.scheduler);
            if let Some(plan) = self.scheduler.plan_within(&allowance) {
                self.execute(&plan, now);
                self.scheduler.recycle(plan);
                steps += 1;
                continue;
            }
            let result = self.coming.front().map_or(f64::INFINITY, |next| next.0);
            let arrival = self.arrivals.front().map_or(f64::INFINITY, |&at| at);
            now = now.max(result.min(arrival));
            if result <= now {
                self.commit(now);
            }
        }
        let whole_s = now / 1e6;
        self.ttft.sort_by(f64::total_cmp);
        self.gaps.sort_by(f64::total_cmp);
        let ms = |sorted: &[f64], per_mille: usize| {
            sorted[(sorted.len() - 1) * per_mille / 1000] / 1000.0
        };
        Seen {
            tokens_per_s: f64::from(requests * ANSWER) / whole_s,
            ttft_p50: ms(&self.ttft, 500),
            ttft_p99: ms(&self.ttft, 990),
            itl_p50: ms(&self.gaps, 500),
            itl_p99: ms(&self.gaps, 990),
            itl_max: ms(&self.gaps, 1000),
            steps,
        }
    }

    fn arrive(&mut self, at: f64) {
        let salt = u32::try_from(self.born.len()).expect("few requests") * 7;
        let spec = RequestSpec {
            prompt: (0..PROMPT).map(|i| TokenId((i + salt) % VOCAB)).collect(),
            sampling: Sampling::default(),
            ending: vec![],
            tokens_max: Some(Tokens(ANSWER)),
            prompt_logprobs: false,
            masked: false,
            trace: None,
        };
        let request = Request::new(spec, self.scheduler.limits()).expect("it fits");
        let seq = self.scheduler.admit(request).expect("there is room");
        self.born.insert(seq, at);
    }

    fn execute(&mut self, plan: &StepPlan, now: f64) {
        self.pacer.planned(plan);
        self.state ^= self.state << 13;
        self.state ^= self.state >> 7;
        self.state ^= self.state << 17;
        let noise = (self.state >> 40) as f64 / f64::from(1 << 23) - 1.0;
        let start = self.device_free.max(now);
        let took = step_us(&StepShape::of(plan), noise);
        self.device_free = start + took;
        let mut result = StepResult {
            step: plan.step,
            ..StepResult::default()
        };
        for (row, flags) in (0_i32..).zip(&plan.row_flags) {
            if flags & row_flag::SAMPLE != 0 {
                result.row_index.push(row);
                result.token_id.push(1);
                result.row_flags.push(0);
                result.logprob.push(0.0);
                result.top_count.push(0);
            }
        }
        self.coming.push_back((self.device_free, took, result));
    }

    fn commit(&mut self, now: f64) {
        let (_, took, result) = self.coming.pop_front().expect("a result is there");
        let mut events = Vec::new();
        let committed = self.scheduler.commit(&result, &mut events);
        committed.expect("it answers the plan");
        self.pacer.done(Duration::from_secs_f64(took / 1e6));
        for event in events {
            match event {
                SeqEvent::Token { seq, .. } => match self.last.insert(seq, now) {
                    Some(before) => self.gaps.push(now - before),
                    None => self.ttft.push(now - self.born[&seq]),
                },
                SeqEvent::Finished { .. } => {
                    self.ended += 1;
                    if self.unsent > 0 {
                        self.unsent -= 1;
                        self.arrivals.push_back(now + ROUND_TRIP);
                    }
                }
                SeqEvent::Started { .. } | SeqEvent::PromptLogprobs { .. } => {}
            }
        }
    }
}

#[expect(
    clippy::print_stdout,
    reason = "with --nocapture the figures of the log"
)]
fn simulate(clients: u32, target_ms: u64) -> Seen {
    let seen = Simulation::new(clients, 4 * clients, target_ms).run(4 * clients);
    println!("{clients} clients, target {target_ms} ms: {seen:.1?}");
    seen
}

#[test]
fn at_256_clients_the_default_target_is_kept_and_costs_little() {
    let (paced, free) = (simulate(256, 50), simulate(256, 0));
    assert!(paced.itl_p99 <= 50.0, "{paced:?}");
    assert!(paced.itl_max <= 210.0 && paced.itl_p50 < 15.0, "{paced:?}");
    assert!(paced.steps < 2 * free.steps, "{paced:?}");
    assert!(free.itl_p99 > 150.0, "{free:?}");
    assert!(paced.tokens_per_s >= 0.99 * free.tokens_per_s);
    assert!(paced.ttft_p99 <= 1.03 * free.ttft_p99, "{paced:?} {free:?}");
}

#[test]
fn at_64_clients_streams_get_their_tokens_within_15_ms() {
    let (paced, free) = (simulate(64, 15), simulate(64, 0));
    assert!(paced.itl_p99 <= 15.0, "{paced:?}");
    assert!(paced.tokens_per_s >= 0.97 * free.tokens_per_s);
    let default = simulate(64, 50);
    assert!(default.itl_p99 <= 50.0, "{default:?}");
    assert!(default.ttft_p50 <= 0.5 * free.ttft_p50, "{default:?}");
    assert!(default.ttft_p99 <= 1.1 * free.ttft_p99, "{default:?}");
}

#[test]
fn a_target_that_cannot_be_met_lets_prompts_through_all_the_same() {
    let (strict, free) = (simulate(256, 5), simulate(256, 0));
    assert!(strict.tokens_per_s >= 0.7 * free.tokens_per_s, "{strict:?}");
    assert!(strict.itl_p99 <= 30.0, "{strict:?}");
}
