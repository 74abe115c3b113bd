//! The command lines.

use std::ffi::OsString;
use std::path::PathBuf;
use std::str::FromStr;

use clap::{Args, Command, Parser, ValueEnum};

const ABOUT: &str = "Measure how fast a server is.

Two benchmarks: `offline` starts the shards and drives them through the engine, without HTTP; \
`http` loads a server that is running, this one or another that streams /v1/completions or \
/generate_stream.";

const BENCHMARKS: &str = "\
Benchmarks:
  headrace bench offline --help    decode steps, prefill and throughput, in process
  headrace bench http --help       throughput, TTFT and ITL of a running server

Examples:
  headrace bench offline --model-id ./my-model --only decode,prefill --json figures.jsonl
  headrace bench http --url http://127.0.0.1:3000 -c 1,16,64,256

Lines of JSON go to standard output as scenarios end, or to the file that --json names, which is \
appended to; then the table goes to standard output. Progress and the server's log go to \
standard error.";

/// `headrace bench`; only its help is used.
#[derive(Debug, Parser)]
#[command(name = "headrace bench", about = ABOUT, after_help = BENCHMARKS, arg_required_else_help = true)]
pub(crate) struct Cli {
    /// offline or http
    #[arg(value_name = "BENCHMARK")]
    pub(crate) command: String,
}

const OFFLINE_ABOUT: &str = "Measure the shards through the engine, without HTTP.

Every flag of `headrace serve` is taken too and means the same. Prompts are random token ids, \
tokens are greedy, the end of text is ignored. Unless their flags are given, the prefix cache is off \
and no step is cut for a latency target.

decode: (time of the long run − time of one token) / steps between, at one prompt length.
prefill: the best of several runs of one prompt and one new token.
offline: all requests of a mix submitted at once.";

/// `headrace bench offline`.
#[derive(Debug, Clone, Parser)]
#[command(name = "headrace bench offline", about = OFFLINE_ABOUT, max_term_width = 100)]
pub(crate) struct OfflineArgs {
    #[command(flatten, next_help_heading = "What is measured")]
    pub(crate) scenarios: ScenarioArgs,
    #[command(flatten, next_help_heading = "What is reported")]
    pub(crate) report: ReportArgs,
}

#[derive(Debug, Clone, Args)]
pub(crate) struct ScenarioArgs {
    /// Scenarios to run
    #[arg(long, value_enum, value_delimiter = ',', value_name = "LIST", default_values_t = [Scenario::Decode, Scenario::Prefill, Scenario::Offline])]
    pub(crate) only: Vec<Scenario>,
    /// decode: sequences side by side
    #[arg(long, value_delimiter = ',', value_name = "LIST", default_values_t = [1, 8, 32, 64, 128, 256])]
    pub(crate) batches: Vec<usize>,
    /// decode: tokens of a prompt
    #[arg(long, value_name = "N", default_value_t = 512)]
    pub(crate) decode_isl: usize,
    /// decode: steps that are timed
    #[arg(long, value_name = "N", default_value_t = 128)]
    pub(crate) decode_steps: u32,
    /// prefill: tokens of a prompt
    #[arg(long, value_delimiter = ',', value_name = "LIST", default_values_t = [512, 2048, 8192, 32768])]
    pub(crate) lengths: Vec<usize>,
    /// offline: requests x prompt tokens / new tokens
    #[arg(long, value_delimiter = ',', value_name = "LIST", default_values_t = [Mix::new(1000, 512, 256), Mix::new(300, 2048, 128), Mix::new(512, 128, 512)])]
    pub(crate) mixes: Vec<Mix>,
    /// Small numbers, to try whether it runs: they replace all of the above but --only
    #[arg(long)]
    pub(crate) quick: bool,
    /// Seed of the prompts
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) seed: u64,
}

#[derive(Debug, Clone, Args)]
pub(crate) struct ReportArgs {
    /// Name in the figures [default: the model's]
    #[arg(long, value_name = "NAME")]
    pub(crate) label: Option<String>,
    /// File that lines of JSON are appended to
    #[arg(long, value_name = "FILE")]
    pub(crate) json: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Scenario {
    Decode,
    Prefill,
    Offline,
}

/// Requests that are submitted together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Mix {
    pub(crate) requests: usize,
    /// Prompt tokens of each.
    pub(crate) isl: usize,
    /// New tokens of each.
    pub(crate) osl: u32,
}

const HTTP_ABOUT: &str = "Load a running server and measure throughput, TTFT and ITL.

Closed loop (-c): so many clients, each with one request at a time. Open loop (--rate): requests \
arrive by a Poisson process whatever the server does.

TTFT is from the sending of a request to its first chunk, ITL the gap between two chunks, \
throughput all output tokens over the time from the first request to the end of the last answer; \
these are the definitions of `vllm bench serve`. A chunk may carry several tokens: their number \
is reported. Output tokens are the server's own count.";

/// `headrace bench http`.
#[derive(Debug, Clone, Parser)]
#[command(name = "headrace bench http", about = HTTP_ABOUT, max_term_width = 100)]
pub(crate) struct HttpArgs {
    #[command(flatten, next_help_heading = "The server")]
    pub(crate) server: ServerArgs,
    #[command(flatten, next_help_heading = "The load")]
    pub(crate) load: LoadArgs,
    #[command(flatten, next_help_heading = "What is reported")]
    pub(crate) report: ReportArgs,
}

#[derive(Debug, Clone, Args)]
pub(crate) struct ServerArgs {
    /// Where it listens
    #[arg(long, default_value = "http://127.0.0.1:3000")]
    pub(crate) url: String,
    /// Route: /v1/completions or TGI's /generate_stream
    #[arg(long, value_enum, default_value_t = Api::Completions, hide_possible_values = true, value_name = "completions|tgi")]
    pub(crate) api: Api,
    /// The `model` field of /v1/completions
    #[arg(long, default_value = "tgi")]
    pub(crate) model: String,
    /// Bearer token
    #[arg(long, env = "API_KEY", hide_env_values = true, value_name = "KEY")]
    pub(crate) api_key: Option<String>,
}

#[derive(Debug, Clone, Args)]
pub(crate) struct LoadArgs {
    /// Closed loop: clients at one time, one level each
    #[arg(short, long, value_delimiter = ',', value_name = "LIST", default_values_t = [1, 16, 64, 256])]
    pub(crate) concurrency: Vec<usize>,
    /// Open loop instead: requests a second
    #[arg(long, value_name = "R")]
    pub(crate) rate: Option<f64>,
    /// Open loop: seconds in which requests are sent
    #[arg(long, value_name = "SECONDS", default_value_t = 30.0)]
    pub(crate) duration: f64,
    /// Requests a level [default: 4 a client, from 8 to 1024]
    #[arg(short = 'n', long, value_name = "N")]
    pub(crate) requests: Option<usize>,
    /// Requests before the first level, which are not measured
    #[arg(long, value_name = "N", default_value_t = 4)]
    pub(crate) warmup: usize,
    /// Tokens of a prompt
    #[arg(long, value_name = "N", default_value_t = 512)]
    pub(crate) isl: usize,
    /// New tokens of an answer
    #[arg(long, value_name = "N", default_value_t = 256)]
    pub(crate) osl: u32,
    /// Folder with tokenizer.json: prompts are texts of exactly --isl tokens
    #[arg(long, value_name = "DIR")]
    pub(crate) tokenizer: Option<PathBuf>,
    /// Without --tokenizer prompts are random token ids below this number
    #[arg(long, value_name = "N", default_value_t = 32_000)]
    pub(crate) vocab: u32,
    /// Seconds a request may take
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    pub(crate) timeout: u64,
    /// Threads of this client
    #[arg(long, value_name = "N", default_value_t = 2)]
    pub(crate) threads: usize,
    /// Seed of the prompts
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) seed: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Api {
    Completions,
    Tgi,
}

/// What the binary is called as TGI's benchmark.
pub(crate) const TGI_NAME: &str = "text-generation-benchmark";
const TGI_ABOUT: &str = "Measure prompts and new tokens of whole batches on a running server.

The flags are those of TGI's program of this name. So many sequences as a batch has are sent at \
one time, again and again; the tables go to standard output.

Prefill: from the sending to the first token of the last sequence. Decode: from there to the last \
token of all. Throughput counts new tokens.";

/// `text-generation-benchmark`.
#[derive(Debug, Clone, Parser)]
#[command(name = TGI_NAME, about = TGI_ABOUT, version, max_term_width = 100)]
pub(crate) struct TgiArgs {
    /// The model that the server is expected to serve; another is measured with a warning
    #[arg(short, long, env = "TOKENIZER_NAME", value_name = "NAME")]
    pub(crate) tokenizer_name: String,
    /// Without effect: the server has its own
    #[arg(long, default_value = "main")]
    pub(crate) revision: String,
    /// Sequences at one time; may be given several times [default: 1 2 4 8 16 32]
    #[arg(short, long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    pub(crate) batch_size: Vec<u16>,
    /// Tokens of a prompt
    #[arg(short, long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) sequence_length: u32,
    /// New tokens of a sequence
    #[arg(short, long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u32).range(2..))]
    pub(crate) decode_length: u32,
    /// Batches of each size that are measured
    #[arg(short, long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) runs: u32,
    /// Batches of each size before, which are not
    #[arg(short, long, value_name = "N", default_value_t = 1)]
    pub(crate) warmups: u32,
    /// Without effect: shards take requests from their router only; see --url
    #[arg(
        short,
        long,
        value_name = "PATH",
        default_value = "/tmp/text-generation-server-0"
    )]
    pub(crate) master_shard_uds_path: String,
    /// Divides the logits
    #[arg(long)]
    pub(crate) temperature: Option<f32>,
    /// Only the most probable tokens, so many of them
    #[arg(long)]
    pub(crate) top_k: Option<u32>,
    /// Only the most probable tokens, up to this mass
    #[arg(long)]
    pub(crate) top_p: Option<f32>,
    /// Only the most typical tokens, up to this mass
    #[arg(long)]
    pub(crate) typical_p: Option<f32>,
    /// Above 1, tokens that occurred become less probable
    #[arg(long)]
    pub(crate) repetition_penalty: Option<f32>,
    /// Subtracted from a token's logit for each time it occurred
    #[arg(long, allow_negative_numbers = true)]
    pub(crate) frequency_penalty: Option<f32>,
    /// Without effect: /v1/completions has no watermark
    #[arg(long)]
    pub(crate) watermark: bool,
    /// Tokens are drawn, whatever else is asked for
    #[arg(long)]
    pub(crate) do_sample: bool,
    /// Alternatives told with each token
    #[arg(long, value_name = "N")]
    pub(crate) top_n_tokens: Option<u32>,
    /// Where the server listens [default: --port on this machine]
    #[arg(long)]
    pub(crate) url: Option<String>,
    /// Port of a server on this machine
    #[arg(long, env = "PORT", default_value_t = 3000)]
    pub(crate) port: u16,
    /// Bearer token
    #[arg(long, env = "API_KEY", hide_env_values = true, value_name = "KEY")]
    pub(crate) api_key: Option<String>,
}

/// Parts what `command` knows from what is somebody else's: ours and theirs, in order. After `--`
/// everything is theirs.
pub(crate) fn part(args: &[OsString], command: &Command) -> (Vec<OsString>, Vec<OsString>) {
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    let mut args = args.iter().cloned();
    while let Some(arg) = args.next() {
        let text = arg.to_string_lossy().into_owned();
        if text == "--" {
            theirs.extend(args.by_ref());
            break;
        }
        if text == "-h" || text == "--help" {
            ours.push(arg);
            continue;
        }
        let (name, value) = match text.split_once('=') {
            Some((name, _)) => (name, true),
            None => (text.as_str(), false),
        };
        let known = name.strip_prefix("--").and_then(|long| {
            command
                .get_arguments()
                .find(|arg| arg.get_long() == Some(long))
        });
        let Some(known) = known else {
            theirs.push(arg);
            continue;
        };
        ours.push(arg);
        if known.get_action().takes_values() && !value {
            ours.extend(args.next());
        }
    }
    (ours, theirs)
}

// === impl Mix ===

impl Mix {
    pub(crate) const fn new(requests: usize, isl: usize, osl: u32) -> Self {
        Self { requests, isl, osl }
    }
}

impl std::fmt::Display for Mix {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}x{}/{}", self.requests, self.isl, self.osl)
    }
}

impl FromStr for Mix {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let parse = || {
            let (requests, lengths) = text.split_once('x')?;
            let (isl, osl) = lengths.split_once('/')?;
            let mix = Self::new(requests.parse().ok()?, isl.parse().ok()?, osl.parse().ok()?);
            (mix.requests > 0 && mix.isl > 0 && mix.osl > 0).then_some(mix)
        };
        parse().ok_or_else(|| format!("`{text}` is not of the form 1000x512/256"))
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    fn words(text: &str) -> Vec<OsString> {
        text.split_whitespace().map(Into::into).collect()
    }

    #[test]
    fn our_flags_are_told_from_the_servers() {
        let args = words(
            "--model-id x --only decode --max-running=512 --quick --batches=1,2 -p 0 -- --seed 1",
        );
        let (ours, theirs) = part(&args, &OfflineArgs::command());
        assert_eq!(ours, words("--only decode --quick --batches=1,2"));
        assert_eq!(
            theirs,
            words("--model-id x --max-running=512 -p 0 --seed 1")
        );
    }

    #[test]
    fn flags_of_the_benchmark_do_not_hide_flags_of_the_server() {
        let ours = OfflineArgs::command();
        let theirs = headrace_config::Typed::command();
        for arg in ours.get_arguments().filter_map(clap::Arg::get_long) {
            let hidden = theirs
                .get_arguments()
                .any(|other| other.get_long() == Some(arg));
            assert!(!hidden || arg == "help", "--{arg} means two things");
        }
    }

    #[test]
    fn a_mix_is_read_and_written_alike() {
        let mix: Mix = "300x2048/128".parse().expect("a mix");
        assert_eq!(mix, Mix::new(300, 2048, 128));
        assert_eq!(mix.to_string(), "300x2048/128");
        for wrong in ["", "1x2", "0x1/1", "ax1/1", "1x1/0", "1x1/1/1"] {
            assert!(wrong.parse::<Mix>().is_err(), "{wrong}");
        }
    }
}
