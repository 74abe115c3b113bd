//! Costs of masks with one model's vocabulary, printed and not judged:
//!
//!     HEADRACE_MODEL=<model folder> cargo test --release -p headrace-grammar \
//!         --test timing -- --ignored --nocapture

#![expect(clippy::unwrap_used, clippy::print_stderr, reason = "a measurement")]

use std::path::PathBuf;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use headrace_grammar::{Bounds, Compiled, Compiler, GrammarSpec, Vocabulary};
use headrace_text::Tokenizer;
use serde_json::{Value, json};

/// A size that newer models have: the vocabulary is filled up with pairs of its tokens.
const LARGE: u32 = 128_256;
/// Texts that are followed; the first finds everything new.
const PASSES: usize = 50;

fn schema() -> Value {
    json!({
        "type": "object",
        "properties": {
            "name": {"type": "string"},
            "age": {"type": "integer"},
            "kind": {"enum": ["person", "place", "thing"]},
            "tags": {"type": "array", "items": {"type": "string"}},
        },
        "required": ["name", "age", "kind", "tags"],
        "additionalProperties": false,
    })
}

const DOCUMENT: &str = r#"{"name": "Ada Lovelace, countess of nowhere", "age": 36, "kind": "person", "tags": ["numbers", "a machine that weaves", "été", "notes"]}"#;

fn words(tokenizer: &Tokenizer, size: u32) -> Vec<Vec<u8>> {
    let own = u32::try_from(tokenizer.vocab_size()).unwrap();
    let bytes = |id: u32| match tokenizer.token_bytes(id) {
        Some(bytes) if !tokenizer.is_special(id) => bytes.to_vec(),
        _ => Vec::new(),
    };
    let pair = |id: u32| [bytes(id % own), bytes(id.wrapping_mul(31) % own)].concat();
    (0..size)
        .map(|id| if id < own { bytes(id) } else { pair(id) })
        .collect()
}

fn compile(compiler: &Compiler, spec: GrammarSpec) -> Arc<Compiled> {
    let (send, receive) = mpsc::channel();
    compiler
        .compile(spec, move |outcome| send.send(outcome).unwrap())
        .unwrap();
    receive.recv().unwrap().unwrap()
}

fn told(what: &str, mut times: Vec<Duration>) {
    times.sort_unstable();
    let at = |percent: usize| times[(times.len() - 1) * percent / 100];
    let (p50, p99, max) = (at(50), at(99), at(100));
    eprintln!(
        "  {what}: p50 {p50:?}, p99 {p99:?}, max {max:?} of {}",
        times.len()
    );
}

fn measure(tokenizer: &Tokenizer, size: u32) {
    let words = words(tokenizer, size);
    let ending = tokenizer.ending_ids().to_vec();
    let compiler = Compiler::new(Bounds::default(), 1, move || {
        Vocabulary::new(size, &ending, |id| Some(&words[id as usize]))
    });
    let begun = Instant::now();
    compile(&compiler, GrammarSpec::Regex("a".to_owned()));
    eprintln!("vocabulary of {size}: {:?}, once", begun.elapsed());
    let begun = Instant::now();
    let grammar = compile(&compiler, GrammarSpec::JsonSchema(schema()));
    eprintln!("  schema: {:?}", begun.elapsed());
    let ids = tokenizer.encode(DOCUMENT, false).unwrap().ids;
    let (mut first, mut later) = (Vec::new(), Vec::new());
    for pass in 0..PASSES {
        let mut matcher = grammar.matcher();
        for id in &ids {
            let begun = Instant::now();
            matcher.accept(*id).unwrap();
            matcher.mask().unwrap();
            let times = if pass == 0 { &mut first } else { &mut later };
            times.push(begun.elapsed());
        }
    }
    told("a token of the first text", first);
    told("a token of later ones", later);
}

#[test]
#[ignore = "a measurement of a model folder named by HEADRACE_MODEL"]
fn costs() {
    let Some(dir) = std::env::var_os("HEADRACE_MODEL").map(PathBuf::from) else {
        eprintln!("HEADRACE_MODEL names no model folder; nothing is measured");
        return;
    };
    let tokenizer = Tokenizer::load(&dir).unwrap();
    measure(&tokenizer, u32::try_from(tokenizer.vocab_size()).unwrap());
    measure(&tokenizer, LARGE);
}
