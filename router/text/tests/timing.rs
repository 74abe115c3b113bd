//! Costs of one model's tokenizer, printed and not judged:
//!
//!     HEADRACE_MODEL=<model folder> cargo test --release -p headrace-text \
//!         --test timing -- --ignored --nocapture

#![expect(clippy::unwrap_used, clippy::print_stderr, reason = "a measurement")]

use std::hint::black_box;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use headrace_text::{Detokenizer, SpecialTokens, StopMatcher, Tokenizer};

const PROSE: &str = "The headrace brings water to the wheel; «the tailrace» leads it away. 水車は \
    1,234 回 turned_around() before 🦀 arrived, and nobody minded at all.\n";

/// The shortest of several runs: this machine does other things, too.
fn shortest(runs: usize, mut work: impl FnMut()) -> Duration {
    (0..runs)
        .map(|_| {
            let start = Instant::now();
            work();
            start.elapsed()
        })
        .min()
        .unwrap()
}

fn nanos_each(took: Duration, count: usize) -> f64 {
    took.as_secs_f64() * 1e9 / count as f64
}

#[test]
#[ignore = "a measurement of a model folder named by HEADRACE_MODEL"]
fn costs() {
    let Some(dir) = std::env::var_os("HEADRACE_MODEL").map(PathBuf::from) else {
        eprintln!("HEADRACE_MODEL names no model folder; nothing is measured");
        return;
    };
    let start = Instant::now();
    let tokenizer = Arc::new(Tokenizer::load(&dir).unwrap());
    eprintln!("load: {:.0} ms", start.elapsed().as_secs_f64() * 1e3);

    let text = PROSE.repeat(200);
    let ids = tokenizer.encode(&text, false).unwrap().ids;
    let took = shortest(5, || drop(black_box(tokenizer.encode(&text, false))));
    eprintln!(
        "encode, {} kB: {:.0} ns a token",
        text.len() / 1000,
        nanos_each(took, ids.len())
    );
    let prompt = PROSE.repeat(4);
    let tokens = tokenizer.encode(&prompt, false).unwrap().ids.len();
    let took = shortest(200, || drop(black_box(tokenizer.encode(&prompt, false))));
    eprintln!(
        "encode, {tokens} tokens: {:.0} ns a token",
        nanos_each(took, tokens)
    );

    for special in [SpecialTokens::Keep, SpecialTokens::Skip] {
        let mut whole = String::new();
        let took = shortest(20, || {
            let mut detokenizer = Detokenizer::new(Arc::clone(&tokenizer), special);
            whole.clear();
            for id in &ids {
                whole.push_str(&detokenizer.push(*id));
            }
            whole.push_str(&detokenizer.finish());
        });
        eprintln!(
            "detokenize, {special:?}: {:.0} ns a token",
            nanos_each(took, ids.len())
        );
        eprintln!("  same text: {}", whole == text);
    }

    let stops = ["</s>", "\n\nUser:", "###", "<|im_end|>"].map(String::from);
    let pieces: Vec<String> = ids.iter().map(|id| tokenizer.token_text(*id)).collect();
    let took = shortest(20, || {
        let mut matcher = StopMatcher::new(&stops);
        for piece in &pieces {
            black_box(matcher.push(piece));
        }
    });
    eprintln!(
        "four stop strings: {:.0} ns a token",
        nanos_each(took, ids.len())
    );

    let hostile = [
        ("letters", "a".to_owned()),
        ("spaces", " ".to_owned()),
        ("newlines", "\n".to_owned()),
        ("digits", "7".to_owned()),
        ("marks", "!".to_owned()),
        ("accents", "e\u{301}\u{301}".to_owned()),
        ("emoji", "👩\u{200d}🚀".to_owned()),
        ("specials", "<|im_end|>".to_owned()),
    ];
    for (name, piece) in hostile {
        for bytes in [50_000, 200_000] {
            let text = piece.repeat(bytes / piece.len());
            let start = Instant::now();
            let tokens = tokenizer.encode(&text, false).unwrap().ids.len();
            let took = start.elapsed().as_secs_f64() * 1e3;
            eprintln!(
                "{} kB of {name}: {took:.1} ms, {tokens} tokens",
                bytes / 1000
            );
        }
    }
}
