//! Random worlds at depths 1 to 3: tiny pools, shared prefixes, cancellations, lost groups and NaNs.
//! The referee judges every plan, the audit follows every move, clients compare with the oracle.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use headrace_core::ids::{BlockSize, Blocks, Tokens};
use headrace_core::limits::Limits;
use headrace_core::testing::symbolic::Model;
use headrace_core::testing::world::{Choices, Watch, World, play, request};
use proptest::prelude::*;

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 300,
        failure_persistence: None,
        max_shrink_iters: 20_000,
        ..ProptestConfig::default()
    })]

    #[test]
    fn every_client_of_a_random_world_gets_what_the_oracle_says(
        values in prop::collection::vec(any::<u32>(), 0..900),
    ) {
        play(&mut Choices::listed(values), 220, Watch::All, None);
    }
}

#[test]
fn a_thousand_long_worlds_end_well() {
    let mut total = [0; 5];
    for seed in 0..1000 {
        let stats = play(&mut Choices::random(seed), 150, Watch::All, None);
        let of_world = [
            stats.generated_tokens,
            stats.preemptions,
            stats.requeued,
            stats.cached_tokens,
            stats.zombie_rows,
        ];
        for (sum, n) in total.iter_mut().zip(of_world) {
            *sum += n;
        }
    }
    // The worlds are not so small that nothing happens.
    assert!(
        total.iter().all(|&n| n > 100),
        "too little happened: {total:?}"
    );
}

#[test]
fn a_crowd_in_a_pool_of_its_size_shares_preempts_and_ends() {
    let limits = Limits {
        block_size: BlockSize::new(4).unwrap(),
        blocks: Blocks(64),
        slots: 60,
        state_slots: 60,
        running_max: 40,
        step_tokens_max: Tokens(128),
        prefill_tokens_max: Tokens(96),
        prompt_logprob_tokens_max: Tokens(32),
        context_tokens_max: Tokens(256),
        vocab_size: 97,
        queue_max: 1000,
        depth: 2,
        watermark: Limits::default_watermark(Blocks(64)),
        share_within_step: true,
        prefix_caching: true,
    };
    let mut world = World::new(limits, Model::new(97), None);
    let mut choices = Choices::random(1);
    for _ in 0..400 {
        world.admit(request(&mut choices));
    }
    world.drain();
    let stats = world.stats();
    assert!(
        stats.preemptions > 0 && stats.cached_tokens > 1000,
        "{stats:?}"
    );
    assert!(
        stats.preemptions < 400,
        "the watermark keeps preemption the exception: {stats:?}"
    );
}
