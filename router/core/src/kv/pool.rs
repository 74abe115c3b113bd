//! The free list.

use crate::ids::{BlockId, Blocks, StepId};
use crate::kv::Taint;
use crate::mutation::{Mutation, Seeded};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    Free(Taint),
    Taken,
}

/// Free blocks, last given first taken.
#[derive(Debug)]
pub(crate) struct BlockPool {
    free: Vec<BlockId>,
    places: Vec<Place>,
    /// The plan that last had the block zeroed.
    zeroed: Vec<StepId>,
    seeded: Seeded,
}

// === impl BlockPool ===

impl BlockPool {
    /// All of `blocks` free but block 0, which is scrap.
    pub(crate) fn new(blocks: Blocks, seeded: Seeded) -> Self {
        let mut places = vec![Place::Free(Taint::Clean); blocks.0 as usize];
        if let Some(scrap) = places.first_mut() {
            *scrap = Place::Taken;
        }
        Self {
            free: (1..blocks.0).rev().map(BlockId).collect(),
            zeroed: vec![StepId(0); places.len()],
            places,
            seeded,
        }
    }

    pub(crate) fn free(&self) -> Blocks {
        Blocks(u32::try_from(self.free.len()).expect("block ids are u32"))
    }

    pub(crate) fn is_free(&self, block: BlockId) -> bool {
        self.places[block.0 as usize] != Place::Taken
    }

    /// Takes a block; whoever asks has counted first.
    pub(crate) fn take(&mut self) -> (BlockId, Taint) {
        let block = if self.seeded.is(Mutation::PoolKeepsTakenBlock) {
            self.free.last().copied()
        } else {
            self.free.pop()
        };
        let block = block.expect("blocks are counted before they are taken; this is a router bug");
        match std::mem::replace(&mut self.places[block.0 as usize], Place::Taken) {
            Place::Free(taint) => (block, taint),
            Place::Taken => (block, Taint::Clean),
        }
    }

    /// Gives a block back.
    pub(crate) fn give(&mut self, block: BlockId, taint: Taint) {
        if self.seeded.is(Mutation::PoolLosesGivenBlock) {
            return;
        }
        let place = &mut self.places[block.0 as usize];
        assert_eq!(
            *place,
            Place::Taken,
            "block {block} is given back twice; this is a router bug"
        );
        *place = Place::Free(taint);
        self.free.push(block);
    }

    /// Notes that plan `step` has the block zeroed.
    pub(crate) fn zeroed(&mut self, block: BlockId, step: StepId) {
        self.zeroed[block.0 as usize] = step;
    }

    /// A row of plan `step` wrote a NaN into `block`: a free one is marked, one that a later plan
    /// zeroes is clean. `true` when neither is so.
    pub(crate) fn taint(&mut self, block: BlockId, step: StepId) -> bool {
        if self.zeroed[block.0 as usize] > step {
            return false;
        }
        let free = self.is_free(block);
        if free {
            self.places[block.0 as usize] = Place::Free(Taint::Suspect);
        }
        !free
    }

    /// For every block, how often the free list holds it.
    pub(crate) fn audit(&self) -> Vec<u32> {
        let mut places = vec![0; self.places.len()];
        for block in &self.free {
            places[block.0 as usize] += 1;
        }
        places
    }
}
