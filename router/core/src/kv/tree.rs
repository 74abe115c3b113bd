//! The prefix tree, flat: blocks have one size, so a map from (parent block, the block's tokens) to
//! a block is exact and no node is ever split.
//!
//! A block leaves the map only after all its descendants, because a key names its parent by id and
//! ids are reused. Eviction keeps that by the order of the LRU list alone: whoever leases a block
//! leases its ancestors, and a release goes from the deepest block up, so in the list of unleased
//! blocks a child always stands before its parent and the first is a leaf.

use std::hash::{Hash, Hasher};

use rustc_hash::{FxHashMap, FxHasher};

use crate::ids::{BlockId, BlockSize, Blocks, SeqId, StepId, TokenId};
use crate::kv::Taint;
use crate::mutation::{Mutation, Seeded};

/// Which cached blocks a sequence may lease.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Search {
    /// Not those that this step writes, when rows of one step cannot share (R5).
    pub(crate) not_of: Option<StepId>,
    /// Only those over which a token was drawn without a NaN (R10).
    pub(crate) proven_only: bool,
}

/// Where a block that is adopted comes from.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Origin {
    /// Who wrote it.
    pub(crate) writer: SeqId,
    /// The step that is being planned or committed.
    pub(crate) step: StepId,
    /// A token was drawn over it without a NaN.
    pub(crate) proven: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    /// Not the tree's business.
    Outside,
    /// In the map.
    Cached,
    /// No longer in the map, but still in the tables that had leased it.
    Withdrawn,
}

#[derive(Debug, Clone)]
struct Node {
    place: Place,
    parent: BlockId,
    hash: u64,
    /// Tables that hold it.
    refs: u32,
    writer: SeqId,
    /// The step that was being planned or committed when it was adopted.
    step: StepId,
    proven: bool,
    /// Neighbours in the list of unleased blocks; 0 is its end.
    older: BlockId,
    newer: BlockId,
}

/// Who is in the tree, who leases it, and which unleased block goes first.
#[derive(Debug)]
pub(crate) struct PrefixTree {
    /// By parent and hash of the tokens; a hit compares the tokens.
    map: FxHashMap<(BlockId, u64), BlockId>,
    nodes: Vec<Node>,
    /// Tokens of every block, flat.
    tokens: Vec<TokenId>,
    block_size: BlockSize,
    /// Ends of the list of unleased blocks.
    oldest: BlockId,
    newest: BlockId,
    unleased: u32,
    seeded: Seeded,
}

// === impl PrefixTree ===

impl PrefixTree {
    pub(crate) fn new(blocks: Blocks, block_size: BlockSize, seeded: Seeded) -> Self {
        let node = Node {
            place: Place::Outside,
            parent: BlockId(0),
            hash: 0,
            refs: 0,
            writer: SeqId(0),
            step: StepId(0),
            proven: false,
            older: BlockId(0),
            newer: BlockId(0),
        };
        Self {
            map: FxHashMap::default(),
            nodes: vec![node; blocks.0 as usize],
            tokens: vec![TokenId(0); blocks.0 as usize * block_size.tokens().0 as usize],
            block_size,
            oldest: BlockId(0),
            newest: BlockId(0),
            unleased: 0,
            seeded,
        }
    }

    /// Blocks in the tree.
    pub(crate) fn blocks(&self) -> Blocks {
        Blocks(u32::try_from(self.map.len()).expect("block ids are u32"))
    }

    /// Blocks in the tree that nobody leases.
    pub(crate) fn unleased(&self) -> Blocks {
        Blocks(self.unleased)
    }

    pub(crate) fn refs(&self, block: BlockId) -> u32 {
        self.node(block).refs
    }

    pub(crate) fn writer(&self, block: BlockId) -> SeqId {
        self.node(block).writer
    }

    pub(crate) fn is_withdrawn(&self, block: BlockId) -> bool {
        self.node(block).place == Place::Withdrawn
    }

    /// Whether the block may hold a NaN for all that is known.
    pub(crate) fn is_suspect(&self, block: BlockId) -> bool {
        !self.node(block).proven
    }

    pub(crate) fn prove(&mut self, block: BlockId) {
        self.node_mut(block).proven = true;
    }

    /// The block that holds `tokens` behind `parent`.
    pub(crate) fn get(
        &self,
        parent: BlockId,
        tokens: &[TokenId],
        search: Search,
    ) -> Option<BlockId> {
        let block = *self.map.get(&self.key(parent, tokens))?;
        let node = self.node(block);
        let allowed = (node.proven || !search.proven_only) && search.not_of != Some(node.step);
        (allowed && self.tokens_of(block) == tokens).then_some(block)
    }

    /// Counts one more table that holds `block`.
    pub(crate) fn lease(&mut self, block: BlockId) {
        if self.node(block).refs == 0 {
            self.unlink(block);
        }
        let counted = u32::from(!self.seeded.is(Mutation::LeaseNotCounted));
        self.node_mut(block).refs += counted;
    }

    /// Counts one table less; `true` when the block is withdrawn and this was the last, so that it
    /// goes back to the pool.
    pub(crate) fn unlease(&mut self, block: BlockId) -> bool {
        let seeded = self.seeded;
        let node = self.node_mut(block);
        assert!(
            node.refs > 0,
            "block {block} has no lease to give back; this is a router bug"
        );
        if seeded.is(Mutation::ReleaseNotCounted) && node.refs > 1 {
            return false;
        }
        node.refs -= 1;
        if node.refs > 0 {
            return false;
        }
        if node.place == Place::Withdrawn {
            node.place = Place::Outside;
            return true;
        }
        self.link_newest(block);
        false
    }

    /// Puts a block into the tree, leased by the table it comes from. `false` when the key exists:
    /// then the tree keeps its block.
    pub(crate) fn adopt(
        &mut self,
        parent: BlockId,
        tokens: &[TokenId],
        block: BlockId,
        by: Origin,
    ) -> bool {
        let key = self.key(parent, tokens);
        if self.map.contains_key(&key) && !self.seeded.is(Mutation::AdoptReplaces) {
            return false;
        }
        self.map.insert(key, block);
        let bs = tokens.len();
        self.tokens[block.0 as usize * bs..][..bs].copy_from_slice(tokens);
        let node = self.node_mut(block);
        debug_assert_eq!(node.place, Place::Outside);
        node.place = Place::Cached;
        node.parent = parent;
        node.hash = key.1;
        node.refs = 1;
        node.writer = by.writer;
        node.step = by.step;
        node.proven = by.proven;
        true
    }

    /// Takes the least recently used unleased block out of the tree.
    pub(crate) fn evict(&mut self) -> Option<(BlockId, Taint)> {
        let block = if self.seeded.is(Mutation::EvictNewestFirst) {
            self.newest
        } else {
            self.oldest
        };
        if block == BlockId(0) {
            return None;
        }
        self.unlink(block);
        self.unmap(block);
        let node = self.node_mut(block);
        node.place = Place::Outside;
        Some((
            block,
            if node.proven {
                Taint::Clean
            } else {
                Taint::Suspect
            },
        ))
    }

    /// Takes `block` and all its descendants out of the map, if it is there. Those without a lease
    /// are given to `unleased`; the others go back when their last table does. Costs a scan of the
    /// pool, which is fine for what follows a NaN.
    pub(crate) fn withdraw(&mut self, block: BlockId, mut unleased: impl FnMut(BlockId)) {
        if self.node(block).place != Place::Cached {
            return;
        }
        let below = self.descendants(block);
        for block in below {
            self.unmap(block);
            if self.refs(block) == 0 {
                self.unlink(block);
                self.node_mut(block).place = Place::Outside;
                unleased(block);
            } else {
                self.node_mut(block).place = Place::Withdrawn;
            }
        }
    }

    /// Counts the map's blocks into `places`; checks that every parent is in the map and that the
    /// list of unleased blocks is what its name says, children before parents.
    pub(crate) fn audit(&self, places: &mut [u32]) {
        for (key, &block) in &self.map {
            places[block.0 as usize] += 1;
            let node = self.node(block);
            assert_eq!(
                node.place,
                Place::Cached,
                "block {block} is in the map and not in the tree"
            );
            assert_eq!(
                (node.parent, node.hash),
                *key,
                "block {block} is under a wrong key"
            );
            let parent = self.node(node.parent);
            assert!(
                node.parent == BlockId(0) || parent.place == Place::Cached,
                "block {block} is in the map, its parent {} is not",
                node.parent
            );
            assert!(
                node.parent == BlockId(0) || parent.refs >= node.refs,
                "block {block} has more leases than its parent"
            );
        }
        let mut seen = vec![false; self.nodes.len()];
        let mut count = 0;
        let mut block = self.oldest;
        while block != BlockId(0) {
            let node = self.node(block);
            assert!(
                node.refs == 0,
                "block {block} is leased and in the list of unleased ones"
            );
            assert!(
                !seen[node.parent.0 as usize],
                "block {block} is younger than its parent"
            );
            seen[block.0 as usize] = true;
            count += 1;
            block = node.newer;
        }
        assert_eq!(count, self.unleased, "unleased blocks are miscounted");
        let unleased = self
            .map
            .values()
            .filter(|&&block| self.refs(block) == 0)
            .count();
        assert_eq!(
            unleased, self.unleased as usize,
            "an unleased block is not in the list"
        );
    }

    /// `block` and every block of the map below it.
    fn descendants(&self, block: BlockId) -> Vec<BlockId> {
        // None: not known yet. The root is no descendant.
        let mut below: Vec<Option<bool>> = vec![None; self.nodes.len()];
        below[0] = Some(false);
        below[block.0 as usize] = Some(true);
        let mut path = Vec::new();
        let mut found = Vec::new();
        for &block in self.map.values() {
            let mut at = block;
            while below[at.0 as usize].is_none() {
                assert!(
                    path.len() < self.nodes.len(),
                    "block {block} is its own ancestor"
                );
                path.push(at);
                at = self.node(at).parent;
            }
            let answer = below[at.0 as usize];
            for at in path.drain(..) {
                below[at.0 as usize] = answer;
            }
            if answer == Some(true) {
                found.push(block);
            }
        }
        // The map has no order, and what a scheduler does must not depend on it.
        found.sort_unstable();
        found
    }

    fn node(&self, block: BlockId) -> &Node {
        &self.nodes[block.0 as usize]
    }

    fn node_mut(&mut self, block: BlockId) -> &mut Node {
        &mut self.nodes[block.0 as usize]
    }

    fn tokens_of(&self, block: BlockId) -> &[TokenId] {
        let bs = self.block_size.tokens().0 as usize;
        &self.tokens[block.0 as usize * bs..][..bs]
    }

    fn key(&self, parent: BlockId, tokens: &[TokenId]) -> (BlockId, u64) {
        let parent = if self.seeded.is(Mutation::MatchIgnoresParent) {
            BlockId(0)
        } else {
            parent
        };
        let mut hasher = FxHasher::default();
        tokens.hash(&mut hasher);
        (parent, hasher.finish())
    }

    fn unmap(&mut self, block: BlockId) {
        let node = self.node(block);
        self.map.remove(&(node.parent, node.hash));
    }

    fn link_newest(&mut self, block: BlockId) {
        let newest = std::mem::replace(&mut self.newest, block);
        self.node_mut(block).older = newest;
        self.node_mut(block).newer = BlockId(0);
        if newest == BlockId(0) {
            self.oldest = block;
        } else {
            self.node_mut(newest).newer = block;
        }
        self.unleased += 1;
    }

    fn unlink(&mut self, block: BlockId) {
        let (older, newer) = (self.node(block).older, self.node(block).newer);
        if older == BlockId(0) {
            self.oldest = newer;
        } else {
            self.node_mut(older).newer = newer;
        }
        if newer == BlockId(0) {
            self.newest = older;
        } else {
            self.node_mut(newer).older = older;
        }
        self.unleased -= 1;
    }
}

#[cfg(test)]
mod tests;
