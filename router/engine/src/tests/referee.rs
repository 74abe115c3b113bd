//! The engine with the referee as its shards: every rule of the plans is checked as they arrive,
//! and every token compared with what the sequence alone would have drawn.

use std::sync::{Arc, OnceLock};

use headrace_core::ids::{StepId, TokenId, Tokens};
use headrace_core::limits::Limits;
use headrace_core::testing::symbolic::{Model, Referee};

use super::fake::{self, Fake};
use super::{Engine, config, read};
use crate::sink::TokenEvent;
use crate::{EngineConfig, FinishReason, Request, RequestSpec, Sampling};

/// An ending id, and how often it is drawn.
const ENDING: (TokenId, u32) = (TokenId(2), 40);

fn model() -> Model {
    Model::new(fake::VOCAB).with_end_of_text(ENDING.0, ENDING.1)
}

/// Ranks that execute plans as the referee does. It learns the limits when the group is ready,
/// which is before the first plan.
fn referees(ranks: u32, limits: &Arc<OnceLock<Limits>>) -> Vec<Fake> {
    let mut group = Fake::paced(ranks);
    for fake in &mut group {
        let limits = Arc::clone(limits);
        fake.model = Arc::new(move || {
            let limits = Arc::clone(&limits);
            let mut referee = None;
            Box::new(move |plan| {
                let referee = referee.get_or_insert_with(|| {
                    let limits = limits.get().expect("the engine is ready before it plans");
                    Referee::new(limits, model(), StepId(0))
                });
                referee.execute(plan)
            })
        });
    }
    group
}

/// Numbers that look random and are the same every time.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, bound: u32) -> u32 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        u32::try_from((self.0 >> 33) % u64::from(bound)).expect("smaller than the bound")
    }
}

/// Half of the prompts begin alike.
fn spec(numbers: &mut Numbers) -> RequestSpec {
    let shared = if numbers.below(2) == 0 {
        numbers.below(30)
    } else {
        0
    };
    let own = 1 + numbers.below(20);
    let mut prompt: Vec<TokenId> = (0..shared).map(|at| TokenId(100 + at)).collect();
    prompt.extend((0..own).map(|_| TokenId(10 + numbers.below(500))));
    RequestSpec {
        prompt,
        sampling: Sampling {
            temperature: 1.0,
            seed: numbers.below(9).into(),
            ..Sampling::default()
        },
        ending: vec![ENDING.0],
        tokens_max: Some(Tokens(1 + numbers.below(40))),
        prompt_logprobs: false,
        masked: false,
        trace: None,
    }
}

/// Sixty clients come and some go early; a pool of forty blocks makes them preempt each other.
async fn referee_a_crowd(depth: u32, ranks: u32) {
    let limits = Arc::new(OnceLock::new());
    let config = EngineConfig {
        depth,
        blocks_max: 40,
        running_max: 8,
        step_tokens_max: 24,
        prefill_tokens_max: 16,
        ..config(ranks as usize)
    };
    let engine = Arc::new(Engine::ready_with(config, referees(ranks, &limits)).await);
    let facts = engine.handle.facts().expect("ready");
    limits.set(facts.limits.clone()).expect("set once");

    let mut numbers = Numbers(u64::from(depth));
    let mut clients = Vec::new();
    for _ in 0..60 {
        let spec = spec(&mut numbers);
        let (leaves_early, wait) = (numbers.below(4) == 0, numbers.below(400));
        let (engine, facts) = (Arc::clone(&engine), Arc::clone(&facts));
        clients.push(tokio::spawn(async move {
            tokio::time::sleep(std::time::Duration::from_millis(wait.into())).await;
            let tokens_max = spec.tokens_max.expect("it is set");
            let alone = model().generate(&spec, tokens_max);
            let request = Request::new(spec, &facts.limits).expect("it fits");
            let mut stream = engine.handle.submit(request).await.expect("there is room");
            if leaves_early {
                let events = stream.next().await;
                assert!(matches!(events[0], TokenEvent::Started { .. }));
                return;
            }
            let (tokens, reason) = read(&mut stream).await;
            let tokens: Vec<_> = tokens.into_iter().map(TokenId).collect();
            assert_eq!((tokens, reason), alone);
            assert_ne!(reason, FinishReason::GroupLost);
        }));
    }
    for client in clients {
        client.await.expect("every client gets its tokens");
    }
    assert!(
        engine.metric("headrace_preemptions") > 0,
        "the pool was too small for all"
    );
    assert!(
        engine.metric("headrace_cached_tokens") > 0,
        "prompts were shared"
    );
    engine.handle.drain(std::time::Duration::from_secs(9)).await;
    let task = Arc::into_inner(engine).expect("the clients are gone").task;
    task.await.expect("no panic").expect("no fault");
}

#[tokio::test(start_paused = true)]
async fn a_crowd_gets_the_tokens_of_each_alone_at_depth_1() {
    referee_a_crowd(1, 1).await;
}

#[tokio::test(start_paused = true)]
async fn a_crowd_gets_the_tokens_of_each_alone_at_depth_2_on_two_ranks() {
    referee_a_crowd(2, 2).await;
}

#[tokio::test(start_paused = true)]
async fn a_crowd_gets_the_tokens_of_each_alone_at_depth_3() {
    referee_a_crowd(3, 1).await;
}
