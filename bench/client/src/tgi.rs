//! `text-generation-benchmark`: prompts and new tokens of whole batches, by the name and the flags
//! of TGI's program. That one takes a shard's place in a running server; this one is a client of it,
//! and writes the tables without a screen of its own.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::io::{self, IsTerminal, Write};
use std::sync::Arc;

use clap::parser::ValueSource;
use clap::{CommandFactory, FromArgMatches};
use serde_json::{Value, json};
use tokio::task::JoinSet;

use crate::args::{TGI_NAME, TgiArgs};
use crate::prompts::Random;
use crate::server::{Server, Shot};
use crate::stats::percentile;
use crate::{STATUS_FAILED, fail, usage};

/// Unless `--batch-size` names others.
const BATCHES: [usize; 6] = [1, 2, 4, 8, 16, 32];
/// Seconds that a request may take.
const PATIENCE_S: u64 = 600;
/// Words that the ids of prompts are taken from, and letters of a word.
const WORDS: usize = 512;
const WORD_LETTERS_MAX: u64 = 6;
const LETTERS: &[u8; 26] = b"abcdefghijklmnopqrstuvwxyz";
/// Headings of the two tables, and the last columns of the first.
const LATENCIES: &str = "
| step | batch size | average | lowest | highest | p50 | p90 | p99 |
|---|---|---|---|---|---|---|---|";
const PERCENTILES: [f64; 3] = [0.5, 0.9, 0.99];
const THROUGHPUTS: &str = "
| step | batch size | average | lowest | highest |
|---|---|---|---|---|";

/// Seconds of a step, by run.
type Column = fn(&Runs) -> &Vec<f64>;

/// What the runs of one batch size took, in seconds.
#[derive(Debug, Default)]
struct Runs {
    batch: usize,
    prefill: Vec<f64>,
    /// All tokens but the first.
    decode: Vec<f64>,
}

/// Measures a running server; the exit status. `args` is what follows the program's name.
pub fn run(args: &[OsString]) -> u8 {
    let line = std::iter::once(OsString::from(TGI_NAME)).chain(args.iter().cloned());
    let matches = TgiArgs::command().try_get_matches_from(line);
    let parsed = matches.and_then(|matches| {
        let args = TgiArgs::from_arg_matches(&matches)?;
        let typed = |name: &str| matches.value_source(name) == Some(ValueSource::CommandLine);
        Ok((warnings(&args, &typed), args))
    });
    let (warnings, args) = match parsed {
        Ok(parsed) => parsed,
        Err(error) => return usage(&error),
    };
    for warning in warnings {
        warn(&warning);
    }
    match measure(&args) {
        Ok(tables) => {
            // Nobody may be left to read it.
            drop(io::stdout().lock().write_all(tables.as_bytes()));
            0
        }
        Err(message) => fail(STATUS_FAILED, &message),
    }
}

/// A sentence for each flag that means nothing here.
fn warnings(args: &TgiArgs, typed: &dyn Fn(&str) -> bool) -> Vec<String> {
    let url = args.url();
    [
        (
            typed("master_shard_uds_path"),
            format!("--master-shard-uds-path has no effect: the server at {url} is measured"),
        ),
        (
            typed("revision"),
            "--revision has no effect: the server has its own".to_owned(),
        ),
        (
            args.watermark,
            "--watermark has no effect: /v1/completions has no watermark".to_owned(),
        ),
    ]
    .into_iter()
    .filter_map(|(is_asked, warning)| is_asked.then_some(warning))
    .collect()
}

fn warn(message: &str) {
    drop(writeln!(io::stderr(), "Warning: {message}"));
}

/// The tables.
fn measure(args: &TgiArgs) -> Result<String, String> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|error| format!("the runtime does not start: {error}"))?;
    let server = Server::new(&args.url(), args.api_key.as_deref(), PATIENCE_S)?;
    let server = Arc::new(server);
    runtime.block_on(async {
        let mut random = Random::new(0);
        let ids = ids(&server, &mut random).await.map_err(|error| {
            format!(
                "{error}; a running server is measured: start `headrace --model-id {}`, or \
                 measure without one by `headrace bench offline`",
                args.tokenizer_name
            )
        })?;
        let model = served(&server).await?;
        if model != args.tokenizer_name {
            let asked = &args.tokenizer_name;
            warn(&format!(
                "the server serves {model}, not {asked}, and is measured all the same"
            ));
        }
        let mut levels = Vec::new();
        for batch in args.batches() {
            let mut runs = Runs {
                batch,
                ..Runs::default()
            };
            for run in 0..args.warmups + args.runs {
                progress(&format!("batch {batch}, run {run}"));
                let shots = (0..batch).map(|_| args.shot(&ids, &mut random)).collect();
                let (prefill, decode) = together(&server, shots, args.decode_length).await?;
                if run >= args.warmups {
                    runs.prefill.push(prefill);
                    runs.decode.push(decode);
                }
            }
            levels.push(runs);
        }
        Ok(tables(args, &model, &levels))
    })
}

fn progress(what: &str) {
    if io::stderr().is_terminal() {
        drop(writeln!(io::stderr(), "benchmark | {what} …"));
    }
}

/// Ids that the server's tokenizer makes of words, for prompts that every model can read.
async fn ids(server: &Server, random: &mut Random) -> Result<Vec<u32>, String> {
    let mut text = String::new();
    for _ in 0..WORDS {
        for _ in 0..=random.below(WORD_LETTERS_MAX) {
            text.push(char::from(LETTERS[random.index(LETTERS.len())]));
        }
        text.push(' ');
    }
    let tokens = answer(server, "/tokenize", &json!({"inputs": text})).await?;
    // What stands for no text was put there by the tokenizer.
    let tokens = tokens.as_array().into_iter().flatten();
    let ids = tokens.filter(|token| token["start"] != token["stop"]);
    let ids = ids.filter_map(|token| u32::try_from(token["id"].as_u64()?).ok());
    let ids: BTreeSet<u32> = ids.collect();
    if ids.is_empty() {
        return Err("/tokenize answers without tokens; is it the server's port?".to_owned());
    }
    Ok(ids.into_iter().collect())
}

/// The name of the model that is served.
async fn served(server: &Server) -> Result<String, String> {
    let body = json!({"model": "tgi", "prompt": "a", "max_tokens": 1});
    let told = answer(server, "/v1/completions", &body).await?;
    let model = told["model"].as_str().map(str::to_owned);
    model.ok_or_else(|| "/v1/completions answers without a model's name".to_owned())
}

async fn answer(server: &Server, path: &'static str, body: &Value) -> Result<Value, String> {
    let body = body.to_string().into();
    let told = server.ask(Shot { path, body }).await?;
    serde_json::from_slice(&told).map_err(|error| format!("{path}: {error}"))
}

/// Seconds until all have their first token, and from there to the last.
async fn together(
    server: &Arc<Server>,
    shots: Vec<Shot>,
    tokens: u32,
) -> Result<(f64, f64), String> {
    let mut answers = JoinSet::new();
    for shot in shots {
        let server = Arc::clone(server);
        answers.spawn(async move { server.send(shot).await });
    }
    let (mut first, mut last) = (0.0_f64, 0.0_f64);
    while let Some(seen) = answers.join_next().await {
        let seen = seen.map_err(|error| format!("a request's task failed: {error}"))??;
        if seen.tokens != u64::from(tokens) {
            let given = seen.tokens;
            return Err(format!("a sequence ended after {given} of {tokens} tokens"));
        }
        first = first.max(seen.ttft);
        last = last.max(seen.latency);
    }
    Ok((first, last - first))
}

// === impl TgiArgs ===

impl TgiArgs {
    fn url(&self) -> String {
        let here = || format!("http://127.0.0.1:{}", self.port);
        self.url.clone().unwrap_or_else(here)
    }

    fn batches(&self) -> Vec<usize> {
        if self.batch_size.is_empty() {
            return BATCHES.to_vec();
        }
        self.batch_size.iter().copied().map(usize::from).collect()
    }

    /// One sequence's request.
    fn shot(&self, ids: &[u32], random: &mut Random) -> Shot {
        let id = |_| ids[random.index(ids.len())];
        let prompt: Vec<u32> = (0..self.sequence_length).map(id).collect();
        // With log-probabilities every token has an event of its own, whatever its text is.
        let mut body = json!({
            "model": "tgi", "prompt": prompt, "max_tokens": self.decode_length, "stream": true,
            "ignore_eos": true, "logprobs": self.top_n_tokens.unwrap_or(0),
            "top_k": self.top_k, "top_p": self.top_p, "typical_p": self.typical_p,
            "repetition_penalty": self.repetition_penalty,
            "frequency_penalty": self.frequency_penalty,
        });
        body["temperature"] = if self.is_drawn() {
            self.temperature.into()
        } else {
            0.into()
        };
        let body = body.to_string().into();
        Shot {
            path: "/v1/completions",
            body,
        }
    }

    /// Whether tokens are drawn, by TGI's rule: a warper at its neutral value does not ask for it.
    #[expect(clippy::float_cmp, reason = "only the neutral value itself is neutral")]
    fn is_drawn(&self) -> bool {
        self.do_sample
            || self.temperature.is_some_and(|t| t != 1.0)
            || self.top_k.is_some()
            || self.top_p.is_some_and(|p| p < 1.0)
            || self.typical_p.is_some_and(|p| p < 1.0)
    }
}

// === free functions ===

/// Parameters, latencies and throughputs, as Markdown.
fn tables(args: &TgiArgs, model: &str, levels: &[Runs]) -> String {
    let steps = f64::from(args.decode_length - 1);
    let (prefill, decode): (Column, Column) = (|runs| &runs.prefill, |runs| &runs.decode);
    let mut out = parameters(args, model);
    push(&mut out, LATENCIES);
    for (step, seconds, parts) in [
        ("Prefill", prefill, 1.0),
        ("Decode (token)", decode, steps),
        ("Decode (total)", decode, 1.0),
    ] {
        for runs in levels {
            let ms = seconds(runs).iter().map(|seconds| seconds * 1e3 / parts);
            row(
                &mut out,
                (step, runs.batch),
                &spread(ms, &PERCENTILES),
                "ms",
            );
        }
    }
    push(&mut out, THROUGHPUTS);
    for (step, seconds, tokens) in [("Prefill", prefill, 1.0), ("Decode", decode, steps)] {
        for runs in levels {
            let tokens = runs.batch as f64 * tokens;
            let rates = seconds(runs).iter().map(|seconds| tokens / seconds);
            row(
                &mut out,
                (step, runs.batch),
                &spread(rates, &[]),
                "tokens/s",
            );
        }
    }
    out
}

fn parameters(args: &TgiArgs, model: &str) -> String {
    fn given<T: std::fmt::Display>(value: Option<T>) -> String {
        value.map_or_else(|| "–".to_owned(), |value| value.to_string())
    }
    let mut out = String::new();
    push(&mut out, "| parameter | value |\n|---|---|");
    for (name, value) in [
        ("Model", model.to_owned()),
        ("Server", args.url()),
        ("Sequence length", args.sequence_length.to_string()),
        ("Decode length", args.decode_length.to_string()),
        ("Runs", args.runs.to_string()),
        ("Warmups", args.warmups.to_string()),
        ("Top N tokens", given(args.top_n_tokens)),
        ("Temperature", given(args.temperature)),
        ("Top K", given(args.top_k)),
        ("Top P", given(args.top_p)),
        ("Typical P", given(args.typical_p)),
        ("Repetition penalty", given(args.repetition_penalty)),
        ("Frequency penalty", given(args.frequency_penalty)),
        ("Tokens are drawn", args.is_drawn().to_string()),
    ] {
        push(&mut out, &format!("| {name} | {value} |"));
    }
    out
}

/// Average, lowest and highest, then the values at these shares.
fn spread(values: impl Iterator<Item = f64>, shares: &[f64]) -> Vec<f64> {
    let mut values: Vec<f64> = values.collect();
    let average = values.iter().sum::<f64>() / values.len().max(1) as f64;
    let mut at = |share: &f64| percentile(&mut values, *share).unwrap_or(f64::NAN);
    let ends = [at(&0.0), at(&1.0)];
    std::iter::once(average)
        .chain(ends)
        .chain(shares.iter().map(at))
        .collect()
}

fn row(out: &mut String, (step, batch): (&str, usize), figures: &[f64], unit: &str) {
    let figures: Vec<String> = figures
        .iter()
        .map(|figure| format!("{figure:.2} {unit}"))
        .collect();
    push(
        out,
        &format!("| {step} | {batch} | {} |", figures.join(" | ")),
    );
}

fn push(out: &mut String, line: &str) {
    out.push_str(line);
    out.push('\n');
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    fn parsed(line: &str) -> TgiArgs {
        let words = std::iter::once(TGI_NAME).chain(line.split_whitespace());
        TgiArgs::try_parse_from(words).expect("it parses")
    }

    #[test]
    fn every_flag_of_tgi_is_taken() {
        let args = parsed(
            "--tokenizer-name m --revision r --batch-size 1 --batch-size 2 --sequence-length 10 \
             --decode-length 8 --runs 10 --warmups 1 --master-shard-uds-path /tmp/s \
             --temperature 0.5 --top-k 5 --top-p 0.9 --typical-p 0.8 --repetition-penalty 1.1 \
             --frequency-penalty -0.1 --watermark --do-sample --top-n-tokens 2",
        );
        assert_eq!(args.batches(), [1, 2]);
        let typed = |name: &str| matches!(name, "master_shard_uds_path" | "revision");
        assert_eq!(warnings(&args, &typed).len(), 3);
        let short = parsed("-t m -b 4 -s 3 -d 2 -r 1 -w 0 -m /tmp/s");
        assert_eq!((short.batches(), short.sequence_length), (vec![4], 3));
        assert_eq!(parsed("-t m").batches(), BATCHES);
        assert!(warnings(&parsed("-t m"), &|_| false).is_empty());
        for wrong in ["", "-t m -b 0", "-t m -d 1", "-t m -r 0"] {
            let words = std::iter::once(TGI_NAME).chain(wrong.split_whitespace());
            assert!(TgiArgs::try_parse_from(words).is_err(), "{wrong}");
        }
    }

    #[test]
    fn tokens_are_drawn_when_tgi_would_draw_them() {
        let body = |flags: &str| -> Value {
            let args = parsed(&format!("-t m -s 3 {flags}"));
            let shot = args.shot(&[7], &mut Random::new(0));
            serde_json::from_slice(&shot.body).expect("JSON")
        };
        for (flags, temperature) in [
            ("", json!(0)),
            (
                "--temperature 1.0 --top-p 1.0 --repetition-penalty 1.2",
                json!(0),
            ),
            ("--temperature 0.5", json!(0.5)),
            ("--do-sample", Value::Null),
            ("--top-k 3", Value::Null),
        ] {
            assert_eq!(body(flags)["temperature"], temperature, "{flags}");
        }
        let body = body("--top-k 3 --top-n-tokens 2");
        assert_eq!((&body["top_k"], &body["logprobs"]), (&json!(3), &json!(2)));
        assert_eq!(body["prompt"], json!([7, 7, 7]));
    }

    #[test]
    fn tables_tell_each_batch_size() {
        let args = parsed("-t m -d 5");
        let levels = [Runs {
            batch: 2,
            prefill: vec![0.010, 0.030],
            decode: vec![0.040, 0.080],
        }];
        let tables = tables(&args, "org/m", &levels);
        for line in [
            "| Model | org/m |",
            "| Temperature | – |",
            "| Prefill | 2 | 20.00 ms | 10.00 ms | 30.00 ms | 20.00 ms | 28.00 ms | 29.80 ms |",
            "| Decode (token) | 2 | 15.00 ms | 10.00 ms | 20.00 ms | 15.00 ms | 19.00 ms | 19.90 ms |",
            "| Decode (total) | 2 | 60.00 ms | 40.00 ms | 80.00 ms | 60.00 ms | 76.00 ms | 79.60 ms |",
            "| Prefill | 2 | 133.33 tokens/s | 66.67 tokens/s | 200.00 tokens/s |",
            "| Decode | 2 | 150.00 tokens/s | 100.00 tokens/s | 200.00 tokens/s |",
        ] {
            assert!(
                tables.lines().any(|other| other == line),
                "{line} in {tables}"
            );
        }
    }
}
