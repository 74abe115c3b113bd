//! A small world: a scheduler, the referee, clients that come and go, shards that die and numbers
//! that are none. It is driven by a source of choices, so a random generator and a property-testing
//! library can both play it, and it panics with a sentence when a promise is broken.

mod choices;

use std::collections::{BTreeMap, VecDeque};

pub use self::choices::{Choices, limits, request};
use self::choices::{END, VOCAB, allowance};
use crate::budget::PromptAllowance;
use crate::event::{FinishReason, PromptToken, SeqEvent};
use crate::ids::{Blocks, Generation, SeqId, SlotId, StepId, TokenId, Tokens};
use crate::limits::Limits;
use crate::mutation::Mutation;
use crate::plan::{StepPlan, result_flag, row_flag};
use crate::request::{Request, RequestSpec};
use crate::scheduler::{Scheduler, Stats};
use crate::testing::symbolic::{Fault, Model, Referee};

/// What a client asked and what it got.
#[derive(Debug)]
struct Client {
    spec: RequestSpec,
    expected: (Vec<TokenId>, FinishReason),
    logprobs: Vec<PromptToken>,
    started: bool,
    tokens: usize,
    told: usize,
    /// A fault was injected into one of its rows.
    faulted: bool,
    /// Masks that are still to be missed, and those that were since the last token.
    misses_to_come: u32,
    missed: u32,
    /// Ended from outside, or by limits that shrank.
    outside: Option<FinishReason>,
    finished: Option<FinishReason>,
}

/// A row in flight, and whose it was when it was planned.
#[derive(Debug, Clone, Copy)]
struct Planned {
    row: usize,
    slot: SlotId,
    holder: (SeqId, Generation),
    masked: bool,
}

/// Who looks for mistakes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Watch {
    /// The referee, the clients, and an audit after every move.
    All,
    /// The referee and the clients alone: what a mistake does, not what it leaves in the books.
    NoAudit,
}

/// Scheduler, referee and clients.
#[derive(Debug)]
pub struct World {
    limits: Limits,
    model: Model,
    scheduler: Scheduler,
    referee: Referee,
    clients: BTreeMap<SeqId, Client>,
    in_flight: VecDeque<Vec<Planned>>,
    /// What the prompt tokens of the next plans may cost.
    allowance: PromptAllowance,
    events: Vec<SeqEvent>,
    steps: u64,
    watch: Watch,
}

/// Plays `rounds` random moves and then lets everything end.
///
/// # Panics
/// When a promise is broken.
pub fn play(choices: &mut Choices, rounds: u32, watch: Watch, mutation: Option<Mutation>) -> Stats {
    let limits = limits(choices);
    let rate = choices.between(4, 40);
    let mut world = World::new(
        limits,
        Model::new(VOCAB).with_end_of_text(END, rate),
        mutation,
    );
    world.watch = watch;
    for _ in 0..rounds {
        world.act(choices);
    }
    world.drain();
    world.stats()
}

// === impl World ===

impl World {
    /// An empty world, with a mistake in its scheduler if told.
    #[must_use]
    pub fn new(limits: Limits, model: Model, mutation: Option<Mutation>) -> Self {
        let scheduler = match mutation {
            Some(mutation) => Scheduler::with_mutation(limits.clone(), mutation),
            None => Scheduler::new(limits.clone()),
        };
        Self {
            referee: Referee::new(&limits, model, StepId(0)),
            limits,
            model,
            scheduler,
            clients: BTreeMap::new(),
            in_flight: VecDeque::new(),
            allowance: PromptAllowance::UNLIMITED,
            events: Vec::new(),
            steps: 0,
            watch: Watch::All,
        }
    }

    /// One random move.
    pub fn act(&mut self, choices: &mut Choices) {
        match choices.below(32) {
            0..12 => {
                if choices.one_in(8) {
                    self.allowance = allowance(choices);
                }
                self.plan();
            }
            12..22 => _ = self.commit(),
            22..25 => self.admit(request(choices)),
            25..27 => self.reply(choices),
            27..29 => self.finish(choices),
            29..31 if choices.one_in(3) => self.hold_masks(choices),
            29..31 => self.fault(choices),
            _ => {
                if choices.one_in(4) {
                    self.lose(choices);
                }
            }
        }
    }

    /// Admits a request if the limits let it pass.
    pub fn admit(&mut self, spec: RequestSpec) {
        let Ok(request) = Request::new(spec.clone(), &self.limits) else {
            return;
        };
        let tokens_max = request.tokens_max();
        let Ok(seq) = self.scheduler.admit(request) else {
            assert!(
                self.scheduler.stats().waiting >= self.limits.queue_max,
                "refused with room"
            );
            return;
        };
        let client = Client {
            expected: self.model.generate(&spec, tokens_max),
            logprobs: self.model.prompt_logprobs(&spec.prompt),
            spec,
            started: false,
            tokens: 0,
            told: 0,
            faulted: false,
            misses_to_come: 0,
            missed: 0,
            outside: None,
            finished: None,
        };
        assert!(
            self.clients.insert(seq, client).is_none(),
            "sequence {seq} is admitted twice"
        );
        self.audit();
    }

    /// Plans a step if there is one.
    pub fn plan(&mut self) -> bool {
        let before = self.scheduler.stats();
        let oldest = self.scheduler.running().next();
        let plan = self.scheduler.plan_within(&self.allowance);
        self.audit();
        let stats = self.scheduler.stats();
        let preempted = stats.preemptions > before.preemptions;
        if let (true, Some(oldest)) = (preempted, oldest) {
            let spared = self.scheduler.running().any(|seq| seq == oldest);
            assert!(spared, "R6: the oldest running sequence was preempted");
        }
        let Some(plan) = plan else {
            let waits = stats.running + stats.waiting > 0;
            assert!(
                stats.in_flight > 0 || !waits,
                "nothing runs and nothing is planned: {stats:?}"
            );
            return false;
        };
        self.check_admissions(&plan, preempted);
        self.check_cost(&plan);
        let rows = plan.row_slot.iter().enumerate();
        let planned = rows.map(|(row, &slot)| {
            let slot = SlotId(slot.cast_unsigned());
            let holder = self
                .scheduler
                .holder(slot)
                .expect("a planned row has a sequence");
            let flags = plan.row_flags[row];
            let masked = flags & row_flag::MASKED != 0;
            let wanted = self.clients[&holder.0].spec.masked && flags & row_flag::SAMPLE != 0;
            assert_eq!(masked, wanted, "R7: row {row} of {plan:?}");
            Planned {
                row,
                slot,
                holder,
                masked,
            }
        });
        self.in_flight.push_back(planned.collect());
        self.check_masked();
        self.referee.receive(plan);
        true
    }

    /// Executes and commits the oldest step in flight, if there is one.
    pub fn commit(&mut self) -> bool {
        self.miss_masks();
        let Some(result) = self.referee.step() else {
            return false;
        };
        let rows = self
            .in_flight
            .pop_front()
            .expect("the referee has what was planned");
        for (&row, flags) in result.row_index.iter().zip(&result.row_flags) {
            let planned = rows[row.cast_unsigned() as usize];
            let live = self.scheduler.holder(planned.slot) == Some(planned.holder);
            if live && flags & result_flag::NAN != 0 {
                self.referee.condemn(planned.slot);
            }
            if live && flags & result_flag::MASK_MISSED != 0 {
                self.client(planned.holder.0).missed += 1;
            }
        }
        self.steps += 1;
        self.scheduler
            .commit(&result, &mut self.events)
            .expect("the referee answers the plan");
        self.hear();
        let patient = |client: &Client| client.finished.is_some() || client.missed < 3;
        let patient = self.clients.values().all(patient);
        assert!(patient, "R7: a mask may be missed for ever");
        true
    }

    /// Lets everything that was asked come to its end.
    pub fn drain(&mut self) {
        let lengths = self
            .clients
            .values()
            .filter(|client| client.finished.is_none());
        let work: usize = lengths
            .map(|c| c.spec.prompt.len() + c.expected.0.len())
            .sum();
        let until = self.steps + 20 * work as u64 + 100;
        while !self.scheduler.is_idle() {
            while self.plan() {}
            self.commit();
            assert!(self.steps < until, "a finite workload does not end");
        }
        for (seq, client) in &self.clients {
            assert!(client.finished.is_some(), "sequence {seq} never ended");
        }
        let stats = self.scheduler.stats();
        assert_eq!(
            stats.blocks_free,
            self.limits.blocks_usable().0,
            "blocks are lost: {stats:?}"
        );
    }

    fn audit(&self) {
        if self.watch == Watch::All {
            self.scheduler.audit();
        }
    }

    /// The scheduler's books.
    #[must_use]
    pub fn stats(&self) -> Stats {
        self.scheduler.stats()
    }

    /// R6: what may be admitted, recounted from outside.
    fn check_admissions(&self, plan: &StepPlan, preempted: bool) {
        if plan.bindings.is_empty() {
            return;
        }
        assert!(
            !preempted,
            "R6: a sequence was admitted in the plan that preempted one"
        );
        let fresh = plan.bindings.iter().any(|binding| {
            let holder = self.scheduler.holder(binding.slot);
            let (seq, _) = holder.expect("a bound slot has a sequence");
            !self.clients[&seq].started
        });
        let stats = self.scheduler.stats();
        let kept = stats.blocks_free >= self.limits.watermark.0;
        assert!(
            !fresh || stats.running < 2 || kept,
            "R6: the watermark was not kept free: {stats:?}"
        );
    }

    /// Prompt tokens beyond those that are granted are paid for.
    fn check_cost(&self, plan: &StepPlan) {
        let (mut cost, mut tokens) = (0.0, 0);
        for (row, &flags) in plan.row_flags.iter().enumerate() {
            if flags & row_flag::FROM_SLOT == 0 {
                let [start, len] = [plan.row_start[row], plan.row_len[row]];
                let [start, len] = [start, len].map(|n| Tokens(n.cast_unsigned()));
                cost += self.allowance.cost(start, len);
                tokens += len.0;
            }
        }
        let of = &self.allowance;
        let granted = tokens <= of.tokens_min.0.max(1);
        assert!(
            granted || cost <= of.cost_max * (1.0 + 1e-9) && tokens <= of.tokens_max.0,
            "{tokens} prompt tokens cost {cost}, which is more than {of:?}"
        );
    }

    /// Ends a random sequence from outside.
    fn finish(&mut self, choices: &mut Choices) {
        let alive: Vec<SeqId> = self.alive().collect();
        if alive.is_empty() {
            return;
        }
        let seq = alive[choices.below(column(alive.len())) as usize];
        let reasons = [
            FinishReason::StopText,
            FinishReason::Cancelled,
            FinishReason::Deadline,
        ];
        let reason = reasons[choices.below(3) as usize];
        self.client(seq).outside = Some(reason);
        self.scheduler.finish(seq, reason, &mut self.events);
        self.hear();
    }

    /// A client goes on from what it was told: the next turn of a conversation.
    fn reply(&mut self, choices: &mut Choices) {
        let mut spec = request(choices);
        if !self.clients.is_empty() {
            let last = choices.below(column(self.clients.len()).min(4)) as usize;
            let client = self
                .clients
                .values()
                .nth_back(last)
                .expect("there are as many");
            let told = client
                .expected
                .0
                .iter()
                .take(client.tokens + choices.below(3) as usize);
            let mut prompt: Vec<TokenId> = client.spec.prompt.iter().chain(told).copied().collect();
            prompt.extend(spec.prompt.iter().rev().take(2));
            spec.prompt = prompt;
        }
        self.admit(spec);
    }

    /// Makes a row of the next step go wrong.
    fn fault(&mut self, choices: &mut Choices) {
        let Some(rows) = self.in_flight.front() else {
            return;
        };
        let planned = rows[choices.below(column(rows.len())) as usize];
        let fault = if choices.one_in(3) {
            Fault::Logits
        } else {
            Fault::Cells
        };
        self.referee.inject(planned.row, fault);
        self.client(planned.holder.0).faulted = true;
    }

    /// Some masks of a sequence will not come.
    fn hold_masks(&mut self, choices: &mut Choices) {
        let alive: Vec<SeqId> = self.alive().collect();
        if !alive.is_empty() {
            let seq = alive[choices.below(column(alive.len())) as usize];
            self.client(seq).misses_to_come = choices.between(1, 4);
        }
    }

    /// The next step's masks that do not come.
    fn miss_masks(&mut self) {
        let Some(rows) = self.in_flight.front() else {
            return;
        };
        for planned in rows.iter().filter(|planned| planned.masked) {
            let client = self.clients.get_mut(&planned.holder.0);
            let client = client.expect("only admitted sequences are planned");
            if client.misses_to_come > 0 {
                client.misses_to_come -= 1;
                self.referee.inject(planned.row, Fault::Mask);
            }
        }
    }

    /// R7: who waits for a mask, and for which.
    fn check_masked(&self) {
        let rows = self.in_flight.back().expect("a plan was just made");
        let mut told = Vec::new();
        let any = self.scheduler.masked_rows(&mut told);
        let masked: Vec<&Planned> = rows.iter().filter(|planned| planned.masked).collect();
        assert_eq!(any, !masked.is_empty(), "R7: masks are wanted");
        assert_eq!(told.len(), masked.len(), "R7: {told:?}");
        for (told, planned) in told.iter().zip(masked) {
            let (seq, known) = (planned.holder.0, self.clients[&planned.holder.0].tokens);
            assert_eq!(
                (told.row, told.seq),
                (column(planned.row).cast_signed(), seq)
            );
            let ahead = self.in_flight.iter().flatten();
            let ahead = ahead.filter(|row| {
                (row.slot, row.holder) == (planned.slot, planned.holder) && row.masked
            });
            let after = known + ahead.count() - 1;
            assert_eq!(told.after as usize, after, "R7: the mask of another token");
        }
    }

    /// The group is lost, and another of perhaps another size takes its place.
    fn lose(&mut self, choices: &mut Choices) {
        let first = StepId(1000 * self.steps + u64::from(choices.below(5)));
        if choices.one_in(2) {
            self.limits.blocks = Blocks(choices.between(3, 28));
        }
        let tokens_max = self.limits.sequence_tokens_max();
        for client in self
            .clients
            .values_mut()
            .filter(|client| client.finished.is_none())
        {
            let new = client.spec.tokens_max.map_or(0, |tokens| tokens.0);
            if column(client.spec.prompt.len()) + new > tokens_max.0 {
                client.outside = Some(FinishReason::GroupLost);
            }
        }
        self.referee = Referee::new(&self.limits, self.model, first);
        self.in_flight.clear();
        let mut events = self.scheduler.reset(self.limits.clone(), first);
        self.events.append(&mut events);
        self.hear();
    }

    /// Compares what clients are told with the oracle.
    fn hear(&mut self) {
        self.audit();
        for event in std::mem::take(&mut self.events) {
            match event {
                SeqEvent::Started { seq, cached, .. } => {
                    let client = self.listener(seq);
                    assert!(
                        !std::mem::replace(&mut client.started, true),
                        "{seq} starts twice"
                    );
                    assert!(
                        (cached as usize) < client.spec.prompt.len(),
                        "nothing left to compute"
                    );
                    assert!(
                        !client.spec.prompt_logprobs || cached == 0,
                        "R5: logprobs take no match"
                    );
                }
                SeqEvent::PromptLogprobs { seq, logprobs } => {
                    let client = self.listener(seq);
                    let expected = &client.logprobs[client.told..][..logprobs.len()];
                    // By their bits: nothing equals NaN.
                    let bits =
                        |t: &PromptToken| (t.logprob.to_bits(), t.best, t.best_logprob.to_bits());
                    let same = |(a, b): (&PromptToken, &PromptToken)| bits(a) == bits(b);
                    // A fault in a chunk that draws nothing shows later, when a token is drawn.
                    let right = client.faulted || expected.iter().zip(&logprobs).all(same);
                    client.told += logprobs.len();
                    assert!(right, "sequence {seq} is told wrong prompt logprobs");
                }
                SeqEvent::Token { seq, token } => {
                    let client = self.listener(seq);
                    let expected = client.expected.0.get(client.tokens).copied();
                    assert_eq!(
                        Some(token.id),
                        expected,
                        "sequence {seq} draws another token"
                    );
                    assert_eq!(
                        token.top.len(),
                        client.spec.sampling.top_n as usize,
                        "alternatives"
                    );
                    client.tokens += 1;
                    client.missed = 0;
                }
                SeqEvent::Finished { seq, reason } => self.hear_end(seq, reason),
            }
        }
    }

    fn hear_end(&mut self, seq: SeqId, reason: FinishReason) {
        let client = self.listener(seq);
        match reason {
            FinishReason::EndOfText | FinishReason::Length => {
                let heard = (client.tokens, reason);
                assert_eq!(
                    heard,
                    (client.expected.0.len(), client.expected.1),
                    "{seq} ends wrong"
                );
                let told = if client.spec.prompt_logprobs {
                    client.spec.prompt.len()
                } else {
                    0
                };
                assert_eq!(client.told, told, "sequence {seq} misses prompt logprobs");
            }
            FinishReason::Nan => {
                assert!(
                    client.faulted,
                    "R10: sequence {seq} fails for another's NaN"
                );
            }
            FinishReason::MaskMissed => {
                assert!(client.missed >= 2, "R7: sequence {seq} fails too soon");
            }
            FinishReason::StopText
            | FinishReason::Cancelled
            | FinishReason::Deadline
            | FinishReason::GrammarFailed
            | FinishReason::GroupLost => {
                assert_eq!(
                    client.outside,
                    Some(reason),
                    "sequence {seq} ends for no reason"
                );
            }
        }
        client.finished = Some(reason);
    }

    fn client(&mut self, seq: SeqId) -> &mut Client {
        self.clients
            .get_mut(&seq)
            .expect("only admitted sequences are heard of")
    }

    /// The client of a sequence that something is told of: so it has not ended.
    fn listener(&mut self, seq: SeqId) -> &mut Client {
        let client = self.client(seq);
        assert!(
            client.finished.is_none(),
            "sequence {seq} has ended and is heard of again"
        );
        client
    }

    fn alive(&self) -> impl Iterator<Item = SeqId> {
        let alive = self
            .clients
            .iter()
            .filter(|(_, client)| client.finished.is_none());
        alive.map(|(&seq, _)| seq)
    }
}

fn column(len: usize) -> u32 {
    u32::try_from(len).expect("a small world")
}
