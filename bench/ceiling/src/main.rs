//! How many tokens the router can carry: the real router over HTTP, a stub in place of the shard
//! that answers every plan at once, and a client with a thousand open streams, each a process of
//! its own. `taskset -c 0,1 headrace-ceiling` measures on two cores.
//!
//! Each token says when it was drawn: the stub draws the time of day as its id (see [`stamp`]), and
//! the client subtracts. So the added latency is from the moment before the stub encodes a result
//! to the moment after the client has read the event, queueing in the client included.

mod client;
mod process;
mod report;
mod stage;
mod stamp;
mod stub;

use std::error::Error;
use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};

/// Measures how many tokens the router carries on the cores it is given.
#[derive(Debug, Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    part: Option<Part>,
    #[command(flatten)]
    load: Load,
}

/// One of the processes; started by the benchmark itself.
#[derive(Debug, Subcommand)]
enum Part {
    /// The stub shard.
    #[command(hide = true)]
    Stub {
        #[arg(long)]
        socket: PathBuf,
        #[arg(long)]
        step_us: u64,
        #[arg(long)]
        blocks: u32,
    },
    /// The router.
    #[command(hide = true)]
    Router {
        #[arg(long)]
        config: PathBuf,
    },
}

/// What is measured.
#[derive(Debug, Clone, Args)]
struct Load {
    /// Streams open at one time.
    #[arg(long, default_value_t = 1000)]
    streams: u32,
    /// Tokens of each, where the shard answers at once.
    #[arg(long, default_value_t = 500)]
    tokens: u32,
    /// How often all streams are opened again.
    #[arg(long, default_value_t = 10)]
    waves: u32,
    /// Tokens a second of all streams, where the shard sets the pace,
    #[arg(long, default_value_t = 50_000)]
    rate: u32,
    /// and for how long.
    #[arg(long, default_value_t = 3)]
    seconds: u32,
    /// Collector that spans are sent to; without one nothing is traced.
    #[arg(long)]
    otlp_endpoint: Option<String>,
    /// The share of requests that are traced, where there is a collector.
    #[arg(long, default_value_t = 1.0)]
    traced: f64,
    /// Only JSON.
    #[arg(long)]
    json: bool,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let outcome = match cli.part {
        Some(Part::Router { config }) => match headrace_config::load(&config) {
            Ok(serve) => return headrace_router::run(serve),
            Err(error) => Err(error.into()),
        },
        Some(Part::Stub {
            socket,
            step_us,
            blocks,
        }) => stub::run(&socket, Duration::from_micros(step_us), blocks),
        None => measure(&cli.load),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            drop(writeln!(io::stderr(), "headrace-ceiling: {error}"));
            ExitCode::FAILURE
        }
    }
}

/// Both measurements: as fast as it goes, and at the target's pace.
fn measure(load: &Load) -> Result<(), Box<dyn Error>> {
    // One thread: what the client takes is what a client takes.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let step = Duration::from_secs(load.streams.into()) / load.rate;
    let paced = (load.rate * load.seconds / load.streams).max(1);
    let mut figures = Vec::new();
    for (tokens, step) in [(load.tokens, Duration::ZERO), (paced, step)] {
        figures.push(runtime.block_on(stage::measure(load, tokens, step))?);
    }
    let mut out = io::stdout().lock();
    if load.json {
        writeln!(out, "{:#}", report::json(load, &figures))?;
    } else {
        writeln!(out, "{}", report::table(load, &figures))?;
    }
    Ok(())
}
