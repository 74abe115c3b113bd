//! Random worlds at depths 1 to 3: tiny pools, shared prefixes, cancellations, lost groups and NaNs.
//! The referee judges every plan, the audit follows every move, clients compare with the oracle.

use headrace_core::testing::world::{Choices, play};
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
        play(&mut Choices::listed(values), 220, None);
    }
}

#[test]
fn a_thousand_long_worlds_end_well() {
    let mut total = [0; 5];
    for seed in 0..1000 {
        let stats = play(&mut Choices::random(seed), 150, None);
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
