//! The stub shard: no model, no memory; every sampled row gets the time of day as its token.

use std::error::Error;
use std::path::Path;
use std::time::Duration;

use bytes::Bytes;
use headrace_core::plan::{StepPlan, StepResult, row_flag};
use headrace_wire::{
    Describe, DescribeRequest, Prepare, Prepared, Shard, ShardServer, decode_plan, encode_result,
};
use tokio::net::UnixListener;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};
use tokio_stream::wrappers::{ReceiverStream, UnixListenerStream};
use tonic::transport::Server;
use tonic::{Request, Response, Status, Streaming};

use crate::stamp::{VOCAB, token_now};

/// Tokens in a block.
pub(crate) const BLOCK_TOKENS: u32 = 16;
/// Plans that may wait; a router keeps three in flight at most.
const PLANS_MAX: usize = 4;
const CONTEXT_TOKENS: u32 = 1 << 16;

/// Serves until it is killed.
pub(crate) fn run(socket: &Path, step: Duration, blocks: u32) -> Result<(), Box<dyn Error>> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let incoming = UnixListenerStream::new(UnixListener::bind(socket)?);
        Server::builder()
            .serve_with_incoming(ShardServer::new(Stub { step, blocks }), incoming)
            .await?;
        Ok(())
    })
}

#[derive(Debug, Clone, Copy)]
struct Stub {
    step: Duration,
    blocks: u32,
}

#[tonic::async_trait]
impl Shard for Stub {
    type ExecuteStream = ReceiverStream<Result<Bytes, Status>>;

    async fn describe(&self, _: Request<DescribeRequest>) -> Result<Response<Describe>, Status> {
        Ok(Response::new(Describe {
            architecture: "Stub".into(),
            device: "stub".into(),
            dtype: "float32".into(),
            rank: 0,
            ranks: 1,
            context_tokens_max: CONTEXT_TOKENS,
            vocab_size: VOCAB,
            kv_bytes_per_token: 1,
            block_tokens_supported: vec![BLOCK_TOKENS],
            kv_written_in_attention: false,
        }))
    }

    async fn prepare(&self, _: Request<Prepare>) -> Result<Response<Prepared>, Status> {
        Ok(Response::new(Prepared {
            blocks: self.blocks,
            memory: Vec::new(),
        }))
    }

    async fn execute(
        &self,
        request: Request<Streaming<Bytes>>,
    ) -> Result<Response<Self::ExecuteStream>, Status> {
        let (results, receiver) = mpsc::channel(1);
        tokio::spawn(self.answer(request.into_inner(), results));
        Ok(Response::new(ReceiverStream::new(receiver)))
    }
}

impl Stub {
    /// Steps take their time one after another, as on a device: a plan that waits starts when the
    /// one before it ends, however late the timer was.
    async fn answer(
        self,
        mut plans: Streaming<Bytes>,
        results: mpsc::Sender<Result<Bytes, Status>>,
    ) {
        let (arrivals, mut arrived) = mpsc::channel(PLANS_MAX);
        tokio::spawn(async move {
            while let Ok(Some(bytes)) = plans.message().await {
                if arrivals.send((Instant::now(), bytes)).await.is_err() {
                    return;
                }
            }
        });
        let mut done = Instant::now();
        while let Some((at, bytes)) = arrived.recv().await {
            done = done.max(at) + self.step;
            if !self.step.is_zero() {
                sleep_until(done).await;
            }
            let answer = decode_plan(bytes)
                .map(|plan| encode_result(&draw(&plan)))
                .map_err(|error| Status::invalid_argument(error.to_string()));
            if results.send(answer).await.is_err() {
                return;
            }
        }
    }
}

fn draw(plan: &StepPlan) -> StepResult {
    let sampled: Vec<i32> = (0_i32..)
        .zip(&plan.row_flags)
        .filter(|(_, flags)| **flags & row_flag::SAMPLE != 0)
        .map(|(row, _)| row)
        .collect();
    let rows = sampled.len();
    StepResult {
        step: plan.step,
        row_index: sampled,
        row_flags: vec![0; rows],
        logprob: vec![-0.5; rows],
        top_count: vec![0; rows],
        digest: plan.step.0,
        // Last: this is the moment that the client measures from.
        token_id: vec![token_now().cast_signed(); rows],
        ..StepResult::default()
    }
}
