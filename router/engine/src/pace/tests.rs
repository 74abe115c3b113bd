//! The fit and the policy, without a scheduler.

use super::*;

/// A device that is exactly as the model takes it to be, in microseconds.
const DEVICE: [f64; 4] = [1500.0, 21.0, 0.031, 0.001];

fn time(shape: &StepShape) -> f64 {
    let [step, token, position, pair] = DEVICE;
    step + token * f64::from(shape.decode_rows + shape.prompt_tokens)
        + position * shape.decode_context as f64
        + pair * shape.prompt_pairs as f64
}

fn shape(rows: u32, prompt_tokens: u32, context: u32) -> StepShape {
    StepShape {
        decode_rows: rows,
        decode_context: u64::from(rows) * 600,
        prompt_tokens,
        prompt_pairs: u64::from(prompt_tokens) * u64::from(context),
    }
}

/// Steps of many kinds.
fn shapes() -> impl Iterator<Item = StepShape> {
    (0_u32..).map(|i| shape(i * 37 % 257, 64 + i * 613 % 4000, 256 + i * 1987 % 30_000))
}

fn fitted(steps: usize) -> StepTimeModel {
    let mut model = StepTimeModel::new();
    for shape in shapes().take(steps) {
        model.observe(&shape, time(&shape));
    }
    model
}

fn bits(model: &StepTimeModel) -> [u64; 4] {
    model.terms().map(f64::to_bits)
}

fn worst(model: &StepTimeModel) -> f64 {
    let miss = |shape: StepShape| (model.predict(&shape) / time(&shape) - 1.0).abs();
    shapes().skip(5000).take(200).map(miss).fold(0.0, f64::max)
}

#[test]
fn the_fit_finds_a_device_that_is_a_line() {
    let model = fitted(400);
    assert!(worst(&model) < 0.02, "{model:?}");
    assert!(model.miss() < 0.01, "{model:?}");
    assert!(worst(&fitted(40)) < 0.15, "{:?}", fitted(40));
}

#[test]
fn the_same_steps_make_the_same_fit() {
    assert_eq!(bits(&fitted(100)), bits(&fitted(100)));
}

#[test]
fn times_that_cannot_be_teach_nothing() {
    let mut model = fitted(100);
    let before = bits(&model);
    let step = shape(8, 512, 256);
    for micros in [0.0, -5.0, 0.5, 1e12, f64::NAN, f64::INFINITY] {
        model.observe(&step, micros);
    }
    model.observe(&shape(8, 0, 0), 4000.0);
    assert_eq!(bits(&model), before);
    assert!(!StepTimeModel::new().is_known());
}

#[test]
fn outliers_bend_the_fit_little() {
    let mut model = fitted(100);
    for (i, step) in shapes().skip(100).take(300).enumerate() {
        let spoilt = match i % 20 {
            3 => 30.0,
            11 => 0.02,
            _ => 1.0,
        };
        model.observe(&step, spoilt * time(&step));
    }
    assert!(worst(&model) < 0.25, "{} {model:?}", worst(&model));
}

#[test]
fn a_first_step_that_took_forever_is_forgotten() {
    let mut model = StepTimeModel::new();
    model.observe(&shape(0, 512, 256), 2e6);
    for _ in 0..60 {
        // As a pacer would: steps of the least size until it knows better.
        let step = shape(16, 128, 256);
        model.observe(&step, time(&step));
    }
    let step = shape(16, 256, 256);
    let ratio = model.predict(&step) / time(&step);
    assert!((0.8..1.8).contains(&ratio), "{ratio} {model:?}");
}

#[test]
fn coefficients_are_never_negative_nor_beyond_bounds() {
    let mut model = StepTimeModel::new();
    let mut state = 88_172_645_463_325_252_u64;
    for step in shapes().take(2000) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        model.observe(&step, (state % 70_000_000) as f64);
        let sound = |term: f64| (0.0..=60e6).contains(&term);
        assert!(model.terms().into_iter().all(sound), "{model:?}");
        assert!((0.0..=1.0).contains(&model.miss()));
    }
}

#[test]
fn a_device_that_becomes_slower_is_followed() {
    let mut model = fitted(200);
    for step in shapes().skip(200).take(150) {
        model.observe(&step, 2.0 * time(&step));
    }
    let step = shape(64, 1024, 256);
    let ratio = model.predict(&step) / time(&step);
    assert!((1.8..2.1).contains(&ratio), "{ratio}");
}

#[test]
fn what_recent_steps_do_not_show_stays_known() {
    let mut model = fitted(400);
    for i in 0..3000 {
        let step = shape(200 + i % 50, 400 + i % 64, 256);
        model.observe(&step, time(&step));
    }
    let step = shape(64, 2048, 30_000);
    let ratio = model.predict(&step) / time(&step);
    assert!((0.85..1.15).contains(&ratio), "{ratio} {model:?}");
}

// === policy ===

fn pacer(target_ms: u64) -> Pacer {
    Pacer {
        model: fitted(400),
        ..Pacer::new(Some(Duration::from_millis(target_ms)))
    }
}

fn load(decode_rows: u32, backlog: u64) -> Load {
    Load {
        decode_rows,
        decode_context: u64::from(decode_rows) * 600,
        backlog,
    }
}

fn allow(pacer: &Pacer, load: &Load) -> PromptAllowance {
    pacer.allow(pacer.target.expect("it has one"), load)
}

/// Prompt tokens that fit, and the milliseconds of the step with them.
fn step_of(pacer: &Pacer, load: &Load) -> (f64, f64) {
    let of = allow(pacer, load);
    let tokens = (of.cost_max / of.per_token)
        .min(of.tokens_max.0.into())
        .max(of.tokens_min.0.into());
    let [step, token, position, _] = DEVICE;
    let rows = f64::from(load.decode_rows);
    let us = step + token * (rows + tokens) + position * load.decode_context as f64;
    (tokens, us / 1000.0)
}

#[test]
fn while_nobody_decodes_the_limits_are_what_bounds_a_step() {
    let unlimited = PromptAllowance::UNLIMITED;
    assert_eq!(allow(&pacer(5), &load(0, 1 << 20)), unlimited);
    let first = Pacer::new(Some(Duration::from_millis(5)));
    assert_eq!(allow(&first, &load(0, 9)), unlimited);
    let scheduler_limit = allow(&first, &load(1, 9));
    assert_eq!(scheduler_limit.tokens_max, Tokens(TOKENS_FIRST));
}

#[test]
fn a_step_keeps_to_the_target_and_uses_it() {
    for target in [15, 50, 150] {
        for rows in [1, 16, 64] {
            let (_, ms) = step_of(&pacer(target), &load(rows, 2000));
            let target = target as f64;
            assert!(
                (0.9 * target..=target).contains(&ms),
                "{rows} rows: {ms} ms of {target}"
            );
        }
    }
}

#[test]
fn prompts_go_on_beside_rows_that_miss_the_target_alone() {
    let (tokens, ms) = step_of(&pacer(5), &load(256, 2000));
    assert!(tokens >= 128.0);
    assert!((14.0..18.0).contains(&ms), "{ms}");
    let (tokens, _) = step_of(&pacer(1), &load(1, 2000));
    assert!((128.0..129.0).contains(&tokens));
}

#[test]
fn no_step_is_far_larger_than_any_before() {
    let mut pacer = Pacer::new(Some(Duration::from_millis(50)));
    pacer.model.observe(&shape(4, 300, 10), 1000.0);
    assert_eq!(allow(&pacer, &load(4, 1)).tokens_max, Tokens(600));
}

#[test]
fn a_deep_backlog_spends_gaps_that_may_be_late_and_no_more() {
    let mut pacer = pacer(50);
    assert!(
        step_of(&pacer, &load(100, 20_000)).1 <= 50.0,
        "it is not deep"
    );
    let mut spent = 0;
    while step_of(&pacer, &load(100, 400_000)).1 > 60.0 {
        let (tokens, ms) = step_of(&pacer, &load(100, 400_000));
        assert!(ms <= 200.0 && tokens > 4000.0);
        pacer.in_flight.push_back(shape(100, 8000, 256));
        assert_eq!(pacer.done(Duration::from_millis(190)).late, 100);
        spent += 100;
    }
    assert_eq!(spent, 1000);
    // Two hundred gaps in time for each that is late.
    let mut earned = 0;
    while step_of(&pacer, &load(100, 400_000)).1 <= 60.0 {
        pacer.in_flight.push_back(shape(100, 0, 0));
        assert_eq!(pacer.done(Duration::from_millis(9)).late, 0);
        earned += 100;
    }
    assert_eq!(earned, 20_000);
}
