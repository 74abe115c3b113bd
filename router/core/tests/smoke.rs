//! Many sequences, chunked prompts, a shared prefix, two plans in flight.

use headrace_core::Scheduler;
use headrace_core::event::SeqEvent;
use headrace_core::ids::{BlockSize, Blocks, StepId, TokenId, Tokens};
use headrace_core::limits::Limits;
use headrace_core::request::{Request, RequestSpec, Sampling};
use headrace_core::testing::symbolic::{Model, Referee};

#[test]
fn many_sequences_share_a_prefix_and_draw_what_the_oracle_draws() {
    let limits = Limits {
        block_size: BlockSize::new(4).unwrap(),
        blocks: Blocks(64),
        slots: 12,
        state_slots: 12,
        running_max: 8,
        step_tokens_max: Tokens(24),
        prefill_tokens_max: Tokens(20),
        context_tokens_max: Tokens(256),
        vocab_size: 1000,
        queue_max: 64,
        depth: 2,
        watermark: Blocks(3),
        share_within_step: true,
        prefix_caching: true,
    };
    let model = Model::new(1000).with_end_of_text(TokenId(7), 20);
    let mut scheduler = Scheduler::new(limits.clone());
    let mut referee = Referee::new(&limits, model, StepId(0));
    let mut specs = Vec::new();
    for i in 0..32u32 {
        let mut prompt: Vec<TokenId> = (0..30).map(TokenId).collect();
        prompt.extend((0..i).map(|t| TokenId(100 + i + t)));
        let spec = RequestSpec {
            prompt,
            sampling: Sampling::default(),
            ending: vec![TokenId(7)],
            tokens_max: Some(Tokens(16)),
            prompt_logprobs: false,
            trace: None,
        };
        scheduler
            .admit(Request::new(spec.clone(), &limits).unwrap())
            .unwrap();
        specs.push(spec);
    }
    let mut events = Vec::new();
    while !scheduler.is_idle() {
        while let Some(plan) = scheduler.plan() {
            referee.receive(plan);
            scheduler.audit();
        }
        let result = referee.step().unwrap();
        scheduler.commit(&result, &mut events).unwrap();
        scheduler.audit();
    }
    for (i, spec) in specs.iter().enumerate() {
        let tokens: Vec<TokenId> = events
            .iter()
            .filter_map(|event| match event {
                SeqEvent::Token { seq, token } if seq.0 == i as u64 => Some(token.id),
                _ => None,
            })
            .collect();
        assert_eq!(tokens, model.generate(spec, Tokens(16)).0);
    }
    assert!(
        scheduler.stats().cached_tokens > 500,
        "{:?}",
        scheduler.stats()
    );
}
