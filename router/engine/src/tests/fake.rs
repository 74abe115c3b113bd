//! A shard behind a real tonic server on an in-process connection, with faults to order.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream;
use headrace_core::ids::StepId;
use headrace_core::plan::{StepPlan, StepResult, result_flag, row_flag};
use headrace_wire::{
    Describe, DescribeRequest, Prepare, Prepared, Shard, ShardServer, StepMask, decode_mask,
    decode_plan, encode_result,
};
use tokio::sync::mpsc;
use tokio::time::sleep;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Server;
use tonic::{Request, Response, Status, Streaming};

use crate::group::{Dial, Io};

/// Entries of the fake vocabulary.
pub(crate) const VOCAB: u32 = 1000;
/// Tokens in a block of the fake pool.
pub(crate) const BLOCK_TOKENS: u32 = 4;
/// What a paced fake takes for a step.
pub(crate) const STEP: Duration = Duration::from_millis(10);

/// What goes wrong, and at which step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    None,
    /// The stream ends without a word.
    End(u64),
    /// The stream ends without a word once the step is answered.
    EndAfter(u64),
    /// The stream ends with a status.
    Fail(u64),
    /// The step is never answered.
    Hang(u64),
    /// The digest is another.
    Digest(u64),
    /// The answer is for the step after.
    Skip(u64),
    /// The answer comes twice.
    Twice(u64),
    /// The answer is no message.
    Garbage(u64),
    /// The answer is for rows that were not sampled.
    Rows(u64),
}

/// One rank and its orders.
#[derive(Clone)]
pub(crate) struct Fake {
    pub(crate) describe: Describe,
    pub(crate) blocks: u32,
    pub(crate) step_time: Duration,
    /// What each prompt token of a step adds to it.
    pub(crate) token_time: Duration,
    pub(crate) prepare_time: Duration,
    pub(crate) fault: Fault,
    /// What it does with masks.
    pub(crate) masks: Masks,
    pub(crate) seen: Arc<Seen>,
    pub(crate) model: Model,
}

/// Whether masks reach the sampler.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Masks {
    /// They are waited for as long as it takes.
    Awaited,
    /// Those of every fifth step are missed.
    MissedNowAndThen,
    /// None is waited for.
    Ignored,
}

/// What executes plans.
pub(crate) type Model =
    Arc<dyn Fn() -> Box<dyn FnMut(&StepPlan) -> StepResult + Send> + Send + Sync>;

/// What a rank was told.
#[derive(Debug, Default)]
pub(crate) struct Seen {
    pub(crate) plans: Mutex<Vec<StepPlan>>,
    /// Messages with masks, and how many plans had come before each.
    pub(crate) masks: Mutex<Vec<(usize, StepMask)>>,
    pub(crate) prepared: AtomicBool,
}

// === impl Seen ===

impl Seen {
    /// The plans so far.
    pub(crate) fn plans(&self) -> Vec<StepPlan> {
        self.plans
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// The masks so far.
    pub(crate) fn masks(&self) -> Vec<(usize, StepMask)> {
        self.masks
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    fn add_mask(&self, mask: StepMask) {
        let plans = self.plans().len();
        self.masks
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push((plans, mask));
    }

    fn add(&self, plan: StepPlan) {
        self.plans
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(plan);
    }
}

// === impl Fake ===

impl Fake {
    /// A group of faultless ranks that answer at once.
    pub(crate) fn group(ranks: u32) -> Vec<Self> {
        let rank = |rank| Self {
            describe: Describe {
                architecture: "FakeForCausalLM".into(),
                device: "cpu".into(),
                dtype: "float32".into(),
                rank,
                ranks,
                context_tokens_max: 4096,
                vocab_size: VOCAB,
                kv_bytes_per_token: 64,
                block_tokens_supported: vec![BLOCK_TOKENS, 16],
                kv_written_in_attention: false,
            },
            blocks: 1025,
            step_time: Duration::ZERO,
            token_time: Duration::ZERO,
            prepare_time: Duration::ZERO,
            fault: Fault::None,
            masks: Masks::Awaited,
            seen: Arc::default(),
            model: Arc::new(|| Box::new(answer)),
        };
        (0..ranks).map(rank).collect()
    }

    /// A group that takes [`STEP`] for a step.
    pub(crate) fn paced(ranks: u32) -> Vec<Self> {
        let mut group = Self::group(ranks);
        for fake in &mut group {
            fake.step_time = STEP;
        }
        group
    }

    /// Serves on one connection until it closes.
    pub(crate) async fn serve(self, connection: tokio::io::DuplexStream) {
        let incoming = stream::iter([Ok::<_, io::Error>(connection)]);
        let served = Server::builder()
            .serve_with_incoming(ShardServer::new(self), incoming)
            .await;
        drop(served);
    }
}

/// Each dial starts a server for its rank.
pub(crate) fn dial(group: Vec<Fake>) -> Dial {
    Arc::new(move |rank| {
        let fake = group[rank].clone();
        Box::pin(async move {
            let (ours, theirs) = tokio::io::duplex(1 << 20);
            tokio::spawn(fake.serve(theirs));
            Ok(Box::new(ours) as Box<dyn Io>)
        })
    })
}

/// The fake model: a row's token is the number of tokens its sequence has.
pub(crate) fn answer(plan: &StepPlan) -> StepResult {
    let mut result = StepResult {
        step: plan.step,
        digest: plan.step.0,
        ..StepResult::default()
    };
    for row in 0..plan.rows() {
        let end = plan.row_start[row] + plan.row_len[row];
        if plan.row_flags[row] & row_flag::PROMPT_LOGPROBS != 0 {
            for at in plan.row_start[row]..end {
                result.prompt_logprob.push(-(at as f32));
                result.prompt_best_token.push(at);
                result.prompt_best_logprob.push(-0.5);
            }
        }
        if plan.row_flags[row] & row_flag::SAMPLE != 0 {
            result.row_index.push(i32::try_from(row).expect("few rows"));
            result.token_id.push(end % VOCAB.cast_signed());
            result.row_flags.push(0);
            result.logprob.push(-0.5);
            result.top_count.push(0);
        }
    }
    result
}

/// Constrained rows draw the first token that they may, or miss their mask.
fn keep_to(mask: Option<&StepMask>, plan: &StepPlan, result: &mut StepResult) {
    for (at, &row) in result.row_index.iter().enumerate() {
        if plan.row_flags[row.cast_unsigned() as usize] & row_flag::MASKED == 0 {
            continue;
        }
        let mine = mask.and_then(|mask| {
            assert_eq!(mask.step, plan.step, "masks follow their plan");
            let found = mask.row.binary_search(&row).ok()?;
            Some(&mask.bits[found])
        });
        let Some(bits) = mine else {
            result.row_flags[at] |= result_flag::MASK_MISSED;
            continue;
        };
        let (word, bits) = bits
            .iter()
            .enumerate()
            .find(|(_, bits)| **bits != 0)
            .expect("something may be drawn");
        let token = 32 * word + bits.trailing_zeros() as usize;
        result.token_id[at] = i32::try_from(token).expect("a small vocabulary");
    }
}

#[tonic::async_trait]
impl Shard for Fake {
    type ExecuteStream = ReceiverStream<Result<Bytes, Status>>;

    async fn describe(&self, _: Request<DescribeRequest>) -> Result<Response<Describe>, Status> {
        Ok(Response::new(self.describe.clone()))
    }

    async fn prepare(&self, request: Request<Prepare>) -> Result<Response<Prepared>, Status> {
        sleep(self.prepare_time).await;
        self.seen.prepared.store(true, Ordering::Relaxed);
        let wanted = request.into_inner().blocks_max;
        let blocks = if wanted == 0 {
            self.blocks
        } else {
            wanted.min(self.blocks)
        };
        Ok(Response::new(Prepared {
            blocks,
            memory: vec![("KV pool".into(), 1 << 20)],
        }))
    }

    async fn execute(
        &self,
        request: Request<Streaming<Bytes>>,
    ) -> Result<Response<Self::ExecuteStream>, Status> {
        let (results, receiver) = mpsc::channel(1);
        tokio::spawn(self.clone().run(request.into_inner(), results));
        Ok(Response::new(ReceiverStream::new(receiver)))
    }
}

impl Fake {
    /// The masks of a plan that has constrained rows.
    async fn await_mask(
        &self,
        plan: &StepPlan,
        messages: &mut Streaming<Bytes>,
        held: &mut Option<Bytes>,
    ) -> Option<StepMask> {
        let masked = |flags: &i32| flags & row_flag::MASKED != 0;
        let missed = match self.masks {
            Masks::Awaited => false,
            Masks::MissedNowAndThen => plan.step.0.is_multiple_of(5),
            Masks::Ignored => true,
        };
        if missed || !plan.row_flags.iter().any(masked) {
            return None;
        }
        let bytes = messages.message().await.ok().flatten()?;
        let mask = decode_mask(bytes.clone()).expect("the engine sends messages");
        if let Some(mask) = &mask {
            self.seen.add_mask(mask.clone());
        } else {
            *held = Some(bytes);
        }
        mask
    }

    async fn run(self, mut plans: Streaming<Bytes>, results: mpsc::Sender<Result<Bytes, Status>>) {
        let mut model = (self.model)();
        let mut held = None;
        loop {
            let next = match held.take() {
                Some(bytes) => Ok(Some(bytes)),
                None => plans.message().await,
            };
            let Ok(Some(bytes)) = next else { return };
            if let Some(mask) = decode_mask(bytes.clone()).expect("the engine sends messages") {
                self.seen.add_mask(mask); // Too late for its step.
                continue;
            }
            let plan = decode_plan(bytes).expect("the engine sends plans");
            self.seen.add(plan.clone());
            let mut result = model(&plan);
            if self.describe.rank == 0 {
                let mask = self.await_mask(&plan, &mut plans, &mut held).await;
                keep_to(mask.as_ref(), &plan, &mut result);
            }
            let tokens = u32::try_from(plan.token_id.len()).expect("few tokens");
            let took = self.step_time + self.token_time * tokens;
            if !took.is_zero() {
                sleep(took).await;
            }
            let mut answers = 1;
            match self.fault {
                Fault::End(step) if step == plan.step.0 => return,
                Fault::Fail(step) if step == plan.step.0 => {
                    drop(results.send(Err(Status::internal("out of memory"))).await);
                    return;
                }
                Fault::Hang(step) if step == plan.step.0 => std::future::pending().await,
                Fault::Digest(step) if step == plan.step.0 => result.digest ^= 1,
                Fault::Skip(step) if step == plan.step.0 => result.step = StepId(step + 1),
                Fault::Twice(step) if step == plan.step.0 => answers = 2,
                Fault::Garbage(step) if step == plan.step.0 => {
                    drop(
                        results
                            .send(Ok(Bytes::from_static(&[0x12, 3, 0, 0, 0])))
                            .await,
                    );
                    continue;
                }
                Fault::Rows(step) if step == plan.step.0 => {
                    result.row_index.iter_mut().for_each(|row| *row += 1);
                }
                Fault::None
                | Fault::End(_)
                | Fault::EndAfter(_)
                | Fault::Fail(_)
                | Fault::Hang(_)
                | Fault::Digest(_)
                | Fault::Skip(_)
                | Fault::Twice(_)
                | Fault::Garbage(_)
                | Fault::Rows(_) => {}
            }
            for _ in 0..answers {
                if results.send(Ok(encode_result(&result))).await.is_err() {
                    return;
                }
            }
            if self.fault == Fault::EndAfter(plan.step.0) {
                return;
            }
        }
    }
}
