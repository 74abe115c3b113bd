//! What came of a step: NaN rows first (R10), then tokens, in the order of the rows.

use std::ops::Range;

use crate::event::{FinishReason, PromptToken, SampledToken, SeqEvent};
use crate::ids::{BlockId, SeqId, StepId, TokenId, Tokens};
use crate::kv::{Adopter, Taint};
use crate::mutation::Mutation;
use crate::plan::{StepResult, result_flag};
use crate::scheduler::{PlannedRow, PlannedStep, Scheduler};
use crate::sequence::SeqState;

/// A result that contradicts the plan: the group is not to be trusted any more. Nothing was changed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CommitError {
    /// No plan is in flight.
    #[error("a result for step {got} came, and no plan is in flight")]
    NothingInFlight {
        /// The result's step.
        got: StepId,
    },
    /// Results come in the order of the plans (R1).
    #[error("a result for step {got} came, and step {expected} is next")]
    WrongStep {
        /// The oldest plan in flight.
        expected: StepId,
        /// The result's step.
        got: StepId,
    },
    /// Other rows than those that the plan samples.
    #[error("the result of step {step} is for other rows than the plan samples")]
    WrongRows {
        /// The step.
        step: StepId,
    },
    /// A column of the wrong length.
    #[error(
        "the result of step {step} has {len} entries in `{column}`; the plan asks for {expected}"
    )]
    WrongLength {
        /// The step.
        step: StepId,
        /// The column's name, as on the wire.
        column: &'static str,
        /// Its entries.
        len: usize,
        /// What there should be.
        expected: usize,
    },
    /// An id outside the vocabulary that is not flagged.
    #[error("row {row} of step {step} drew id {id}, outside the vocabulary of {vocab_size}")]
    UnknownToken {
        /// The step.
        step: StepId,
        /// The row.
        row: i32,
        /// The id.
        id: i32,
        /// Entries of the vocabulary.
        vocab_size: u32,
    },
    /// A mask was missed where none was wanted (R7).
    #[error("row {row} of step {step} missed a mask that it did not wait for")]
    UnexpectedMask {
        /// The step.
        step: StepId,
        /// The row.
        row: i32,
    },
}

// === impl Scheduler ===

impl Scheduler {
    /// Takes the result of the oldest plan in flight; what happened goes to `events`.
    pub fn commit(
        &mut self,
        result: &StepResult,
        events: &mut Vec<SeqEvent>,
    ) -> Result<(), CommitError> {
        let step = self
            .in_flight
            .front()
            .ok_or(CommitError::NothingInFlight { got: result.step })?;
        check(step, result, self.limits.vocab_size)?;
        let step = self.in_flight.pop_front().expect("its front was just read");
        events.append(&mut self.events);
        if result
            .row_flags
            .iter()
            .any(|flags| flags & result_flag::NAN != 0)
        {
            self.prove_all(&step, result);
            self.contain(&step, result, events);
        }
        self.take_back(&step, result, events);
        self.deliver(&step, result, events);
        self.slots.retire(step.step);
        self.spare_rows = step.rows;
        self.spare_rows.clear();
        Ok(())
    }

    /// Marks what the unflagged rows prove, before anything is decided about the flagged ones.
    fn prove_all(&mut self, step: &PlannedStep, result: &StepResult) {
        let sampled = step.rows.iter().filter(|row| row.sampled);
        for (row, flags) in sampled.zip(&result.row_flags) {
            if let (Some(seq), 0) = (self.owner(row), flags & result_flag::NAN) {
                self.prove(seq, row.end);
            }
        }
    }

    fn prove(&mut self, seq: SeqId, cells: Tokens) {
        let sequence = &mut self.sequences[seq];
        let binding = sequence.running_mut();
        self.kv.prove(&binding.table, binding.proven, cells);
        binding.proven = cells;
    }

    /// A bad number stays in its row (R10). A flagged sequence that wrote all its unproven blocks
    /// itself ends; one that leased such a block from another may be innocent, and computes them
    /// again by itself. The unproven blocks are withdrawn, and whoever runs on one goes back too.
    fn contain(&mut self, step: &PlannedStep, result: &StepResult, events: &mut Vec<SeqEvent>) {
        let (mut guilty, mut doubtful) = (Vec::new(), Vec::new());
        let mut suspects: Vec<BlockId> = Vec::new();
        let sampled = step.rows.iter().filter(|row| row.sampled);
        for (row, _) in sampled
            .zip(&result.row_flags)
            .filter(|(_, f)| *f & result_flag::NAN != 0)
        {
            let Some(seq) = self.owner(row) else {
                // Its blocks may have a new owner, if the row wrote one after they were proven.
                if self.kv.taint(row.tail, step.step) {
                    suspects.push(row.tail);
                }
                continue;
            };
            let table = &self.sequences[seq].running().table;
            let leans = self.kv.leans_on_unproven(table, seq);
            if leans { &mut doubtful } else { &mut guilty }.push(seq);
            self.kv.withdraw_unproven(table);
        }
        for seq in guilty {
            self.end(seq, FinishReason::Nan, Some(Taint::Suspect), events);
        }
        for seq in &doubtful {
            self.sequences[*seq].wary = true;
        }
        let hit = |seq: &&SeqId| {
            doubtful.contains(seq)
                || self
                    .kv
                    .is_hit(&self.sequences[**seq].running().table, &suspects)
        };
        let back: Vec<SeqId> = self.running.iter().filter(hit).copied().collect();
        for seq in back {
            self.requeue(seq, Some(Taint::Suspect));
            self.stats.requeued += 1;
        }
    }

    /// A row that missed its mask has drawn anything (R7): its sequence goes back and draws the token
    /// again, and ends if that mask is missed a second time.
    fn take_back(&mut self, step: &PlannedStep, result: &StepResult, events: &mut Vec<SeqEvent>) {
        let sampled = step.rows.iter().filter(|row| row.sampled);
        for (row, flags) in sampled.zip(&result.row_flags) {
            let missed = flags & result_flag::MASK_MISSED != 0;
            let Some(seq) = self.owner(row).filter(|_| missed) else {
                continue;
            };
            self.stats.masks_missed += 1;
            if self.seeded.is(Mutation::MissedMaskTaken) {
                continue;
            }
            // Its logits were numbers, or it would have ended.
            self.prove(seq, row.end);
            let again = std::mem::replace(&mut self.sequences[seq].mask_missed, true);
            if again && !self.seeded.is(Mutation::MissedMaskForgiven) {
                self.end(seq, FinishReason::MaskMissed, None, events);
            } else {
                self.requeue(seq, None);
            }
        }
    }

    fn deliver(&mut self, step: &PlannedStep, result: &StepResult, events: &mut Vec<SeqEvent>) {
        let (mut sampled, mut top, mut logprob) = (0, 0, 0);
        for row in &step.rows {
            let seq = self.owner(row);
            if row.logprobs {
                let own = logprob..logprob + row.len.0 as usize;
                logprob = own.end;
                if let Some(seq) = seq {
                    self.tell_logprobs(seq, row, &prompt_tokens(result, own), events);
                }
            }
            if !row.sampled {
                continue;
            }
            let count = usize::try_from(result.top_count[sampled]).unwrap_or(0);
            if let Some(seq) = seq {
                let token = SampledToken {
                    id: TokenId(result.token_id[sampled].cast_unsigned()),
                    logprob: result.logprob[sampled],
                    top: alternatives(result, top, count),
                };
                let by = Adopter {
                    seq,
                    step: step.step,
                    proven: row.end,
                };
                self.append(by, token, events);
            } else {
                let flagged = result.row_flags[sampled] != 0;
                self.stats.zombie_rows += u64::from(!flagged);
            }
            sampled += 1;
            top += count;
        }
    }

    /// One more token of a live sequence: the block that its row filled is shared from now on (R5),
    /// and it may be the last (R2).
    fn append(&mut self, by: Adopter, token: SampledToken, events: &mut Vec<SeqEvent>) {
        let (seq, written) = (by.seq, by.proven);
        let bs = self.limits.block_size.tokens().0;
        let (ending_first, more, early) = (
            self.seeded.is(Mutation::EndingBeforeLength),
            u32::from(self.seeded.is(Mutation::LengthOneMore)),
            u32::from(self.seeded.is(Mutation::AdoptBeforeFull) && !written.0.is_multiple_of(bs)),
        );
        let sequence = &mut self.sequences[seq];
        sequence.tokens.push(token.id);
        sequence.mask_missed = false;
        let end = sequence.end(ending_first, more);
        let full = ((written.0 + early) as usize).min(sequence.tokens.len());
        let SeqState::Decoding(binding) = &mut sequence.state else {
            panic!("a row that draws a token is its sequence's last chunk; this is a router bug");
        };
        binding.in_flight -= 1;
        self.kv.prove(&binding.table, binding.proven, written);
        binding.proven = written;
        self.kv
            .adopt(&mut binding.table, &sequence.tokens[..full], by);
        self.stats.generated_tokens += 1;
        events.push(SeqEvent::Token { seq, token });
        if let Some(reason) = end {
            self.end(seq, reason, None, events);
        }
    }

    /// Tells the log-probabilities of prompt tokens that have not been told: a preempted sequence
    /// computes some of them twice.
    fn tell_logprobs(
        &mut self,
        seq: SeqId,
        row: &PlannedRow,
        tokens: &[PromptToken],
        events: &mut Vec<SeqEvent>,
    ) {
        let sequence = &mut self.sequences[seq];
        let start = row.end.0 - row.len.0;
        let told = sequence.logprobs_told.0.max(start);
        let until = row.end.0.min(sequence.prompt_len().0);
        if told < until {
            let new = &tokens[(told - start) as usize..(until - start) as usize];
            sequence.logprobs_told = Tokens(until);
            events.push(SeqEvent::PromptLogprobs {
                seq,
                logprobs: new.to_vec(),
            });
        }
    }

    pub(super) fn owner(&self, row: &PlannedRow) -> Option<SeqId> {
        let seq = self.slots.owner(row.slot, row.generation);
        // Always so, but for a seeded mistake that matches results by sequence.
        seq.filter(|seq| {
            self.sequences
                .get(*seq)
                .is_some_and(|s| s.binding().is_some())
        })
    }
}

/// What a result says of the prompt tokens of a row.
fn prompt_tokens(result: &StepResult, own: Range<usize>) -> Vec<PromptToken> {
    own.map(|at| PromptToken {
        logprob: result.prompt_logprob[at],
        best: TokenId(result.prompt_best_token[at].cast_unsigned()),
        best_logprob: result.prompt_best_logprob[at],
    })
    .collect()
}

fn alternatives(result: &StepResult, from: usize, count: usize) -> Vec<(TokenId, f32)> {
    let ids = result.top_token_id[from..from + count].iter();
    let logprobs = &result.top_logprob[from..from + count];
    ids.zip(logprobs)
        .map(|(id, &logprob)| (TokenId(id.cast_unsigned()), logprob))
        .collect()
}

/// Compares a result with the plan it answers.
fn check(step: &PlannedStep, result: &StepResult, vocab_size: u32) -> Result<(), CommitError> {
    if step.step != result.step {
        return Err(CommitError::WrongStep {
            expected: step.step,
            got: result.step,
        });
    }
    let step_id = step.step;
    let sampled = (0i32..)
        .zip(&step.rows)
        .filter(|(_, row)| row.sampled)
        .map(|(i, _)| i);
    if !sampled.eq(result.row_index.iter().copied()) {
        return Err(CommitError::WrongRows { step: step_id });
    }
    let rows = result.row_index.len();
    let tops: usize = result
        .top_count
        .iter()
        .map(|&n| usize::try_from(n).unwrap_or(0))
        .sum();
    let logprobs = step
        .rows
        .iter()
        .filter(|row| row.logprobs)
        .map(|row| row.len.0 as usize)
        .sum();
    for (column, len, expected) in [
        ("token_id", result.token_id.len(), rows),
        ("row_flags", result.row_flags.len(), rows),
        ("logprob", result.logprob.len(), rows),
        ("top_count", result.top_count.len(), rows),
        ("top_token_id", result.top_token_id.len(), tops),
        ("top_logprob", result.top_logprob.len(), tops),
        ("prompt_logprob", result.prompt_logprob.len(), logprobs),
        (
            "prompt_best_token",
            result.prompt_best_token.len(),
            logprobs,
        ),
        (
            "prompt_best_logprob",
            result.prompt_best_logprob.len(),
            logprobs,
        ),
    ] {
        if len != expected {
            return Err(CommitError::WrongLength {
                step: step_id,
                column,
                len,
                expected,
            });
        }
    }
    let masked = step.rows.iter().filter(|row| row.sampled);
    let masked = masked.map(|row| row.masked);
    for (((&row, &id), &flags), masked) in result
        .row_index
        .iter()
        .zip(&result.token_id)
        .zip(&result.row_flags)
        .zip(masked)
    {
        if flags & result_flag::MASK_MISSED != 0 && !masked {
            return Err(CommitError::UnexpectedMask { step: step_id, row });
        }
        let known = u32::try_from(id).is_ok_and(|id| id < vocab_size);
        if !known && flags & result_flag::NAN == 0 {
            return Err(CommitError::UnknownToken {
                step: step_id,
                row,
                id,
                vocab_size,
            });
        }
    }
    Ok(())
}
