//! Scenario files: what happens, and what the scheduler says to it.
//!
//! A file is paragraphs. Lines that start with `#` are prose. In a paragraph, commands stand above
//! `----` and what they led to below. Commands:
//!
//! ```text
//! limits blocks=8 block=4 step_tokens=16 depth=2      first, once; every knob has a default
//! admit a prompt=5 max=10                             ids of its own; an ending id is 2
//!       like=b:8    the first 8 ids are those of b    after=b   b's ids so far come first
//!       penalty logprobs masked no_end
//! plan                                                or `plan 2`
//! allow cost=100 token=10 pair=1 min=4 max=8          of later plans' prompt tokens; or `allow`
//! commit 0 a=EOS b=7 c=NAN d=BAD                      the model draws for the others; NAN spoils
//!                                                     logits, BAD the row's cells, MISSED its mask
//! run 3                                               plan and commit, three times
//! finish a cancelled                                  or stop, or deadline
//! lose first_step=10 blocks=6                         the group is lost and comes back
//! ```

use std::collections::VecDeque;

use crate::budget::PromptAllowance;
use crate::event::{FinishReason, SeqEvent};
use crate::ids::{BlockSize, Blocks, SeqId, SlotId, StepId, TokenId, Tokens};
use crate::limits::Limits;
use crate::plan::{StepPlan, row_flag};
use crate::request::{Request, RequestSpec, Sampling};
use crate::scheduler::Scheduler;
use crate::testing::symbolic::{Fault, Model, Referee};

const END: TokenId = TokenId(2);
const VOCAB: u32 = 100_000;

struct Named {
    name: String,
    spec: RequestSpec,
    seq: SeqId,
    drawn: Vec<TokenId>,
}

/// The rows of a plan in flight: whose, and whether it was still theirs can be asked later.
struct InFlight {
    step: StepId,
    names: Vec<String>,
}

struct Runner {
    limits: Limits,
    scheduler: Scheduler,
    referee: Referee,
    known: Vec<Named>,
    in_flight: VecDeque<InFlight>,
    allowance: PromptAllowance,
    out: String,
}

/// Runs a scenario and returns the file as it should be.
///
/// # Panics
/// When a command is unknown, when a rule is broken, or when the books do not balance.
#[must_use]
pub fn run(text: &str) -> String {
    let mut runner: Option<Runner> = None;
    let mut file = String::new();
    for paragraph in text.trim().split("\n\n") {
        let commands = paragraph.lines().take_while(|line| *line != "----");
        let mut asked = false;
        if !file.is_empty() {
            file.push('\n');
        }
        for line in commands {
            file += line;
            file.push('\n');
            let line = line.trim();
            if line.starts_with('#') || line.is_empty() {
                continue;
            }
            if let Some(arguments) = line.strip_prefix("limits") {
                runner = Some(Runner::new(&Arguments::new(arguments)));
            } else {
                asked = true;
                runner
                    .as_mut()
                    .expect("a scenario begins with `limits`")
                    .command(line);
            }
        }
        if asked {
            let runner = runner.as_mut().expect("it ran a command");
            file += "----\n";
            file += &std::mem::take(&mut runner.out);
        }
    }
    file
}

// === impl Runner ===

impl Runner {
    fn new(arguments: &Arguments<'_>) -> Self {
        let limits = limits(arguments, None);
        Self {
            scheduler: Scheduler::new(limits.clone()),
            referee: Referee::new(&limits, Model::new(VOCAB), StepId(0)),
            limits,
            known: Vec::new(),
            in_flight: VecDeque::new(),
            allowance: PromptAllowance::UNLIMITED,
            out: String::new(),
        }
    }

    fn command(&mut self, line: &str) {
        let (verb, rest) = line.split_once(' ').unwrap_or((line, ""));
        match verb {
            "admit" => self.admit(rest),
            "plan" => {
                for _ in 0..rest.parse().unwrap_or(1u32) {
                    self.plan();
                }
            }
            "allow" => self.allowance = allowance(&Arguments::new(rest)),
            "commit" => self.commit(rest),
            "run" => {
                for _ in 0..rest.parse().expect("run COUNT") {
                    self.plan();
                    let step = self.in_flight.front().expect("something runs").step;
                    self.commit(&step.to_string());
                }
            }
            "finish" => self.finish(rest),
            "lose" => self.lose(&Arguments::new(rest)),
            _ => panic!("a scenario has no command `{verb}`"),
        }
        self.scheduler.audit();
    }

    fn say(&mut self, line: &str) {
        self.out += line;
        self.out.push('\n');
    }

    fn admit(&mut self, line: &str) {
        let (name, rest) = line.split_once(' ').unwrap_or((line, ""));
        let arguments = Arguments::new(rest);
        let spec = self.spec(&arguments);
        let request = match Request::new(spec.clone(), &self.limits) {
            Ok(request) => request,
            Err(error) => return self.say(&format!("{name} is refused: {error}")),
        };
        match self.scheduler.admit(request) {
            Ok(seq) => {
                let waiting = self.scheduler.stats().waiting;
                self.known.push(Named {
                    name: name.to_owned(),
                    spec,
                    seq,
                    drawn: Vec::new(),
                });
                self.say(&format!("{name} waits, {waiting} in the queue"));
            }
            Err(error) => self.say(&format!("{name} is refused: {error}")),
        }
    }

    fn spec(&self, arguments: &Arguments<'_>) -> RequestSpec {
        let mut prompt = Vec::new();
        if let Some(name) = arguments.text("after") {
            let other = self.named(name);
            prompt.extend(other.spec.prompt.iter().chain(&other.drawn));
        }
        if let Some((name, count)) = arguments.text("like").and_then(|like| like.split_once(':')) {
            let count: usize = count.parse().expect("like=NAME:COUNT");
            prompt.extend(&self.named(name).spec.prompt[..count]);
        }
        let own = 1000 * (1 + u32::try_from(self.known.len()).expect("few sequences"));
        let length = arguments.number("prompt").unwrap_or(1);
        let from = u32::try_from(prompt.len()).expect("short prompts");
        prompt.extend((from..length).map(|i| TokenId(own + i)));
        RequestSpec {
            prompt,
            sampling: Sampling {
                repetition_penalty: if arguments.has("penalty") { 1.5 } else { 1.0 },
                ..Sampling::default()
            },
            ending: if arguments.has("no_end") {
                Vec::new()
            } else {
                vec![END]
            },
            tokens_max: arguments.number("max").map(Tokens),
            prompt_logprobs: arguments.has("logprobs"),
            masked: arguments.has("masked"),
            trace: arguments.has("traced").then_some([1; 25]),
        }
    }

    fn plan(&mut self) {
        let before: Vec<SeqId> = self.scheduler.running().collect();
        let Some(plan) = self.scheduler.plan_within(&self.allowance) else {
            return self.say("no plan");
        };
        let names: Vec<String> = plan
            .row_slot
            .iter()
            .map(|&slot| self.holder(slot))
            .collect();
        self.say(&rows_of(&plan, &names));
        for seq in before {
            if !self.scheduler.running().any(|other| other == seq) {
                self.say(&format!("  {} is preempted", self.name(seq)));
            }
        }
        self.say_changes(&plan);
        self.say_stats();
        self.in_flight.push_back(InFlight {
            step: plan.step,
            names,
        });
        self.referee.receive(plan);
    }

    fn say_changes(&mut self, plan: &StepPlan) {
        let list = |ids: &[i32]| {
            ids.iter()
                .fold(String::new(), |text, id| text + " " + &id.to_string())
        };
        let mut parts = Vec::new();
        if !plan.release_slot.is_empty() {
            parts.push(format!("release slot{}", list(&plan.release_slot)));
        }
        for binding in &plan.bindings {
            let name = self.holder(binding.slot.0.cast_signed());
            let history = match binding.history.len() {
                0 => String::new(),
                tokens => format!(" with {tokens} tokens of history"),
            };
            parts.push(format!("bind {name} to slot {}{history}", binding.slot));
        }
        if !plan.zero_block.is_empty() {
            parts.push(format!("zero{}", list(&plan.zero_block)));
        }
        let mut blocks = &plan.append_block[..];
        for (slot, len) in plan.append_slot.iter().zip(&plan.append_len) {
            let (these, rest) = blocks.split_at(len.cast_unsigned() as usize);
            blocks = rest;
            parts.push(format!("{} gets{}", self.holder(*slot), list(these)));
        }
        if !plan.trace_row.is_empty() {
            parts.push(format!("traced rows{}", list(&plan.trace_row)));
        }
        if !parts.is_empty() {
            self.say(&format!("  {}", parts.join("; ")));
        }
    }

    fn say_stats(&mut self) {
        let stats = self.scheduler.stats();
        let mut line = format!(
            "  {} free, {} cached, {} running, {} waiting",
            stats.blocks_free, stats.blocks_cached, stats.running, stats.waiting
        );
        let waits = |(slot, step)| format!(", slot {slot} in quarantine until {step}");
        line.extend(self.scheduler.quarantined().map(waits));
        self.say(&line);
    }

    fn commit(&mut self, line: &str) {
        let (step, rest) = line.split_once(' ').unwrap_or((line, ""));
        let in_flight = self.in_flight.pop_front().expect("something is in flight");
        assert_eq!(
            in_flight.step.to_string(),
            step,
            "steps are committed in order"
        );
        for (name, token) in Arguments::new(rest).pairs() {
            let row = in_flight.names.iter().position(|other| other == name);
            let row = row.unwrap_or_else(|| panic!("step {step} has no row of {name}"));
            match token {
                "EOS" => self.referee.force(row, END),
                "NAN" => self.referee.inject(row, Fault::Logits),
                "BAD" => self.referee.inject(row, Fault::Cells),
                "MISSED" => self.referee.inject(row, Fault::Mask),
                _ => self
                    .referee
                    .force(row, TokenId(token.parse().expect("an id"))),
            }
        }
        let zombies = self.scheduler.stats().zombie_rows;
        let result = self
            .referee
            .step()
            .expect("it was received when it was planned");
        let mut events = Vec::new();
        if let Err(error) = self.scheduler.commit(&result, &mut events) {
            return self.say(&format!("refused: {error}"));
        }
        self.say_events(events);
        let dropped = self.scheduler.stats().zombie_rows - zombies;
        if dropped > 0 {
            self.say(&format!("  {dropped} dropped: zombie"));
        }
        self.say_stats();
    }

    fn finish(&mut self, line: &str) {
        let (name, reason) = line.split_once(' ').expect("finish NAME REASON");
        let reason = match reason {
            "cancelled" => FinishReason::Cancelled,
            "deadline" => FinishReason::Deadline,
            "stop" => FinishReason::StopText,
            _ => panic!("nobody finishes a sequence with `{reason}`"),
        };
        let mut events = Vec::new();
        self.scheduler
            .finish(self.named(name).seq, reason, &mut events);
        if events.is_empty() {
            self.say(&format!("{name} is not there any more"));
        }
        self.say_events(events);
        self.say_stats();
    }

    fn lose(&mut self, arguments: &Arguments<'_>) {
        self.limits = limits(arguments, Some(&self.limits));
        let first = StepId(u64::from(arguments.number("first_step").unwrap_or(0)));
        self.in_flight.clear();
        self.referee = Referee::new(&self.limits, Model::new(VOCAB), first);
        let events = self.scheduler.reset(self.limits.clone(), first);
        self.say_events(events);
        self.say_stats();
    }

    fn say_events(&mut self, events: Vec<SeqEvent>) {
        for event in events {
            let line = match event {
                SeqEvent::Started {
                    seq,
                    cached,
                    waited_for,
                } => {
                    let waited = waited_for
                        .map_or_else(String::new, |what| format!(", waited for {what:?}"));
                    format!("{} starts, {cached} tokens cached{waited}", self.name(seq))
                }
                SeqEvent::PromptLogprobs { seq, logprobs } => {
                    format!(
                        "{} is told {} prompt logprobs",
                        self.name(seq),
                        logprobs.len()
                    )
                }
                SeqEvent::Token { seq, token } => {
                    let named = self.known.iter_mut().find(|named| named.seq == seq);
                    named
                        .expect("only admitted sequences draw")
                        .drawn
                        .push(token.id);
                    let end = if token.id == END {
                        " (an ending id)"
                    } else {
                        ""
                    };
                    format!("{} draws {}{end}", self.name(seq), token.id)
                }
                SeqEvent::Finished { seq, reason } => {
                    format!("{} ends: {reason:?}", self.name(seq))
                }
            };
            self.say(&line);
        }
    }

    fn named(&self, name: &str) -> &Named {
        let named = self.known.iter().find(|named| named.name == name);
        named.unwrap_or_else(|| panic!("nobody is called {name}"))
    }

    fn name(&self, seq: SeqId) -> String {
        let named = self.known.iter().find(|named| named.seq == seq);
        named
            .expect("only admitted sequences are named")
            .name
            .clone()
    }

    fn holder(&self, slot: i32) -> String {
        let holder = self.scheduler.holder(SlotId(slot.cast_unsigned()));
        self.name(holder.expect("a planned slot has a sequence").0)
    }
}

/// `step 3: a[0..8], b[7..8] from slot, sample`.
fn rows_of(plan: &StepPlan, names: &[String]) -> String {
    let rows = names.iter().enumerate().map(|(row, name)| {
        let (start, len) = (plan.row_start[row], plan.row_len[row]);
        let mut text = format!("{name}[{start}..{}]", start + len);
        for (bit, word) in [
            (row_flag::FROM_SLOT, " from slot"),
            (row_flag::PROMPT_LOGPROBS, " logprobs"),
            (row_flag::SAMPLE, " sample"),
            (row_flag::MASKED, " masked"),
        ] {
            if plan.row_flags[row] & bit != 0 {
                text += word;
            }
        }
        text
    });
    format!(
        "step {}: {}",
        plan.step,
        rows.collect::<Vec<_>>().join(", ")
    )
}

fn limits(arguments: &Arguments<'_>, now: Option<&Limits>) -> Limits {
    let number = |name, otherwise| arguments.number(name).unwrap_or(otherwise);
    if let Some(now) = now {
        return Limits {
            blocks: Blocks(number("blocks", now.blocks.0)),
            ..now.clone()
        };
    }
    let step_tokens = number("step_tokens", 16);
    let running = number("running", 4);
    Limits {
        block_size: BlockSize::new(number("block", 4)).expect("block=0 holds nothing"),
        blocks: Blocks(number("blocks", 17)),
        slots: number("slots", running + 4),
        state_slots: number("state_slots", running + 4),
        running_max: running,
        step_tokens_max: Tokens(step_tokens),
        prefill_tokens_max: Tokens(number("prefill_tokens", step_tokens)),
        prompt_logprob_tokens_max: Tokens(number("told_tokens", step_tokens)),
        context_tokens_max: Tokens(number("context", 256)),
        vocab_size: VOCAB,
        queue_max: number("queue", 16) as usize,
        depth: number("depth", 2),
        watermark: Blocks(number("watermark", 0)),
        share_within_step: !arguments.has("no_share_within_step"),
        prefix_caching: !arguments.has("no_caching"),
    }
}

fn allowance(arguments: &Arguments<'_>) -> PromptAllowance {
    let cost = |name, otherwise| arguments.number(name).map_or(otherwise, f64::from);
    let of = PromptAllowance::UNLIMITED;
    PromptAllowance {
        cost_max: cost("cost", of.cost_max),
        per_token: cost("token", of.per_token),
        per_pair: cost("pair", of.per_pair),
        tokens_max: arguments.number("max").map_or(of.tokens_max, Tokens),
        tokens_min: arguments.number("min").map_or(of.tokens_min, Tokens),
    }
}

/// The words of a command: `key=value` or `flag`.
struct Arguments<'a> {
    words: Vec<&'a str>,
}

// === impl Arguments ===

impl<'a> Arguments<'a> {
    fn new(line: &'a str) -> Self {
        Self {
            words: line.split_whitespace().collect(),
        }
    }

    fn pairs(&self) -> impl Iterator<Item = (&'a str, &'a str)> {
        self.words.iter().filter_map(|word| word.split_once('='))
    }

    fn text(&self, name: &str) -> Option<&'a str> {
        self.pairs()
            .find(|(key, _)| *key == name)
            .map(|(_, value)| value)
    }

    fn number(&self, name: &str) -> Option<u32> {
        self.text(name)
            .map(|value| value.parse().expect("a number"))
    }

    fn has(&self, flag: &str) -> bool {
        self.words.contains(&flag)
    }
}
