//! The loop: results, ends and commands, and with what they left, the next plan. It owns the
//! scheduler: no locks, no device, and it never waits for a client.

use std::collections::{BTreeSet, VecDeque};
use std::future::{pending, ready};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::BytesMut;
use headrace_core::event::{FinishReason, SeqEvent};
use headrace_core::ids::{SeqId, StepId};
use headrace_core::plan::StepPlan;
use headrace_core::scheduler::{AdmitError, Scheduler};
use headrace_wire::{encode_describe, encode_mask, encode_plan, encode_prepare};
use rustc_hash::FxHashMap;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep_until};
use tracing::Span;

use crate::config::EngineConfig;
use crate::error::{EngineError, ShardError, SubmitError};
use crate::grammar::Masks;
use crate::group::{Dial, GroupEvent, Ready, ShardGroup, StepDone, bring_up};
use crate::handle::{EngineState, Facts};
use crate::message::{Command, FinishBox, Submission};
use crate::metrics::{Committed, Method, Metrics};
use crate::pace::Pacer;
use crate::record::{Kind, Recorder};
use crate::sink::{TokenEvent, TokenSink};
use crate::trace::{SeqNotes, SeqTrace, Started, Traces, now};

/// Nothing to do for so long: time to recount the books.
const AUDIT_AFTER: Duration = Duration::from_secs(1);

/// What reaches the driver, and where it says how it is.
#[derive(Debug)]
pub(crate) struct Inbox {
    pub(crate) commands: mpsc::Receiver<Command>,
    pub(crate) finishes: Arc<FinishBox>,
    pub(crate) state: watch::Sender<EngineState>,
    pub(crate) facts: Arc<OnceLock<Arc<Facts>>>,
}

/// What the driver does once the scheduler was reset after the loss of its group. Every sequence
/// is back in the queue then: a policy that brings the group up again need only go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum AfterGroupLoss {
    /// Every request fails with a retryable error and the engine ends.
    GiveUp,
}

/// The only policy so far.
const AFTER_GROUP_LOSS: AfterGroupLoss = AfterGroupLoss::GiveUp;

/// Whether requests are taken, and until when those that were may run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Serving,
    Draining { deadline: Option<Instant> },
}

/// An admitted request.
#[derive(Debug)]
struct Seat {
    sink: Arc<TokenSink>,
    /// Prompt and new tokens at most.
    tokens_max: i64,
    started: bool,
    trace: Option<Arc<SeqTrace>>,
    span: Span,
    t0: Instant,
    deadline: Option<Instant>,
}

struct Driver<'a> {
    scheduler: Scheduler,
    group: ShardGroup,
    inbox: &'a mut Inbox,
    /// Every handle is gone.
    orphaned: bool,
    phase: Phase,
    seats: FxHashMap<SeqId, Seat>,
    /// Of the seats that have one, the next first.
    deadlines: BTreeSet<(Instant, SeqId)>,
    /// `plan()` had nothing to do, and nothing has changed since.
    idle: bool,
    /// When to recount, while nothing runs.
    audit_at: Option<Instant>,
    /// What the plans in flight are for, oldest first.
    methods: VecDeque<Method>,
    pacer: Pacer,
    masks: Masks,
    traces: Traces,
    metrics: Metrics,
    recorder: Option<Recorder>,
    /// Scratch, used again every step.
    events: Vec<SeqEvent>,
    buffer: BytesMut,
}

/// Brings the group up and runs until it is drained or lost.
pub(crate) async fn run(
    config: EngineConfig,
    dial: Dial,
    mut inbox: Inbox,
    metrics: Metrics,
) -> Result<(), EngineError> {
    let loaded = tokio::select! {
        loaded = load(&config, &dial) => Some(loaded),
        () = refuse_until_drained(&mut inbox.commands) => None,
    };
    let outcome = match loaded {
        Some(Ok((ready, recorder))) => {
            let policy = (
                Pacer::new(config.itl_target),
                Masks::new(
                    config.mask_threads,
                    config.mask_max,
                    &ready.facts.describe.device,
                ),
            );
            Driver::new(ready, recorder, policy, metrics, &mut inbox)
                .run()
                .await
        }
        Some(Err(error)) => Err(error),
        None => Ok(()),
    };
    let reason = match &outcome {
        Ok(()) => "the engine was drained".into(),
        Err(error) => error.to_string().into(),
    };
    // Before the inbox is dropped, so that whoever waits for an answer finds the reason.
    inbox.state.send_replace(EngineState::Down { reason });
    outcome
}

async fn load(
    config: &EngineConfig,
    dial: &Dial,
) -> Result<(Ready, Option<Recorder>), EngineError> {
    let recorder = match &config.record {
        Some(record) => Some((Recorder::create(&record.path)?, record.serve.clone())),
        None => None,
    };
    let ready = bring_up(config, dial).await?;
    if let Some((recorder, serve)) = &recorder {
        recorder.write(Kind::Serve, serve.clone()).await;
        recorder
            .write(Kind::Describe, encode_describe(&ready.facts.describe))
            .await;
        recorder
            .write(Kind::Prepare, encode_prepare(&ready.prepare))
            .await;
    }
    Ok((ready, recorder.map(|(recorder, _)| recorder)))
}

/// Answers while there is no group yet; returns when the engine is to end before there is one.
async fn refuse_until_drained(commands: &mut mpsc::Receiver<Command>) {
    while let Some(command) = commands.recv().await {
        match command {
            Command::Submit(submission) => {
                drop(submission.reply.send(Err(SubmitError::NotReady)));
            }
            Command::Drain { .. } => return,
        }
    }
}

/// Resolves at `when`, or never.
async fn at(when: Option<Instant>) {
    match when {
        Some(when) => sleep_until(when).await,
        None => pending().await,
    }
}

// === impl Driver ===

impl<'a> Driver<'a> {
    fn new(
        ready: Ready,
        recorder: Option<Recorder>,
        (pacer, masks): (Pacer, Masks),
        metrics: Metrics,
        inbox: &'a mut Inbox,
    ) -> Self {
        let facts = Arc::new(ready.facts);
        metrics.ready(&facts);
        inbox.facts.get_or_init(|| Arc::clone(&facts));
        inbox
            .state
            .send_replace(EngineState::Ready(Arc::clone(&facts)));
        Self {
            scheduler: Scheduler::new(facts.limits.clone()),
            group: ready.group,
            inbox,
            orphaned: false,
            phase: Phase::Serving,
            seats: FxHashMap::default(),
            deadlines: BTreeSet::new(),
            idle: true,
            audit_at: None,
            methods: VecDeque::new(),
            pacer,
            masks,
            traces: Traces::default(),
            metrics,
            recorder,
            events: Vec::new(),
            buffer: BytesMut::new(),
        }
    }

    async fn run(mut self) -> Result<(), EngineError> {
        let outcome = self.serve().await;
        if let Some(recorder) = self.recorder.take() {
            recorder.close().await;
        }
        outcome
    }

    async fn serve(&mut self) -> Result<(), EngineError> {
        while !self.is_done() {
            tokio::select! {
                biased;

                // Results first: they free blocks, slots and a place in the pipeline.
                event = self.group.next() => match event {
                    GroupEvent::Result(done) => self.commit(done).await?,
                    GroupEvent::Down(error) => return Err(self.group_lost(error)),
                },

                // A step waits for them on the device.
                () = self.masks.made() => self.masks_made().await?,

                () = at(self.masks.deadline()) => self.send_masks().await?,

                () = self.inbox.finishes.posted() => {
                    self.finish_posted();
                    self.send_masks().await?;
                }

                () = at(self.deadlines.first().map(|(when, _)| *when)) => {
                    self.end_overdue();
                    self.send_masks().await?;
                }

                command = self.inbox.commands.recv(), if !self.orphaned => match command {
                    Some(command) => self.apply(command),
                    None => self.orphan(),
                },

                () = at(self.phase.deadline()) => self.cut(),

                () = at(self.audit_at) => self.audit(),

                // Reserve, then decide: the scheduler makes no plan while as many as may be are in
                // flight, and what it makes rests on all of the above. The masks of a plan go before the
                // next one (R7).
                () = ready(()), if !self.idle && !self.masks.are_awaited() => self.plan().await?,
            }
        }
        Ok(())
    }

    fn is_done(&self) -> bool {
        self.phase != Phase::Serving && self.seats.is_empty() && self.scheduler.is_idle()
    }

    // --- steps ---

    async fn plan(&mut self) -> Result<(), EngineError> {
        let begun = Instant::now();
        let allowance = self.pacer.allowance(&self.scheduler);
        let Some(mut plan) = self.scheduler.plan_within(&allowance) else {
            // Until a command or a result changes something.
            self.idle = true;
            return Ok(());
        };
        if !plan.bindings.is_empty() {
            let others = plan.rows() > plan.bindings.len();
            self.metrics.joined(begun.elapsed(), others);
        }
        self.traces.planned(&mut plan);
        let bytes = encode_plan(&plan, &mut self.buffer);
        if let Err(error) = self.group.send(plan.step, &bytes) {
            return Err(self.group_lost(error));
        }
        self.audit_at = None;
        self.note_plan(&plan);
        // Only now: the device had been waiting for the plan, and who has started has not.
        let mut events = std::mem::take(&mut self.events);
        self.scheduler.take_events(&mut events);
        self.deliver(&mut events);
        self.events = events;
        self.masks.planned(&self.scheduler, plan.step);
        self.scheduler.recycle(plan);
        if let Some(recorder) = &self.recorder {
            recorder.write(Kind::ToShard, bytes).await;
        }
        self.send_masks().await
    }

    /// Sends the masks of the newest plan, if they are awaited and it is time.
    async fn send_masks(&mut self) -> Result<(), EngineError> {
        let Some(mask) = self.masks.take(&self.scheduler) else {
            return Ok(());
        };
        let bytes = encode_mask(&mask);
        if let Err(error) = self.group.send_mask(bytes.clone()) {
            return Err(self.group_lost(error));
        }
        if let Some(recorder) = &self.recorder {
            recorder.write(Kind::ToShard, bytes).await;
        }
        Ok(())
    }

    async fn masks_made(&mut self) -> Result<(), EngineError> {
        let mut failed = Vec::new();
        self.masks.collect(&mut failed, &self.metrics.masks.time);
        self.finish_each(failed, FinishReason::GrammarFailed);
        self.send_masks().await
    }

    async fn commit(&mut self, done: StepDone) -> Result<(), EngineError> {
        if let Some(recorder) = &self.recorder {
            recorder.write(Kind::Result, done.bytes).await;
        }
        let mut events = std::mem::take(&mut self.events);
        let device = Duration::from_micros(u64::from(done.result.device_time_us));
        // Before its events: one of them may be the end.
        self.traces.committed(done.result.step, device);
        let begun = Instant::now();
        let outcome = self.scheduler.commit(&done.result, &mut events);
        let committed = Instant::now();
        self.deliver(&mut events);
        let delivered = Instant::now();
        self.events = events;
        if let Err(error) = outcome {
            return Err(self.group_lost(error.into()));
        }
        self.masks
            .committed(&self.scheduler, done.result.step, done.gap);
        self.send_masks().await?;
        self.idle = false;
        if self.scheduler.is_idle() {
            self.audit_at = Some(Instant::now() + AUDIT_AFTER);
        }
        let method = self
            .methods
            .pop_front()
            .expect("every plan in flight has its method");
        let paced = self.pacer.done(done.gap);
        self.metrics.committed(&Committed {
            method,
            took: done.took,
            gap: done.gap,
            device,
            decode: committed - begun,
            filter: delivered - committed,
            paced,
            model: self.pacer.model(),
            tokens_max: self.scheduler.limits().step_tokens_max.0,
        });
        self.metrics.observe(&self.scheduler.stats());
        Ok(())
    }

    fn note_plan(&mut self, plan: &StepPlan) {
        let prefill = !plan.token_id.is_empty();
        let method = if prefill {
            Method::Prefill
        } else {
            Method::Decode
        };
        self.methods.push_back(method);
        self.pacer.planned(plan);
        self.metrics.of(method).count.inc();
        if !plan.bindings.is_empty() {
            self.metrics.next_size.observe(plan.bindings.len() as f64);
        }
        tracing::trace!(step = plan.step.0, rows = plan.rows(), ?method, "plan sent");
    }

    // --- requests ---

    fn apply(&mut self, command: Command) {
        match command {
            Command::Submit(submission) => self.admit(submission),
            Command::Drain { deadline } => {
                self.phase = Phase::Draining {
                    deadline: Some(deadline),
                };
                self.inbox.state.send_replace(EngineState::Draining);
            }
        }
    }

    fn admit(&mut self, submission: Submission) {
        let Submission {
            request,
            matcher,
            trace,
            sink,
            reply,
            span,
            t0,
            deadline,
        } = submission;
        if self.phase != Phase::Serving {
            drop(reply.send(Err(SubmitError::Draining)));
            return;
        }
        if sink.is_abandoned() {
            return;
        }
        let prompt = i64::try_from(request.prompt().len()).unwrap_or(i64::MAX);
        let tokens_max = prompt.saturating_add(request.tokens_max().0.into());
        let answer = match self.scheduler.admit(request) {
            Ok(seq) => {
                sink.bind(seq);
                if let Some(matcher) = matcher {
                    self.masks.begin(seq, matcher);
                }
                if let Some(trace) = &trace {
                    self.traces.admitted(Arc::clone(trace));
                }
                self.seats.insert(
                    seq,
                    Seat {
                        sink,
                        tokens_max,
                        started: false,
                        trace,
                        span,
                        t0,
                        deadline,
                    },
                );
                self.deadlines.extend(deadline.map(|when| (when, seq)));
                self.idle = false;
                Ok(())
            }
            Err(AdmitError::QueueFull { waiting, queue_max }) => {
                Err(SubmitError::QueueFull { waiting, queue_max })
            }
        };
        // Whoever is gone has abandoned the sink, and its end is in the box.
        drop(reply.send(answer));
        self.metrics.observe(&self.scheduler.stats());
    }

    /// Every handle is gone: nobody can submit or drain; what runs may end.
    fn orphan(&mut self) {
        self.orphaned = true;
        if self.phase == Phase::Serving {
            self.phase = Phase::Draining { deadline: None };
            self.inbox.state.send_replace(EngineState::Draining);
        }
    }

    fn finish_posted(&mut self) {
        let mut events = std::mem::take(&mut self.events);
        for (sink, reason) in self.inbox.finishes.take() {
            // Without a sequence it was refused, or is not admitted yet and will not be.
            if let Some(seq) = sink.seq() {
                self.scheduler.finish(seq, reason, &mut events);
            }
        }
        self.deliver(&mut events);
        self.events = events;
        self.idle = false;
        self.metrics.observe(&self.scheduler.stats());
    }

    /// Ends the sequences whose time is over, and gives back what they hold.
    fn end_overdue(&mut self) {
        let now = Instant::now();
        let overdue = self.deadlines.iter().take_while(|(when, _)| *when <= now);
        let overdue: Vec<SeqId> = overdue.map(|(_, seq)| *seq).collect();
        for seq in &overdue {
            let started = seat(&mut self.seats, *seq).started;
            self.metrics.overdue(started);
        }
        self.finish_each(overdue, FinishReason::Deadline);
        self.metrics.observe(&self.scheduler.stats());
    }

    /// The drain took too long.
    fn cut(&mut self) {
        tracing::warn!(
            streams = self.seats.len(),
            "streams are cut at the drain deadline"
        );
        self.phase = Phase::Draining { deadline: None };
        self.finish_all(FinishReason::Cancelled);
    }

    /// The group is lost with everything in flight (R8). The scheduler starts over, every sequence
    /// in the queue; what then becomes of them is policy.
    fn group_lost(&mut self, error: ShardError) -> EngineError {
        tracing::error!(%error, "the shard group is lost");
        self.metrics.groups_lost.inc();
        for method in self.methods.drain(..) {
            self.metrics.of(method).failure.inc();
        }
        self.pacer.lost();
        self.masks.lost();
        self.traces.lost();
        let limits = self.scheduler.limits().clone();
        let mut events = self.scheduler.reset(limits, StepId(0));
        self.deliver(&mut events);
        match AFTER_GROUP_LOSS {
            AfterGroupLoss::GiveUp => self.finish_all(FinishReason::GroupLost),
        }
        error.into()
    }

    fn finish_all(&mut self, reason: FinishReason) {
        let mut seqs: Vec<SeqId> = self.seats.keys().copied().collect();
        seqs.sort_unstable();
        self.finish_each(seqs, reason);
    }

    fn finish_each(&mut self, seqs: Vec<SeqId>, reason: FinishReason) {
        if seqs.is_empty() {
            return;
        }
        let mut events = std::mem::take(&mut self.events);
        for seq in seqs {
            self.scheduler.finish(seq, reason, &mut events);
        }
        self.deliver(&mut events);
        self.events = events;
        self.idle = false;
    }

    /// Hands events to their streams. Never waits.
    fn deliver(&mut self, events: &mut Vec<SeqEvent>) {
        for event in events.drain(..) {
            match event {
                SeqEvent::Started {
                    seq,
                    cached,
                    waited_for,
                } => {
                    let seat = seat(&mut self.seats, seq);
                    seat.started = true;
                    let waited = seat.t0.elapsed();
                    self.metrics.started(waited, waited_for, cached);
                    self.metrics.batch_max_tokens.add(seat.tokens_max);
                    tracing::debug!(
                        parent: &seat.span,
                        queue_us = waited.as_micros(),
                        ?waited_for,
                        cached_tokens = cached,
                        "sequence started"
                    );
                    if let Some(trace) = &seat.trace {
                        let at = now();
                        let started = Started {
                            at,
                            waited_for,
                            cached,
                        };
                        trace.note(|notes| notes.started = Some(started));
                    }
                    seat.sink.push(TokenEvent::Started {
                        cached_tokens: cached,
                    });
                }
                SeqEvent::PromptLogprobs { seq, logprobs } => {
                    seat(&mut self.seats, seq)
                        .sink
                        .push(TokenEvent::PromptLogprobs(logprobs));
                }
                SeqEvent::Token { seq, token } => {
                    self.masks.token(seq, token.id);
                    let seat = seat(&mut self.seats, seq);
                    if let Some(trace) = &seat.trace {
                        trace.note(SeqNotes::token);
                    }
                    seat.sink.push(TokenEvent::Token(token));
                }
                SeqEvent::Finished { seq, reason } => {
                    self.masks.end(seq);
                    let seat = self.seats.remove(&seq).expect(SEATED);
                    if let Some(deadline) = seat.deadline {
                        self.deadlines.remove(&(deadline, seq));
                    }
                    if let Some(trace) = &seat.trace {
                        self.traces.ended(trace, reason);
                    }
                    if seat.started {
                        self.metrics.batch_max_tokens.sub(seat.tokens_max);
                    }
                    seat.sink.push(TokenEvent::Finished(reason));
                }
            }
        }
    }

    fn audit(&mut self) {
        self.audit_at = None;
        self.scheduler.audit();
    }
}

const SEATED: &str = "an event's sequence was admitted and has not ended; this is a scheduler bug";

fn seat(seats: &mut FxHashMap<SeqId, Seat>, seq: SeqId) -> &mut Seat {
    seats.get_mut(&seq).expect(SEATED)
}

// === impl Phase ===

impl Phase {
    fn deadline(self) -> Option<Instant> {
        match self {
            Self::Serving => None,
            Self::Draining { deadline } => deadline,
        }
    }
}
