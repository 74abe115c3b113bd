//! Texts of a given form: what a request asks for ([`GrammarSpec`]), compiled within bounds
//! ([`Compiler`], [`Bounds`]) over the bytes of a vocabulary ([`Vocabulary`]), and followed token by
//! token, each time with the mask of what may come next ([`Matcher`]).
//!
//! The crate `llguidance` does the matching; no other crate of ours names it. Nothing here knows of
//! steps, slots or HTTP.

mod bounds;
mod cache;
mod check;
mod compile;
mod matcher;
mod pool;
mod spec;
mod vocabulary;

pub use bounds::{Bounds, GrammarError};
pub use compile::{Compiled, Compiler};
pub use matcher::{MatchError, Matcher, TokenMask};
pub use pool::Pool;
pub use spec::GrammarSpec;
pub use vocabulary::{Vocabulary, VocabularyError};

#[cfg(test)]
mod tests;
