//! Results that contradict their plan are refused with a name, and nothing is taken from them.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use headrace_core::ids::{BlockSize, Blocks, StepId, TokenId, Tokens};
use headrace_core::limits::Limits;
use headrace_core::plan::{StepResult, result_flag};
use headrace_core::request::{Request, RequestSpec, Sampling};
use headrace_core::testing::symbolic::{Model, Referee};
use headrace_core::{CommitError, Scheduler};

fn limits() -> Limits {
    Limits {
        block_size: BlockSize::new(4).unwrap(),
        blocks: Blocks(16),
        slots: 4,
        state_slots: 4,
        running_max: 4,
        step_tokens_max: Tokens(32),
        prefill_tokens_max: Tokens(32),
        prompt_logprob_tokens_max: Tokens(32),
        context_tokens_max: Tokens(64),
        vocab_size: 50,
        queue_max: 4,
        depth: 2,
        watermark: Blocks(1),
        share_within_step: true,
        prefix_caching: true,
    }
}

fn request(prompt_logprobs: bool) -> Request {
    let spec = RequestSpec {
        prompt: (0..6).map(TokenId).collect(),
        sampling: Sampling {
            top_n: 2,
            ..Sampling::default()
        },
        ending: Vec::new(),
        tokens_max: Some(Tokens(4)),
        prompt_logprobs,
        masked: false,
        trace: None,
    };
    Request::new(spec, &limits()).unwrap()
}

/// Spoils the result of a step and says what `commit` makes of it; the true one still passes.
fn refused(spoil: impl FnOnce(&mut StepResult)) -> CommitError {
    let mut scheduler = Scheduler::new(limits());
    let mut referee = Referee::new(&limits(), Model::new(50), StepId(0));
    scheduler.admit(request(false)).unwrap();
    scheduler.admit(request(true)).unwrap();
    let result = referee.execute(&scheduler.plan().unwrap());
    let mut spoilt = result.clone();
    spoil(&mut spoilt);
    let mut events = Vec::new();
    let error = scheduler.commit(&spoilt, &mut events).unwrap_err();
    assert!(events.is_empty(), "a refused result is told to nobody");
    scheduler.audit();
    scheduler.commit(&result, &mut events).unwrap();
    error
}

#[test]
fn a_result_out_of_order_is_refused() {
    let error = refused(|result| result.step = StepId(1));
    assert_eq!(
        error,
        CommitError::WrongStep {
            expected: StepId(0),
            got: StepId(1)
        }
    );
    let error = Scheduler::new(limits()).commit(&StepResult::default(), &mut Vec::new());
    assert_eq!(error, Err(CommitError::NothingInFlight { got: StepId(0) }));
}

#[test]
fn a_result_for_other_rows_is_refused() {
    let error = refused(|result| result.row_index[0] = 1);
    assert_eq!(error, CommitError::WrongRows { step: StepId(0) });
    let error = refused(|result| result.row_index.clear());
    assert_eq!(error, CommitError::WrongRows { step: StepId(0) });
}

#[test]
fn a_column_of_the_wrong_length_is_refused() {
    type Spoil = fn(&mut StepResult);
    let columns: [(&str, Spoil); 7] = [
        ("token_id", |result| result.token_id.push(1)),
        ("row_flags", |result| result.row_flags.clear()),
        ("logprob", |result| result.logprob.push(0.0)),
        ("top_count", |result| result.top_count.push(0)),
        ("top_token_id", |result| result.top_token_id.push(0)),
        ("top_logprob", |result| result.top_logprob.clear()),
        ("prompt_logprob", |result| result.prompt_logprob.clear()),
    ];
    for (name, spoil) in columns {
        let error = refused(spoil);
        let CommitError::WrongLength {
            column,
            len,
            expected,
            ..
        } = error
        else {
            panic!("{name}: {error}");
        };
        assert_eq!(column, name);
        assert_ne!(len, expected);
    }
}

#[test]
fn an_id_outside_the_vocabulary_is_refused_unless_it_is_flagged() {
    for id in [50, -1, i32::MAX] {
        let error = refused(|result| result.token_id[1] = id);
        let known = CommitError::UnknownToken {
            step: StepId(0),
            row: 1,
            id,
            vocab_size: 50,
        };
        assert_eq!(error, known);
    }
    let error = refused(|result| result.top_count[0] = -1);
    assert!(
        matches!(
            error,
            CommitError::WrongLength {
                column: "top_token_id",
                ..
            }
        ),
        "{error}"
    );

    let mut scheduler = Scheduler::new(limits());
    let mut referee = Referee::new(&limits(), Model::new(50), StepId(0));
    scheduler.admit(request(false)).unwrap();
    let mut result = referee.execute(&scheduler.plan().unwrap());
    result.token_id[0] = -1;
    result.row_flags[0] = result_flag::NAN;
    scheduler.commit(&result, &mut Vec::new()).unwrap();
    assert!(scheduler.is_idle());
}

#[test]
fn a_missed_mask_is_refused_while_no_row_waits_for_one() {
    let error = refused(|result| result.row_flags[1] = result_flag::MASK_MISSED);
    assert_eq!(
        error,
        CommitError::UnexpectedMask {
            step: StepId(0),
            row: 1
        }
    );
}
