//! Seeded mistakes. A build with feature `testing` can switch one on, to show that the referee,
//! the audit or the oracle would notice it; in every other build the question is a constant `false`.

/// One mistake each, named after what goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mutation {
    /// The pool hands a block out and keeps it.
    PoolKeepsTakenBlock,
    /// The pool drops every block given back.
    PoolLosesGivenBlock,
    /// A match may cover the whole length, so that nothing is left to compute.
    MatchCoversLastToken,
    /// A match ignores the parent of a block.
    MatchIgnoresParent,
    /// A lease is taken without counting it.
    LeaseNotCounted,
    /// A lease is given back without counting it.
    ReleaseNotCounted,
    /// Eviction takes the most recently used block, which may have descendants.
    EvictNewestFirst,
    /// A generated block is adopted before its last cell is written.
    AdoptBeforeFull,
    /// A key that exists is taken over by the newcomer's block.
    AdoptReplaces,
    /// A prompt chunk starts one token late.
    ChunkStartsLate,
    /// A prompt chunk samples although the prompt goes on.
    ChunkSamplesEarly,
    /// Growth is counted from the row's start, not its end.
    GrowthOneShort,
    /// A step may have one token more than its budget.
    BudgetIgnored,
    /// A step shares its own blocks although the backend cannot.
    ShareWithinStepForced,
    /// The oldest running sequence is preempted like any other.
    OldestIsVictim,
    /// Sequences are admitted in the plan that preempted one, and the returning need not fit.
    RecoveryUnguarded,
    /// The watermark is not kept free.
    WatermarkIgnored,
    /// A preempted sequence forgets its newest token.
    PreemptionForgetsToken,
    /// A slot is free the moment it is released.
    QuarantineSkipped,
    /// A slot is free one step before the last plan that names it retires.
    QuarantineOneStepShort,
    /// A result is matched by slot, not by the binding's generation.
    ZombieNotDropped,
    /// One token more than asked for.
    LengthOneMore,
    /// An ending id wins over the length.
    EndingBeforeLength,
    /// Blocks that may hold a NaN are reused as they are.
    DirtyBlockNotZeroed,
    /// The blocks of a sequence that drew a NaN stay in the tree.
    WithdrawSkipped,
    /// A prompt-logprob request takes a prefix match.
    LogprobsTakeMatch,
    /// A step tells log-probabilities of as many prompt tokens as it computes.
    ToldIgnored,
    /// After a reset the numbering goes on where it was.
    ResetKeepsNumbering,
    /// A binding's history misses its newest token.
    HistoryOneShort,
    /// A token that was drawn without its mask is taken.
    MissedMaskTaken,
    /// A mask may be missed for ever.
    MissedMaskForgiven,
    /// A prompt's last chunk waits for no mask.
    MaskNotWanted,
}

impl Mutation {
    /// Every mutation.
    pub const ALL: [Self; 32] = [
        Self::PoolKeepsTakenBlock,
        Self::PoolLosesGivenBlock,
        Self::MatchCoversLastToken,
        Self::MatchIgnoresParent,
        Self::LeaseNotCounted,
        Self::ReleaseNotCounted,
        Self::EvictNewestFirst,
        Self::AdoptBeforeFull,
        Self::AdoptReplaces,
        Self::ChunkStartsLate,
        Self::ChunkSamplesEarly,
        Self::GrowthOneShort,
        Self::BudgetIgnored,
        Self::ShareWithinStepForced,
        Self::OldestIsVictim,
        Self::RecoveryUnguarded,
        Self::WatermarkIgnored,
        Self::PreemptionForgetsToken,
        Self::QuarantineSkipped,
        Self::QuarantineOneStepShort,
        Self::ZombieNotDropped,
        Self::LengthOneMore,
        Self::EndingBeforeLength,
        Self::DirtyBlockNotZeroed,
        Self::WithdrawSkipped,
        Self::LogprobsTakeMatch,
        Self::ToldIgnored,
        Self::ResetKeepsNumbering,
        Self::HistoryOneShort,
        Self::MissedMaskTaken,
        Self::MissedMaskForgiven,
        Self::MaskNotWanted,
    ];
}

/// The mistake that is switched on, if any. Of size zero, and never set, without feature `testing`.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Seeded(#[cfg(feature = "testing")] Option<Mutation>);

// === impl Seeded ===

impl Seeded {
    /// Switches `mutation` on.
    #[cfg(feature = "testing")]
    pub(crate) fn with(mutation: Mutation) -> Self {
        Self(Some(mutation))
    }

    /// Whether `mutation` is switched on.
    #[cfg(feature = "testing")]
    pub(crate) fn is(self, mutation: Mutation) -> bool {
        self.0 == Some(mutation)
    }

    /// Never, in this build.
    #[cfg(not(feature = "testing"))]
    #[expect(clippy::unused_self, reason = "the signature of the testing build")]
    pub(crate) const fn is(self, _mutation: Mutation) -> bool {
        false
    }
}
