//! The KV cache as the router sees it: who holds which block.
//!
//! A block is in exactly one place: in the pool's free list, private to one table, or in the prefix
//! tree, where tables lease it. Nothing here knows what a cell holds.

pub(crate) mod pool;
pub(crate) mod table;
pub(crate) mod tree;

use crate::ids::{BlockId, BlockSize, Blocks, SeqId, StepId, TokenId, Tokens};
use crate::kv::pool::BlockPool;
use crate::kv::table::BlockTable;
use crate::kv::tree::{Origin, PrefixTree, Search};
use crate::limits::Limits;
use crate::mutation::{Mutation, Seeded};
use crate::plan::StepPlan;

/// What is known of the cells of a table that is given back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Taint {
    /// A token was drawn over them and it was a number.
    Clean,
    /// They may hold a NaN: the next owner has them zeroed first (R10).
    Suspect,
}

/// Who adopts, and when.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Adopter {
    pub(crate) seq: SeqId,
    pub(crate) step: StepId,
    /// Leading cells over which a token was drawn without a NaN.
    pub(crate) proven: Tokens,
}

/// [`BlockPool`] and [`PrefixTree`], and the moves of a block between them and the tables.
#[derive(Debug)]
pub(crate) struct KvCache {
    block_size: BlockSize,
    pool: BlockPool,
    tree: PrefixTree,
    caching: bool,
    seeded: Seeded,
}

// === impl KvCache ===

impl KvCache {
    pub(crate) fn new(limits: &Limits, seeded: Seeded) -> Self {
        Self {
            block_size: limits.block_size,
            pool: BlockPool::new(limits.blocks, seeded),
            tree: PrefixTree::new(limits.blocks, limits.block_size, seeded),
            caching: limits.prefix_caching,
            seeded,
        }
    }

    /// Blocks that can be had: free ones, and tree blocks without a lease.
    pub(crate) fn free(&self) -> Blocks {
        Blocks(self.pool.free().0 + self.tree.unleased().0)
    }

    /// Blocks in the tree.
    pub(crate) fn cached(&self) -> Blocks {
        self.tree.blocks()
    }

    /// Collects the longest cached prefix of `tokens` that extends `table` into `found`. At least
    /// the last token is left to compute, so a leased cell is never written again (R5).
    pub(crate) fn find(
        &self,
        table: &BlockTable,
        tokens: &[TokenId],
        search: Search,
        found: &mut Vec<BlockId>,
    ) {
        found.clear();
        if !self.caching || table.has_private() {
            return;
        }
        let bs = self.block_size.tokens().0 as usize;
        let last = usize::from(!self.seeded.is(Mutation::MatchCoversLastToken));
        let blocks_max = tokens.len().saturating_sub(last) / bs;
        let mut parent = table.last().unwrap_or_default();
        for block_tokens in tokens[..blocks_max * bs].chunks_exact(bs).skip(table.len()) {
            let Some(block) = self.tree.get(parent, block_tokens, search) else {
                break;
            };
            found.push(block);
            parent = block;
        }
    }

    /// How many of `found` are leased by nobody, so that leasing them takes them from [`Self::free`].
    pub(crate) fn unleased_of(&self, found: &[BlockId]) -> Blocks {
        let count = found
            .iter()
            .filter(|&&block| self.tree.refs(block) == 0)
            .count();
        Blocks(u32::try_from(count).expect("a pool has fewer than 2^32 blocks"))
    }

    /// Leases `found`, which [`Self::find`] collected for this table.
    pub(crate) fn lease(&mut self, table: &mut BlockTable, found: &[BlockId]) {
        for &block in found {
            self.tree.lease(block);
            table.push_shared(block);
        }
    }

    /// Appends `blocks` private blocks, evicting as needed. Those to zero first go to the plan.
    pub(crate) fn grow(&mut self, table: &mut BlockTable, blocks: Blocks, plan: &mut StepPlan) {
        for _ in 0..blocks.0 {
            if self.pool.free() == Blocks(0) {
                let (block, taint) = self
                    .tree
                    .evict()
                    .expect("growth is settled before rows are written (R6); this is a router bug");
                self.pool.give(block, taint);
            }
            let (block, taint) = self.pool.take();
            if taint == Taint::Suspect && !self.seeded.is(Mutation::DirtyBlockNotZeroed) {
                plan.zero_block.push(block.0.cast_signed());
                self.pool.zeroed(block, plan.step);
            }
            table.push_private(block);
        }
    }

    /// Puts the table's blocks that `tokens` fill into the tree, as far as the chain goes (R5).
    pub(crate) fn adopt(&mut self, table: &mut BlockTable, tokens: &[TokenId], by: Adopter) {
        if !self.caching {
            return;
        }
        let bs = self.block_size.tokens().0 as usize;
        while table.is_open() && table.shared() < tokens.len() / bs {
            let at = table.shared();
            let parent = table.parent_of(at);
            let proven = (at + 1) * bs <= by.proven.0 as usize;
            let block = table.blocks()[at];
            let origin = Origin {
                writer: by.seq,
                step: by.step,
                proven,
            };
            if self
                .tree
                .adopt(parent, &tokens[at * bs..][..bs], block, origin)
            {
                table.share_next();
            } else {
                table.close();
            }
        }
    }

    /// A token was drawn over the first `cells` cells and it was a number, so none of them is a NaN.
    /// `before` is how far that was known already.
    pub(crate) fn prove(&mut self, table: &BlockTable, before: Tokens, cells: Tokens) {
        let from = self.block_size.floor(before).0 as usize;
        let to = (self.block_size.floor(cells).0 as usize).min(table.shared());
        for &block in table.blocks().get(from..to).unwrap_or_default() {
            self.tree.prove(block);
        }
    }

    /// Blocks that nobody else holds: what a preemption of this table would make available.
    pub(crate) fn alone(&self, table: &BlockTable) -> Blocks {
        let (shared, private) = table.blocks().split_at(table.shared());
        let alone = shared
            .iter()
            .filter(|&&block| self.tree.refs(block) == 1)
            .count();
        Blocks(u32::try_from(alone + private.len()).expect("a pool has fewer than 2^32 blocks"))
    }

    /// Takes a table back. Deepest blocks first: so the tree's LRU order has leaves before parents.
    pub(crate) fn release(&mut self, table: BlockTable, taint: Taint) {
        let (blocks, shared) = table.into_parts();
        for &block in blocks[shared..].iter().rev() {
            self.pool.give(block, taint);
        }
        for &block in blocks[..shared].iter().rev() {
            if self.tree.unlease(block) {
                self.pool.give(block, Taint::Suspect);
            }
        }
    }

    /// Whether the table leases a block that another sequence wrote and no drawn token has proven.
    pub(crate) fn leans_on_unproven(&self, table: &BlockTable, seq: SeqId) -> bool {
        let shared = &table.blocks()[..table.shared()];
        shared
            .iter()
            .any(|&block| self.tree.is_suspect(block) && self.tree.writer(block) != seq)
    }

    /// Takes the table's unproven blocks and all their descendants out of the tree (R10).
    pub(crate) fn withdraw_unproven(&mut self, table: &BlockTable) {
        let shared = &table.blocks()[..table.shared()];
        // A proof covers the whole prefix, so what follows the first suspect are its descendants.
        if let Some(&block) = shared.iter().find(|&&block| self.tree.is_suspect(block)) {
            self.withdraw(block);
        }
    }

    /// A dropped row of plan `step` wrote a NaN to `block`, which its sequence no longer holds.
    /// `true` when somebody holds it by now.
    pub(crate) fn taint(&mut self, block: BlockId, step: StepId) -> bool {
        if !self.pool.taint(block, step) {
            return false;
        }
        self.withdraw(block);
        !self.pool.is_free(block)
    }

    /// Whether the table holds a withdrawn block or one of `suspects`.
    pub(crate) fn is_hit(&self, table: &BlockTable, suspects: &[BlockId]) -> bool {
        let withdrawn = |block: &BlockId| self.tree.is_withdrawn(*block);
        table.blocks()[..table.shared()].iter().any(withdrawn)
            || table.blocks().iter().any(|block| suspects.contains(block))
    }

    /// Recounts both halves: every block in exactly one place, and every lease counted.
    pub(crate) fn audit<'a>(&self, tables: impl Iterator<Item = &'a BlockTable>) {
        let mut places = self.pool.audit();
        self.tree.audit(&mut places);
        let mut leases = vec![0u32; places.len()];
        for table in tables {
            for (at, &BlockId(block)) in table.blocks().iter().enumerate() {
                if at < table.shared() {
                    leases[block as usize] += 1;
                    if leases[block as usize] == 1 && self.tree.is_withdrawn(BlockId(block)) {
                        places[block as usize] += 1;
                    }
                } else {
                    places[block as usize] += 1;
                }
            }
        }
        assert_eq!(places[0], 0, "block 0 is scrap and is in use");
        for block in 1..places.len() {
            assert_eq!(
                places[block], 1,
                "block {block} is in {} places",
                places[block]
            );
            let id = BlockId(u32::try_from(block).expect("block ids are u32"));
            assert_eq!(
                self.tree.refs(id),
                leases[block],
                "leases of block {block} are miscounted"
            );
        }
    }

    fn withdraw(&mut self, block: BlockId) {
        if self.seeded.is(Mutation::WithdrawSkipped) {
            return;
        }
        let pool = &mut self.pool;
        self.tree
            .withdraw(block, |unleased| pool.give(unleased, Taint::Suspect));
    }
}
