//! Ids and quantities. Every number that could be taken for another has its own type: an index,
//! a count and a size never mix by accident.

use std::num::NonZeroU32;

macro_rules! newtype {
    ($(#[$doc:meta])* $name:ident($inner:ty)) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        pub struct $name(pub $inner);

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

newtype!(/// A vocabulary entry.
    TokenId(u32));
newtype!(/// A block of the paged KV pool. Block 0 is scrap and is never owned.
    BlockId(u32));
newtype!(/// A row of per-sequence state on the shards.
    SlotId(u32));
newtype!(/// How often a slot has been bound. Results are matched by it (R6).
    Generation(u32));
newtype!(/// An index in the side pool of vocabulary-sized sampling state.
    StateSlot(u32));
newtype!(/// A sequence, for its whole life in the router.
    SeqId(u64));
newtype!(/// A device step. Consecutive; the shards execute in this order (R1).
    StepId(u64));
newtype!(/// A number of tokens.
    Tokens(u32));
newtype!(/// A number of blocks.
    Blocks(u32));

impl StepId {
    /// The step after this one.
    #[must_use]
    pub fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

/// Tokens in a block: the only way from `Tokens` to `Blocks` and back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockSize(NonZeroU32);

impl BlockSize {
    /// `None` for zero.
    pub fn new(tokens: u32) -> Option<Self> {
        NonZeroU32::new(tokens).map(Self)
    }

    /// Tokens in one block.
    pub fn tokens(self) -> Tokens {
        Tokens(self.0.get())
    }

    /// Blocks that `tokens` fill completely.
    pub fn floor(self, tokens: Tokens) -> Blocks {
        Blocks(tokens.0 / self.0)
    }

    /// Blocks that hold `tokens`.
    pub fn ceil(self, tokens: Tokens) -> Blocks {
        Blocks(tokens.0.div_ceil(self.0.get()))
    }

    /// Tokens that `blocks` hold.
    pub fn span(self, blocks: Blocks) -> Tokens {
        Tokens(blocks.0 * self.0.get())
    }
}
