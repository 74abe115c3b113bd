//! Slots: the rows of per-sequence state on the shards, with quarantine (R4).
//!
//! A slot whose sequence has left is free again only when every plan that names it in a row has
//! retired. An entry of the side pool for sampling state lives exactly as long as its slot.

use crate::ids::{Generation, SeqId, SlotId, StateSlot, StepId};
use crate::mutation::{Mutation, Seeded};

/// What a bind gives.
#[derive(Debug, Clone, Copy)]
pub(crate) struct BoundSlot {
    pub(crate) slot: SlotId,
    pub(crate) generation: Generation,
    pub(crate) state_slot: StateSlot,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum SlotState {
    Free,
    Bound(SeqId),
    /// Its sequence has left; rows of it are in flight.
    Quarantine(SeqId),
}

#[derive(Debug)]
struct Slot {
    state: SlotState,
    generation: Generation,
    /// The last plan with a row of this slot.
    named: Option<StepId>,
    /// Its entry of the side pool for sampling state.
    side: Option<StateSlot>,
}

/// All slots of the group.
#[derive(Debug)]
pub(crate) struct SlotPool {
    slots: Vec<Slot>,
    free: Vec<SlotId>,
    quarantine: Vec<SlotId>,
    state_free: Vec<StateSlot>,
    state_slots: u32,
    /// Every plan before this one has retired.
    open: StepId,
    seeded: Seeded,
}

// === impl SlotPool ===

impl SlotPool {
    /// `slots` free slots; plans are numbered from `first_step`.
    pub(crate) fn new(slots: u32, state_slots: u32, first_step: StepId, seeded: Seeded) -> Self {
        let slot = || Slot {
            state: SlotState::Free,
            generation: Generation(0),
            named: None,
            side: None,
        };
        Self {
            slots: (0..slots).map(|_| slot()).collect(),
            free: (0..slots).rev().map(SlotId).collect(),
            quarantine: Vec::new(),
            state_free: (0..state_slots).rev().map(StateSlot).collect(),
            state_slots,
            open: first_step,
            seeded,
        }
    }

    /// Whether a bind would succeed. A pool of no side entries is one the shards do without.
    pub(crate) fn can_bind(&self, needs_state: bool) -> bool {
        let state = !needs_state || self.state_slots == 0 || !self.state_free.is_empty();
        state && !self.free.is_empty()
    }

    /// Binds a free slot to `seq`, under a new generation.
    pub(crate) fn bind(&mut self, seq: SeqId, needs_state: bool) -> BoundSlot {
        let slot = self
            .free
            .pop()
            .expect("the planner asks can_bind first; this is a router bug");
        let state_slot = if needs_state {
            self.state_free.pop()
        } else {
            None
        };
        let entry = &mut self.slots[slot.0 as usize];
        debug_assert_eq!(entry.state, SlotState::Free);
        entry.state = SlotState::Bound(seq);
        entry.generation.0 += 1;
        entry.named = None;
        entry.side = state_slot;
        BoundSlot {
            slot,
            generation: entry.generation,
            state_slot: state_slot.unwrap_or_default(),
        }
    }

    /// Notes that plan `step` has a row of `slot`.
    pub(crate) fn name(&mut self, slot: SlotId, step: StepId) {
        self.slots[slot.0 as usize].named = Some(step);
    }

    /// Who holds `slot` under this generation; `None` for a zombie (R3, R6).
    pub(crate) fn owner(&self, slot: SlotId, generation: Generation) -> Option<SeqId> {
        let entry = &self.slots[slot.0 as usize];
        match entry.state {
            SlotState::Bound(seq) if entry.generation == generation => Some(seq),
            SlotState::Quarantine(seq) if self.seeded.is(Mutation::ZombieNotDropped) => Some(seq),
            SlotState::Bound(_) | SlotState::Free | SlotState::Quarantine(_) => None,
        }
    }

    /// Who holds `slot` now.
    #[cfg(feature = "testing")]
    pub(crate) fn holder(&self, slot: SlotId) -> Option<(SeqId, Generation)> {
        let entry = &self.slots[slot.0 as usize];
        match entry.state {
            SlotState::Bound(seq) => Some((seq, entry.generation)),
            SlotState::Free | SlotState::Quarantine(_) => None,
        }
    }

    /// Takes `slot` from its sequence: to quarantine while a plan that names it is in flight.
    pub(crate) fn release(&mut self, slot: SlotId) {
        let entry = &mut self.slots[slot.0 as usize];
        let SlotState::Bound(seq) = entry.state else {
            panic!("slot {slot} is released but not bound; this is a router bug");
        };
        let in_flight = entry.named.is_some_and(|step| step >= self.open);
        if in_flight && !self.seeded.is(Mutation::QuarantineSkipped) {
            entry.state = SlotState::Quarantine(seq);
            self.quarantine.push(slot);
        } else {
            self.set_free(slot);
        }
    }

    /// Plan `step` has retired: slots that no later plan names are free.
    pub(crate) fn retire(&mut self, step: StepId) {
        self.open = step.next();
        let open = if self.seeded.is(Mutation::QuarantineOneStepShort) {
            self.open.next()
        } else {
            self.open
        };
        let mut i = 0;
        while i < self.quarantine.len() {
            let slot = self.quarantine[i];
            if self.slots[slot.0 as usize]
                .named
                .is_some_and(|named| named >= open)
            {
                i += 1;
            } else {
                self.quarantine.remove(i);
                self.set_free(slot);
            }
        }
    }

    /// Slots in quarantine, and the step each waits for.
    #[cfg(feature = "testing")]
    pub(crate) fn quarantined(&self) -> impl Iterator<Item = (SlotId, StepId)> {
        self.quarantine.iter().map(|&slot| {
            let named = self.slots[slot.0 as usize].named;
            (
                slot,
                named.expect("only a named slot is quarantined; this is a router bug"),
            )
        })
    }

    /// Recounts: every slot in one place, every side entry too.
    pub(crate) fn audit(&self, running: usize) {
        let bound = self
            .slots
            .iter()
            .filter(|s| matches!(s.state, SlotState::Bound(_)))
            .count();
        assert_eq!(bound, running, "bound slots and running sequences differ");
        assert_eq!(
            self.free.len() + self.quarantine.len() + bound,
            self.slots.len(),
            "a slot is in no place or in two"
        );
        let lent = self.slots.iter().filter(|s| s.side.is_some()).count();
        assert_eq!(
            lent + self.state_free.len(),
            self.state_slots as usize,
            "an entry of the sampling state pool is lost"
        );
    }

    fn set_free(&mut self, slot: SlotId) {
        let entry = &mut self.slots[slot.0 as usize];
        entry.state = SlotState::Free;
        self.state_free.extend(entry.side.take());
        self.free.push(slot);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slot_is_free_when_the_last_plan_that_names_it_retires() {
        let mut slots = SlotPool::new(1, 0, StepId(0), Seeded::default());
        let bound = slots.bind(SeqId(1), false);
        slots.name(bound.slot, StepId(0));
        slots.name(bound.slot, StepId(1));
        slots.release(bound.slot);
        assert_eq!(slots.owner(bound.slot, bound.generation), None);
        slots.retire(StepId(0));
        assert!(!slots.can_bind(false));
        slots.retire(StepId(1));
        let again = slots.bind(SeqId(2), false);
        assert_eq!((again.slot, again.generation), (bound.slot, Generation(2)));
        assert_eq!(slots.owner(bound.slot, bound.generation), None);
        assert_eq!(slots.owner(again.slot, again.generation), Some(SeqId(2)));
    }

    #[test]
    fn sampling_state_lives_as_long_as_its_slot() {
        let mut slots = SlotPool::new(3, 1, StepId(0), Seeded::default());
        let first = slots.bind(SeqId(1), true);
        slots.name(first.slot, StepId(0));
        assert!(slots.can_bind(false) && !slots.can_bind(true));
        slots.release(first.slot);
        assert!(!slots.can_bind(true), "a row that uses it is in flight");
        slots.retire(StepId(0));
        assert!(slots.can_bind(true));
        slots.audit(0);
    }

    #[test]
    fn shards_without_a_side_pool_take_anybody() {
        assert!(SlotPool::new(1, 0, StepId(0), Seeded::default()).can_bind(true));
    }
}
