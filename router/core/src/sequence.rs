//! One sequence, from `admit` to its end: its tokens, its state, and every transition.

use std::ops::{Index, IndexMut};

use rustc_hash::FxHashMap;

use crate::event::FinishReason;
use crate::ids::{Generation, SeqId, SlotId, TokenId, Tokens};
use crate::kv::Taint;
use crate::kv::table::BlockTable;
use crate::request::Request;

/// What a sequence holds while it runs.
#[derive(Debug)]
pub(crate) struct Binding {
    pub(crate) slot: SlotId,
    pub(crate) generation: Generation,
    pub(crate) table: BlockTable,
    /// Cells that plans so far write: the next row starts here.
    pub(crate) planned: Tokens,
    /// Sampled rows in flight.
    pub(crate) in_flight: u32,
    /// Leading cells over which a token was drawn and it was a number.
    pub(crate) proven: Tokens,
}

/// Where a sequence is in its life. One that has ended is gone.
#[derive(Debug)]
pub(crate) enum SeqState {
    /// In the queue; holds nothing on the shards.
    Waiting,
    /// Tokens that are known are being computed, chunk by chunk.
    Prefilling(Binding),
    /// Every known token is planned; each row takes the slot's last token and draws the next.
    Decoding(Binding),
}

/// What a row of a sequence computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Phase {
    Prefill,
    Decode,
}

/// A sequence. Its tokens survive whatever happens on the shards.
#[derive(Debug)]
#[expect(clippy::struct_excessive_bools, reason = "each is a fact of its own")]
pub(crate) struct Sequence {
    pub(crate) id: SeqId,
    /// What was asked, but for the prompt's ids: they are the first of `tokens`.
    pub(crate) request: Request,
    prompt_len: Tokens,
    /// Prompt and committed tokens.
    pub(crate) tokens: Vec<TokenId>,
    pub(crate) state: SeqState,
    /// `Started` has been told.
    pub(crate) started: bool,
    /// It lost its blocks to others and waits to recover (R6).
    pub(crate) preempted: bool,
    /// It was sent back because of a NaN in a block that it leased, and leases only proven ones (R10).
    pub(crate) wary: bool,
    /// The mask of its next token was missed once (R7).
    pub(crate) mask_missed: bool,
    /// Prompt tokens whose log-probabilities have been told.
    pub(crate) logprobs_told: Tokens,
}

/// The sequences that have not ended.
#[derive(Debug, Default)]
pub(crate) struct Sequences {
    by_id: FxHashMap<SeqId, Sequence>,
}

// === impl Sequence ===

impl Sequence {
    pub(crate) fn new(id: SeqId, mut request: Request) -> Self {
        // One copy of a prompt, however many wait.
        let prompt = std::mem::take(&mut request.prompt);
        Self {
            id,
            prompt_len: count(prompt.len()),
            tokens: prompt.to_vec(),
            request,
            state: SeqState::Waiting,
            started: false,
            preempted: false,
            wary: false,
            mask_missed: false,
            logprobs_told: Tokens(0),
        }
    }

    /// Tokens known so far.
    pub(crate) fn len(&self) -> Tokens {
        count(self.tokens.len())
    }

    pub(crate) fn prompt_len(&self) -> Tokens {
        self.prompt_len
    }

    /// New tokens committed.
    pub(crate) fn generated(&self) -> u32 {
        self.len().0 - self.prompt_len().0
    }

    /// Whether log-probabilities of the prompt are still to be told: no prefix match then (R5).
    pub(crate) fn owes_logprobs(&self) -> bool {
        self.request.prompt_logprobs && self.logprobs_told < self.prompt_len()
    }

    /// Whether another row may draw a token: not beyond the last that was asked for.
    pub(crate) fn wants_decode(&self) -> bool {
        match &self.state {
            SeqState::Decoding(binding) => {
                self.generated() + binding.in_flight < self.request.tokens_max.0
            }
            SeqState::Waiting | SeqState::Prefilling(_) => false,
        }
    }

    pub(crate) fn binding(&self) -> Option<&Binding> {
        match &self.state {
            SeqState::Prefilling(binding) | SeqState::Decoding(binding) => Some(binding),
            SeqState::Waiting => None,
        }
    }

    /// The binding of a sequence that is known to run.
    pub(crate) fn running(&self) -> &Binding {
        self.binding()
            .expect("only running sequences are asked; this is a router bug")
    }

    /// The binding of a sequence that is known to run.
    pub(crate) fn running_mut(&mut self) -> &mut Binding {
        match &mut self.state {
            SeqState::Prefilling(binding) | SeqState::Decoding(binding) => binding,
            SeqState::Waiting => panic!("only running sequences are asked; this is a router bug"),
        }
    }

    pub(crate) fn is_prefilling(&self) -> bool {
        matches!(self.state, SeqState::Prefilling(_))
    }

    /// `Waiting` to `Prefilling`: a slot is bound, the table holds what the tree had.
    pub(crate) fn bind(&mut self, binding: Binding) {
        debug_assert!(matches!(self.state, SeqState::Waiting));
        self.state = SeqState::Prefilling(binding);
    }

    /// `Prefilling` to `Decoding`: the last known token is planned.
    pub(crate) fn prefilled(&mut self) {
        if let SeqState::Prefilling(binding) = std::mem::replace(&mut self.state, SeqState::Waiting)
        {
            self.state = SeqState::Decoding(binding);
        } else {
            panic!("only a prefilling sequence ends its prefill; this is a router bug");
        }
    }

    /// Back to `Waiting`, or to its end: gives up what it holds, if it holds anything.
    pub(crate) fn unbind(&mut self) -> Option<Binding> {
        match std::mem::replace(&mut self.state, SeqState::Waiting) {
            SeqState::Prefilling(binding) | SeqState::Decoding(binding) => Some(binding),
            SeqState::Waiting => None,
        }
    }

    /// Why the sequence ends with its newest token, if it does: length first, as in TGI.
    pub(crate) fn end(&self, ending_first: bool, more: u32) -> Option<FinishReason> {
        let last = self.tokens.last()?;
        let length = self.generated() >= self.request.tokens_max.0 + more;
        let ending = self.request.ending.contains(last);
        match (length, ending) {
            (true, true) if ending_first => Some(FinishReason::EndOfText),
            (true, _) => Some(FinishReason::Length),
            (false, true) => Some(FinishReason::EndOfText),
            (false, false) => None,
        }
    }
}

// === impl Binding ===

impl Binding {
    /// What is known of the cells when they are given back in good order. Without a drawn token
    /// nothing is; after one, only rows still in flight could spoil a cell, and those are watched.
    pub(crate) fn taint(&self) -> Taint {
        if self.proven == Tokens(0) {
            Taint::Suspect
        } else {
            Taint::Clean
        }
    }
}

// === impl Sequences ===

impl Sequences {
    pub(crate) fn len(&self) -> usize {
        self.by_id.len()
    }

    pub(crate) fn get(&self, seq: SeqId) -> Option<&Sequence> {
        self.by_id.get(&seq)
    }

    pub(crate) fn insert(&mut self, sequence: Sequence) {
        self.by_id.insert(sequence.id, sequence);
    }

    pub(crate) fn remove(&mut self, seq: SeqId) {
        self.by_id.remove(&seq);
    }

    /// All of them, in no order.
    pub(crate) fn iter_mut(&mut self) -> impl Iterator<Item = &mut Sequence> {
        self.by_id.values_mut()
    }
}

impl Index<SeqId> for Sequences {
    type Output = Sequence;

    fn index(&self, seq: SeqId) -> &Sequence {
        let sequence = self.by_id.get(&seq);
        sequence.expect("a sequence that waits or runs is known; this is a router bug")
    }
}

impl IndexMut<SeqId> for Sequences {
    fn index_mut(&mut self, seq: SeqId) -> &mut Sequence {
        let sequence = self.by_id.get_mut(&seq);
        sequence.expect("a sequence that waits or runs is known; this is a router bug")
    }
}

fn count(len: usize) -> Tokens {
    Tokens(u32::try_from(len).expect("a request is shorter than its limits"))
}
