//! From sockets to a prepared group: connect with retries, ask every rank what it is, decide the
//! limits, prepare all ranks at once, open the streams.

use std::future::Future;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::{BoxFuture, try_join_all};
use headrace_core::ids::{BlockSize, Blocks, StepId, Tokens};
use headrace_core::limits::Limits;
use headrace_wire::{Describe, DescribeRequest, Prepare, Prepared, ShardClient};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::UnixStream;
use tokio::time::{Instant, sleep, timeout_at};
use tonic::transport::{Channel, Endpoint};
use tower::service_fn;

use super::ShardGroup;
use super::stream::RankStream;
use crate::config::EngineConfig;
use crate::error::ShardError;
use crate::handle::Facts;

/// Between two attempts to connect.
const RETRY: Duration = Duration::from_millis(50);
/// HTTP/2 windows: a plan with a long prompt or history must not wait for window updates.
const WINDOW_BYTES: u32 = 16 << 20;
/// Bytes of a result: log-probabilities of a long prompt are the largest part.
const RESULT_BYTES_MAX: usize = 64 << 20;
/// Entries of the side pool for vocabulary-sized state, each some hundred kilobytes.
const STATE_SLOTS_MAX: u32 = 128;
/// Prompt tokens of a step whose log-probabilities are told. Each takes a row of logits, of some
/// hundred kilobytes, which no other step keeps; steps of so many are nearly as fast a token as
/// larger ones.
const PROMPT_LOGPROB_TOKENS_MAX: u32 = 512;

/// A connection to a shard.
pub(crate) trait Io: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Io for T {}

/// How to reach a rank.
pub(crate) type Dial =
    Arc<dyn Fn(usize) -> BoxFuture<'static, io::Result<Box<dyn Io>>> + Send + Sync>;

/// A group that takes plans, and what is known of it.
#[derive(Debug)]
pub(crate) struct Ready {
    pub(crate) group: ShardGroup,
    pub(crate) facts: Facts,
    /// What it was prepared with.
    pub(crate) prepare: Prepare,
}

/// Reaches ranks by their Unix sockets.
pub(crate) fn dial_sockets(sockets: &[PathBuf]) -> Dial {
    let sockets: Arc<[PathBuf]> = sockets.into();
    Arc::new(move |rank| {
        let path = sockets[rank].clone();
        Box::pin(async move {
            let stream = UnixStream::connect(path).await?;
            Ok(Box::new(stream) as Box<dyn Io>)
        })
    })
}

/// Connects to all ranks and prepares them, within `prepare_deadline`.
pub(crate) async fn bring_up(config: &EngineConfig, dial: &Dial) -> Result<Ready, ShardError> {
    let deadline = Deadline {
        at: Instant::now() + config.prepare_deadline,
        config,
    };
    let clients = deadline
        .keep("connecting", connect(config.sockets.len(), dial))
        .await?;
    let described = deadline.keep("loading", describe(&clients)).await?;
    check_agreement(&described)?;
    let describe = described
        .into_iter()
        .next()
        .expect("a group has at least one rank");
    let mut prepare = prepare_request(config, &describe)?;
    let prepared = deadline
        .keep("preparing", prepare_all(&clients, &prepare))
        .await?;
    let limits = limits(config, &describe, &prepare, prepared.blocks)?;
    // So that a replay gets the same pool wherever it runs.
    prepare.blocks_max = prepared.blocks;

    let open = |(rank, client)| RankStream::open(rank, client, prepare.first_step, config.depth);
    let ranks = clients.into_iter().enumerate().map(open).collect();
    let group = ShardGroup::new(ranks, config.step_deadline);
    let facts = Facts {
        limits,
        describe,
        memory: prepared.memory,
    };
    Ok(Ready {
        group,
        facts,
        prepare,
    })
}

/// One deadline over all phases.
struct Deadline<'a> {
    at: Instant,
    config: &'a EngineConfig,
}

impl Deadline<'_> {
    async fn keep<T>(
        &self,
        phase: &'static str,
        work: impl Future<Output = Result<T, ShardError>>,
    ) -> Result<T, ShardError> {
        timeout_at(self.at, work).await.unwrap_or_else(|_| {
            Err(ShardError::PrepareDeadline {
                deadline: self.config.prepare_deadline,
                phase,
            })
        })
    }
}

// === connecting ===

async fn connect(ranks: usize, dial: &Dial) -> Result<Vec<ShardClient<Channel>>, ShardError> {
    try_join_all((0..ranks).map(|rank| connect_rank(rank, dial))).await
}

/// A shard listens when it has started; until then its socket is absent or refuses.
async fn connect_rank(rank: usize, dial: &Dial) -> Result<ShardClient<Channel>, ShardError> {
    loop {
        let dial = Arc::clone(dial);
        let connector = service_fn(move |_| {
            let connection = dial(rank);
            async move { connection.await.map(TokioIo::new) }
        });
        // The name is for the `Host` header only; the connector knows the way.
        let endpoint = Endpoint::from_static("http://shard")
            .initial_stream_window_size(WINDOW_BYTES)
            .initial_connection_window_size(WINDOW_BYTES);
        match endpoint.connect_with_connector(connector).await {
            Ok(channel) => {
                let client = ShardClient::new(channel);
                return Ok(client.max_decoding_message_size(RESULT_BYTES_MAX));
            }
            Err(error) => tracing::trace!(rank, %error, "not listening yet"),
        }
        sleep(RETRY).await;
    }
}

// === describing ===

async fn describe(clients: &[ShardClient<Channel>]) -> Result<Vec<Describe>, ShardError> {
    let calls = clients
        .iter()
        .cloned()
        .enumerate()
        .map(|(rank, mut client)| async move {
            let reply = client.describe(DescribeRequest).await;
            reply
                .map(tonic::Response::into_inner)
                .map_err(|status| call_failed(rank, "Describe", &status))
        });
    try_join_all(calls).await
}

/// All ranks say the same of the model and of the group, and each is where its socket says.
fn check_agreement(described: &[Describe]) -> Result<(), ShardError> {
    let first = &described[0];
    for (rank, this) in described.iter().enumerate() {
        let differ = |what, ours: &dyn ToString, theirs: &dyn ToString| {
            let (ours, theirs) = (ours.to_string(), theirs.to_string());
            if ours == theirs {
                Ok(())
            } else {
                Err(ShardError::Disagreement {
                    rank,
                    what,
                    ours,
                    theirs,
                })
            }
        };
        differ("its rank", &rank, &this.rank)?;
        differ("the number of ranks", &described.len(), &this.ranks)?;
        differ("the architecture", &first.architecture, &this.architecture)?;
        differ("the dtype", &first.dtype, &this.dtype)?;
        differ(
            "the context",
            &first.context_tokens_max,
            &this.context_tokens_max,
        )?;
        differ("the vocabulary", &first.vocab_size, &this.vocab_size)?;
        differ(
            "KV bytes a token",
            &first.kv_bytes_per_token,
            &this.kv_bytes_per_token,
        )?;
        differ(
            "block sizes",
            &format!("{:?}", first.block_tokens_supported),
            &format!("{:?}", this.block_tokens_supported),
        )?;
        differ(
            "who writes KV",
            &first.kv_written_in_attention,
            &this.kv_written_in_attention,
        )?;
    }
    Ok(())
}

// === preparing ===

fn prepare_request(config: &EngineConfig, describe: &Describe) -> Result<Prepare, ShardError> {
    let supported = &describe.block_tokens_supported;
    let unsupported = || ShardError::BlockTokens {
        wanted: config.block_tokens,
        supported: supported.clone(),
    };
    let block_tokens = match config.block_tokens {
        0 => supported.first().copied(),
        wanted => supported.contains(&wanted).then_some(wanted),
    };
    // A slot is quarantined for as long as plans that name it are in flight, and every running
    // sequence may end at once.
    let slots_max = config.running_max.saturating_mul(config.depth);
    Ok(Prepare {
        first_step: StepId(0),
        block_tokens: block_tokens
            .filter(|&tokens| tokens > 0)
            .ok_or_else(unsupported)?,
        slots_max,
        state_slots_max: slots_max.min(STATE_SLOTS_MAX),
        step_tokens_max: config.step_tokens_max,
        step_rows_max: config.running_max.min(config.step_tokens_max),
        prompt_logprob_tokens_max: PROMPT_LOGPROB_TOKENS_MAX.min(config.step_tokens_max),
        kv_dtype: config.kv_dtype.clone(),
        memory_fraction: config.memory_fraction,
        blocks_max: config.blocks_max,
    })
}

async fn prepare_all(
    clients: &[ShardClient<Channel>],
    request: &Prepare,
) -> Result<Prepared, ShardError> {
    let calls = clients
        .iter()
        .cloned()
        .enumerate()
        .map(|(rank, mut client)| async move {
            let reply = client.prepare(request.clone()).await;
            reply
                .map(tonic::Response::into_inner)
                .map_err(|status| call_failed(rank, "Prepare", &status))
        });
    let replies = try_join_all(calls).await?;
    let ours = replies[0].blocks;
    if let Some(rank) = replies.iter().position(|reply| reply.blocks != ours) {
        let theirs = replies[rank].blocks.to_string();
        let ours = ours.to_string();
        return Err(ShardError::Disagreement {
            rank,
            what: "blocks of the pool",
            ours,
            theirs,
        });
    }
    Ok(replies
        .into_iter()
        .next()
        .expect("a group has at least one rank"))
}

fn limits(
    config: &EngineConfig,
    describe: &Describe,
    prepare: &Prepare,
    blocks: u32,
) -> Result<Limits, ShardError> {
    let block_size = BlockSize::new(prepare.block_tokens).expect("it was checked to be positive");
    if blocks < 2 {
        return Err(ShardError::PoolTooSmall { blocks });
    }
    let context = config
        .context_tokens_max
        .unwrap_or(u32::MAX)
        .min(describe.context_tokens_max);
    Ok(Limits {
        block_size,
        blocks: Blocks(blocks),
        slots: prepare.slots_max,
        state_slots: prepare.state_slots_max,
        running_max: config.running_max,
        step_tokens_max: Tokens(config.step_tokens_max),
        prefill_tokens_max: Tokens(config.prefill_tokens_max.min(config.step_tokens_max)),
        prompt_logprob_tokens_max: Tokens(prepare.prompt_logprob_tokens_max),
        context_tokens_max: Tokens(context),
        vocab_size: describe.vocab_size,
        queue_max: config.queue_max,
        depth: config.depth,
        watermark: Limits::default_watermark(Blocks(blocks)),
        share_within_step: !describe.kv_written_in_attention,
        prefix_caching: config.prefix_caching,
    })
}

fn call_failed(rank: usize, call: &'static str, status: &tonic::Status) -> ShardError {
    ShardError::Call {
        rank,
        call,
        message: status.message().to_owned(),
    }
}
