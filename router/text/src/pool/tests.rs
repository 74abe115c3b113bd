//! What a pool promises: an answer to everything it took, and a bound on what it takes.

use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex};

use super::{EncodePool, PoolFull};
use crate::tokenizer::{EncodeError, Encoding, Tokenizer};

fn tokenizer() -> Arc<Tokenizer> {
    let json = br#"{"version": "1.0", "added_tokens": [], "normalizer": null,
        "pre_tokenizer": {"type": "Whitespace"}, "post_processor": null, "decoder": null,
        "model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1, "?": 2}, "unk_token": "?"}}"#;
    Arc::new(Tokenizer::from_json(json).expect("a tokenizer made for this test"))
}

type Answer = Result<Encoding, EncodeError>;

fn answers() -> (SyncSender<Answer>, Receiver<Answer>) {
    sync_channel(64)
}

fn answer(to: &SyncSender<Answer>) -> impl FnOnce(Answer) + Send + 'static {
    let to = to.clone();
    move |result| to.send(result).expect("the test waits")
}

/// Occupies a worker until the sender returned is dropped; returns once it is occupied.
fn occupy(pool: &EncodePool) -> SyncSender<()> {
    let (release, wait) = sync_channel::<()>(1);
    let (entered, until_entered) = sync_channel(1);
    pool.submit("a".into(), false, move |_| {
        entered.send(()).expect("the test waits");
        // An error is the release.
        assert!(wait.recv().is_err());
    })
    .expect("the queue is empty");
    until_entered.recv().expect("the worker is there");
    release
}

#[test]
fn texts_are_encoded_on_named_threads() {
    let pool = EncodePool::new(tokenizer(), 2, 8);
    let (to, from) = sync_channel(1);
    pool.submit("b a c".into(), true, move |result| {
        let name = std::thread::current().name().map(str::to_owned);
        to.send((result, name)).expect("the test waits");
    })
    .expect("the queue is empty");
    let (result, name) = from.recv().expect("an answer");
    let encoding = result.expect("it encodes");
    assert_eq!(encoding.ids, [1, 0, 2]);
    assert_eq!(encoding.offsets, [(0, 1), (2, 3), (4, 5)]);
    assert!(name.is_some_and(|name| name.starts_with("encode-")));
}

#[test]
fn a_full_queue_refuses_with_its_numbers() {
    let pool = EncodePool::new(tokenizer(), 1, 2);
    let release = occupy(&pool);
    let (to, from) = answers();
    for _ in 0..2 {
        pool.submit("a".into(), false, answer(&to))
            .expect("there is room");
    }
    assert_eq!(pool.waiting(), 2);
    let full = pool.submit("a".into(), false, |_| unreachable!("it was not taken"));
    assert_eq!(
        full,
        Err(PoolFull {
            waiting: 2,
            queue_max: 2
        })
    );
    drop(release);
    assert!(from.recv().expect("an answer").is_ok() && from.recv().expect("an answer").is_ok());
}

#[test]
fn what_waits_at_the_end_is_answered() {
    let pool = EncodePool::new(tokenizer(), 1, 4);
    let release = occupy(&pool);
    let (to, from) = answers();
    for _ in 0..3 {
        pool.submit("a".into(), false, answer(&to))
            .expect("there is room");
    }
    let release = Arc::new(Mutex::new(Some(release)));
    let dropper = std::thread::spawn(move || drop(pool));
    drop(release.lock().expect("unpoisoned").take());
    dropper.join().expect("dropping joins the workers");
    let results: Vec<Answer> = from.try_iter().collect();
    assert_eq!(results.len(), 3);
    assert!(
        results
            .iter()
            .all(|r| matches!(r, Ok(_) | Err(EncodeError::Stopped)))
    );
}

#[test]
fn a_panic_in_an_answer_costs_no_worker() {
    let pool = EncodePool::new(tokenizer(), 1, 4);
    pool.submit("a".into(), false, |_| panic!("a fault of the caller"))
        .expect("room");
    let (to, from) = answers();
    pool.submit("b".into(), false, answer(&to)).expect("room");
    assert_eq!(
        from.recv().expect("an answer").expect("it encodes").ids,
        [1]
    );
}

#[test]
fn a_panic_in_the_tokenizer_is_an_answer() {
    let encode: super::Encode = |_, text, _| panic!("no tokenizer for {text:?}");
    let pool = EncodePool::with(tokenizer(), 1, 4, encode);
    let (to, from) = answers();
    for _ in 0..2 {
        pool.submit("a".into(), false, answer(&to)).expect("room");
        assert!(matches!(
            from.recv().expect("an answer"),
            Err(EncodeError::Panicked)
        ));
    }
}
