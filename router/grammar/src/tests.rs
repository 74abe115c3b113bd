//! Masks against a brute-force checker over a small vocabulary, and grammars that are refused.

mod bombs;
mod masks;

use std::sync::Arc;
use std::sync::mpsc;

use crate::{Bounds, Compiled, Compiler, GrammarError, GrammarSpec, Vocabulary};

/// Ids that end a text.
const ENDING: [u32; 2] = [128, 129];
/// A special token, and a byte that is no character.
const SPECIAL: u32 = 130;
const BROKEN: u32 = 131;

/// Tokens of more than a byte; their ids follow.
const WORDS: [&str; 14] = [
    "true", "tru", "{\"", "\":", "\", \"", "ab", "bc", "abc", "12", "1.", "é", " a", "\"}", "}}",
];

fn bytes_of(id: u32) -> Option<Vec<u8>> {
    match id {
        0..128 => Some(vec![u8::try_from(id).expect("seven bits")]),
        BROKEN => Some(vec![0xFF]),
        128..=SPECIAL => None,
        _ => WORDS
            .get(id as usize - 132)
            .map(|word| word.as_bytes().to_vec()),
    }
}

/// More logits than tokens, as models have.
const SIZE: u32 = 132 + 14 + 7;

fn vocabulary() -> Vocabulary {
    let bytes: Vec<Option<Vec<u8>>> = (0..SIZE).map(bytes_of).collect();
    Vocabulary::new(SIZE, &ENDING, |id| bytes[id as usize].as_deref()).expect("it has endings")
}

fn compiler(bounds: Bounds) -> Compiler {
    Compiler::new(bounds, 1, || Ok(vocabulary()))
}

fn compile_with(compiler: &Compiler, spec: GrammarSpec) -> Result<Arc<Compiled>, GrammarError> {
    let (send, receive) = mpsc::channel();
    compiler.compile(spec, move |outcome| drop(send.send(outcome)))?;
    receive.recv().expect("the compiler answers")
}

fn compile(spec: GrammarSpec) -> Result<Arc<Compiled>, GrammarError> {
    compile_with(&compiler(Bounds::default()), spec)
}
