//! The blocks of one running sequence, in order of position.

use crate::ids::BlockId;

/// Leading blocks that are in the tree and leased, then private ones. Move-only: it goes back to
/// the cache by value.
#[derive(Debug)]
#[must_use = "a table that is dropped leaks its blocks"]
pub(crate) struct BlockTable {
    blocks: Vec<BlockId>,
    shared: usize,
    sent: usize,
    /// Whether full private blocks may still be adopted: not behind one whose key was taken (R5).
    open: bool,
}

// === impl BlockTable ===

impl BlockTable {
    pub(crate) fn new() -> Self {
        Self {
            blocks: Vec::new(),
            shared: 0,
            sent: 0,
            open: true,
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.blocks.len()
    }

    pub(crate) fn blocks(&self) -> &[BlockId] {
        &self.blocks
    }

    /// Leading blocks that are leased from the tree.
    pub(crate) fn shared(&self) -> usize {
        self.shared
    }

    pub(crate) fn has_private(&self) -> bool {
        self.shared < self.blocks.len()
    }

    pub(crate) fn is_open(&self) -> bool {
        self.open
    }

    pub(crate) fn last(&self) -> Option<BlockId> {
        self.blocks.last().copied()
    }

    /// The block in front of index `at`; scrap stands for the root.
    pub(crate) fn parent_of(&self, at: usize) -> BlockId {
        if at == 0 {
            BlockId(0)
        } else {
            self.blocks[at - 1]
        }
    }

    /// Appends a leased block.
    pub(crate) fn push_shared(&mut self, block: BlockId) {
        debug_assert!(!self.has_private());
        self.blocks.push(block);
        self.shared += 1;
    }

    /// Appends a private block.
    pub(crate) fn push_private(&mut self, block: BlockId) {
        self.blocks.push(block);
    }

    /// The first private block has been adopted and is leased now.
    pub(crate) fn share_next(&mut self) {
        debug_assert!(self.has_private());
        self.shared += 1;
    }

    /// Nothing of this table is adopted any more.
    pub(crate) fn close(&mut self) {
        self.open = false;
    }

    /// The blocks that the shards do not know yet, and the index of the first. They do afterwards.
    pub(crate) fn take_unsent(&mut self) -> (usize, &[BlockId]) {
        let at = std::mem::replace(&mut self.sent, self.blocks.len());
        (at, &self.blocks[at..])
    }

    /// All blocks, and how many of them are leased.
    pub(crate) fn into_parts(self) -> (Vec<BlockId>, usize) {
        (self.blocks, self.shared)
    }
}
