//! Tokens to text and back: the tokenizer and its bounded encode pool, incremental
//! detokenizing, stop strings, chat templates, tool calls.
//!
//! Nothing here knows of requests, queues of the engine, HTTP or async: every type is a plain
//! value that one task owns, except [`EncodePool`], which owns its threads.

mod chat;
mod decode_table;
mod detok;
mod pool;
mod special;
mod stop;
mod tokenizer;
mod tools;

pub use chat::{ChatInput, ChatTemplate, TemplateError};
pub use detok::{Detokenizer, SpecialTokens};
pub use pool::{EncodePool, PoolFull};
pub use stop::{Released, StopDetector, StopMatcher, StopPlace};
pub use tokenizer::{EncodeError, Encoding, LoadError, Tokenizer};
pub use tools::{
    CallsAs, CallsAsked, CallsMax, HELD_BYTES_MAX, Marker, ParserAsked, Signature, ToolCallParser,
    ToolConstraint, ToolEvent, ToolFormat, ToolStyle, UnknownParser,
};
