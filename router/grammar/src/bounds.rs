//! What a grammar may cost, and what is said of one that costs more.

use std::time::Duration;

/// Bounds of one grammar. Each has a name, which a refusal tells.
#[derive(Debug, Clone)]
pub struct Bounds {
    /// Bytes of the grammar's text.
    pub source_bytes_max: usize,
    /// Brackets within brackets of a regular expression or a Lark grammar, objects and arrays
    /// within each other of a schema.
    pub depth_max: usize,
    /// The least common multiple of all `multipleOf` of a schema, without their decimal point: the
    /// lexer has as many states.
    pub multiple_max: u64,
    /// Counted repetitions within each other, their largest counts multiplied.
    pub repeats_max: u64,
    /// From the first look at the text to the first mask.
    pub compile_time_max: Duration,
    /// Work on the lexer's expressions before the first token (llguidance's fuel).
    pub lexer_fuel_max: u64,
    /// Symbols of all productions together.
    pub symbols_max: usize,
    /// States of the lexer, one to two kilobytes each; those of all requests of a grammar.
    pub lexer_states_max: usize,
    /// Work on the lexer for one mask (llguidance's fuel).
    pub mask_fuel_max: u64,
    /// Items of the parser for one mask.
    pub mask_items_max: usize,
    /// Grammars that wait to be compiled.
    pub queue_max: usize,
    /// Compiled grammars that are kept.
    pub cached_max: usize,
}

/// Why a grammar cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum GrammarError {
    /// The text is too long.
    #[error("the grammar has {given} bytes; at most {max} are allowed (source_bytes_max)")]
    TooLong {
        /// Bytes allowed.
        max: usize,
        /// Bytes given.
        given: usize,
    },
    /// Brackets within brackets.
    #[error("the grammar is nested {given} levels deep; at most {max} are allowed (depth_max)")]
    TooDeep {
        /// Levels allowed.
        max: usize,
        /// Levels given.
        given: usize,
    },
    /// Numbers that are multiples of too much.
    #[error(
        "the grammar's `multipleOf` have the common multiple {given}; at most {max} is allowed \
         (multiple_max)"
    )]
    Multiples {
        /// The common multiple allowed.
        max: u64,
        /// Theirs.
        given: u64,
    },
    /// Repetitions of repetitions.
    #[error(
        "the grammar repeats repetitions up to {given} times; at most {max} are allowed \
         (repeats_max)"
    )]
    Repeats {
        /// Times allowed.
        max: u64,
        /// Times given.
        given: u64,
    },
    /// Compiling takes too long.
    #[error("the grammar was not compiled within {max:?} (compile_time_max)")]
    TooSlow {
        /// What was allowed.
        max: Duration,
    },
    /// A bound of the compiler, or something that it does not know or understand.
    #[error("{0}")]
    Refused(String),
    /// The compiler panicked.
    #[error("the grammar cannot be compiled: the compiler failed on it")]
    Failed,
    /// As many grammars wait as may.
    #[error("{waiting} grammars wait to be compiled; at most {queue_max} may")]
    QueueFull {
        /// Grammars in the queue.
        waiting: usize,
        /// How many may be.
        queue_max: usize,
    },
    /// No grammar works with this model.
    #[error("{0}")]
    Model(String),
}

impl Default for Bounds {
    fn default() -> Self {
        Self {
            source_bytes_max: 256 << 10,
            depth_max: 100,
            multiple_max: 10_000,
            repeats_max: 100_000,
            compile_time_max: Duration::from_secs(2),
            lexer_fuel_max: 1_000_000,
            symbols_max: 200_000,
            lexer_states_max: 20_000,
            mask_fuel_max: 100_000,
            mask_items_max: 50_000,
            queue_max: 64,
            cached_max: 32,
        }
    }
}
