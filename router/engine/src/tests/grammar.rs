//! Constrained sequences: what they may draw reaches the shard before the next plan, a mask that is
//! missed costs a step, and one that is missed twice costs the request.

use std::sync::{Arc, mpsc};
use std::time::Duration;

use headrace_grammar::{Bounds, Compiled, Compiler, GrammarSpec, Matcher, Vocabulary};

use super::fake::{Fake, Masks, VOCAB};
use super::{Engine, config, expected, read};
use crate::{
    Attached, EngineConfig, FinishReason, Request, RequestSpec, Sampling, TokenEvent, TokenId,
    TokenStream, Tokens,
};

/// The id that ends a text; bytes are tokens.
const END: u32 = 2;

fn compile(pattern: &str, bounds: Bounds) -> Arc<Compiled> {
    let letters: Vec<u8> = (0..128).collect();
    let compiler = Compiler::new(bounds, 1, move || {
        Vocabulary::new(VOCAB, &[END], |id| letters.get(id as usize..=id as usize))
    });
    let (send, receive) = mpsc::channel();
    let spec = GrammarSpec::Regex(pattern.to_owned());
    let deliver = move |outcome| drop(send.send(outcome));
    compiler.compile(spec, deliver).expect("within the bounds");
    receive.recv().expect("an answer").expect("it is in order")
}

fn matcher(pattern: &str) -> Matcher {
    compile(pattern, Bounds::default()).matcher()
}

/// Threads make masks in real time, however long a loaded machine takes: so the clock is not paused,
/// and nothing is late by itself.
fn patient(ranks: usize) -> EngineConfig {
    EngineConfig {
        mask_max: Duration::from_secs(60),
        mask_threads: 2,
        ..config(ranks)
    }
}

async fn engine(group: Vec<Fake>) -> Engine {
    Engine::ready_with(patient(group.len()), group).await
}

fn request(engine: &Engine, prompt: u32, tokens_max: u32) -> Request {
    let facts = engine.handle.facts().expect("the engine is ready");
    let spec = RequestSpec {
        prompt: (0..prompt).map(TokenId).collect(),
        sampling: Sampling::default(),
        ending: vec![TokenId(END)],
        tokens_max: Some(Tokens(tokens_max)),
        prompt_logprobs: false,
        masked: true,
        trace: None,
    };
    Request::new(spec, &facts.limits).expect("it fits")
}

async fn constrained(engine: &Engine, prompt: u32, max: u32, matcher: Matcher) -> TokenStream {
    let request = request(engine, prompt, max);
    let stream = engine
        .handle
        .submit_with(
            request,
            Attached {
                matcher: Some(matcher),
                ..Attached::default()
            },
        )
        .await;
    stream.expect("there is room")
}

/// The text of what was drawn: the fake draws the first token that it may.
async fn text(stream: &mut TokenStream) -> (String, FinishReason) {
    let (tokens, reason) = read(stream).await;
    let letter = |id: &u32| char::from_u32(*id).filter(|_| *id != END);
    (tokens.iter().filter_map(letter).collect(), reason)
}

async fn drained(engine: Engine) {
    engine.handle.drain(Duration::from_secs(60)).await;
    engine.task.await.expect("no panic").expect("no fault");
}

async fn texts_are_of_their_grammars(depth: u32, ranks: u32) {
    let group = Fake::group(ranks);
    let seen: Vec<_> = group.iter().map(|fake| Arc::clone(&fake.seen)).collect();
    let config = EngineConfig {
        depth,
        ..patient(ranks as usize)
    };
    let engine = Engine::ready_with(config, group).await;
    let mut one = constrained(&engine, 5, 40, matcher("xa{4}[b-d]z")).await;
    let mut free = engine.stream(3, 9).await;
    let mut other = constrained(&engine, 9, 40, matcher("(yes|no)!")).await;
    let mut short = constrained(&engine, 2, 3, matcher("k{9}")).await;
    assert_eq!(
        text(&mut one).await,
        ("xaaaabz".to_owned(), FinishReason::EndOfText)
    );
    assert_eq!(
        read(&mut free).await,
        (expected(3, 9), FinishReason::Length)
    );
    assert_eq!(
        text(&mut other).await,
        ("no!".to_owned(), FinishReason::EndOfText)
    );
    assert_eq!(
        text(&mut short).await,
        ("kkk".to_owned(), FinishReason::Length)
    );
    drained(engine).await;
    let (first, others) = seen.split_first().expect("there is a rank");
    let plans = first.plans();
    for (before, mask) in first.masks() {
        assert_eq!(plans[before - 1].step, mask.step, "before the next plan");
    }
    let masked = |plan: &&headrace_core::plan::StepPlan| {
        let flags = &plan.row_flags;
        flags
            .iter()
            .any(|f| f & headrace_core::plan::row_flag::MASKED != 0)
    };
    let wanted = plans.iter().filter(masked).count();
    assert_eq!(
        first.masks().len(),
        wanted,
        "one message for each step that waits"
    );
    for rank in others {
        assert!(rank.masks().is_empty(), "only the first rank draws");
    }
}

#[tokio::test]
async fn texts_are_of_their_grammars_at_depth_1() {
    texts_are_of_their_grammars(1, 1).await;
}

#[tokio::test]
async fn texts_are_of_their_grammars_at_depth_2_on_two_ranks() {
    texts_are_of_their_grammars(2, 2).await;
}

#[tokio::test]
async fn texts_are_of_their_grammars_at_depth_3() {
    texts_are_of_their_grammars(3, 1).await;
}

#[tokio::test]
async fn a_mask_that_is_missed_once_changes_no_text() {
    let mut group = Fake::group(1);
    group[0].masks = Masks::MissedNowAndThen;
    let engine = engine(group).await;
    let mut one = constrained(&engine, 5, 40, matcher("xa{4}[b-d]z")).await;
    let mut free = engine.stream(3, 30).await;
    assert_eq!(
        text(&mut one).await,
        ("xaaaabz".to_owned(), FinishReason::EndOfText)
    );
    assert_eq!(
        read(&mut free).await,
        (expected(3, 30), FinishReason::Length)
    );
    assert!(engine.metric("headrace_masks_missed") > 0);
    drained(engine).await;
}

#[tokio::test]
async fn a_mask_that_is_missed_twice_fails_its_request_alone() {
    let mut group = Fake::group(1);
    group[0].masks = Masks::Ignored;
    let engine = engine(group).await;
    let mut one = constrained(&engine, 5, 40, matcher("abc")).await;
    let mut free = engine.stream(3, 9).await;
    assert_eq!(read(&mut one).await, (vec![], FinishReason::MaskMissed));
    assert_eq!(
        read(&mut free).await,
        (expected(3, 9), FinishReason::Length)
    );
    assert_eq!(engine.metric("headrace_masks_missed"), 2);
    drained(engine).await;
}

#[tokio::test]
async fn masks_that_are_there_do_not_wait_for_one_that_is_not() {
    let config = EngineConfig {
        mask_max: Duration::from_millis(20),
        ..patient(1)
    };
    let group = Fake::group(1);
    let seen = Arc::clone(&group[0].seen);
    let engine = Engine::ready_with(config, group).await;
    let stuck = request(&engine, 7, 40);
    // A grammar that never makes a mask: the engine knows of none.
    let stuck = engine.handle.submit(stuck).await;
    let mut stuck = stuck.expect("there is room");
    let mut one = constrained(&engine, 5, 40, matcher("ab")).await;
    assert_eq!(read(&mut stuck).await, (vec![], FinishReason::MaskMissed));
    let (told, reason) = text(&mut one).await;
    // On a machine that is late by itself, its own masks may be missed as well.
    assert!(
        told == "ab" || reason == FinishReason::MaskMissed,
        "{told} {reason:?}"
    );
    let partial = |(_, mask): &(usize, headrace_wire::StepMask)| mask.row.len() < 2;
    assert!(
        seen.masks().iter().any(partial),
        "sent without the one that is missing"
    );
    drained(engine).await;
}

#[tokio::test]
async fn a_grammar_that_becomes_too_much_ends_its_request_alone() {
    let bounds = Bounds {
        repeats_max: u64::MAX,
        ..Bounds::default()
    };
    let bomb = compile("(((a{1,1000}){1,1000}){1,1000})z", bounds).matcher();
    let engine = engine(Fake::group(1)).await;
    let mut one = constrained(&engine, 5, 4000, bomb).await;
    let mut free = engine.stream(3, 9).await;
    let (tokens, reason) = read(&mut one).await;
    assert_eq!(
        reason,
        FinishReason::GrammarFailed,
        "after {} tokens",
        tokens.len()
    );
    assert_eq!(
        read(&mut free).await,
        (expected(3, 9), FinishReason::Length)
    );
    drained(engine).await;
}

#[tokio::test]
async fn whoever_leaves_takes_the_grammar_along() {
    let engine = engine(Fake::group(1)).await;
    let mut early = constrained(&engine, 5, 4000, matcher("a*")).await;
    let mut stays = constrained(&engine, 6, 40, matcher("abcdefgh")).await;
    let begun = early.next().await;
    assert!(matches!(begun[0], TokenEvent::Started { .. }));
    drop(early);
    assert_eq!(
        text(&mut stays).await,
        ("abcdefgh".to_owned(), FinishReason::EndOfText)
    );
    drained(engine).await;
}

/// A pool that is too small for all: sequences are preempted, and their grammars go on where they
/// were.
#[tokio::test]
async fn preemption_keeps_the_place_in_the_grammar() {
    let config = EngineConfig {
        blocks_max: 40,
        running_max: 8,
        ..patient(1)
    };
    let engine = Engine::ready_with(config, Fake::group(1)).await;
    let word = "abcdefghijklmnopqrstuvwxyz0123456789";
    let mut streams = Vec::new();
    for prompt in 0..12 {
        streams.push(constrained(&engine, 5 + prompt, 60, matcher(word)).await);
    }
    for stream in &mut streams {
        assert_eq!(
            text(stream).await,
            (word.to_owned(), FinishReason::EndOfText)
        );
    }
    assert!(
        engine.metric("headrace_preemptions") > 0,
        "the pool was too small"
    );
    assert_eq!(engine.metric("headrace_masks_missed"), 0);
    drained(engine).await;
}
