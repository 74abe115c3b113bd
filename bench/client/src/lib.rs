//! `headrace bench`: how fast a server is. `offline` drives shards through the engine without HTTP;
//! `http` is a client of any server that streams; `tgi` is one by the name and the flags of TGI's
//! program.
//!
//! Reading order: the command line (`args`), the scenarios (`offline`; `http` and `tgi` with their
//! `server` and `wire`), and what they share (`prompts`, `stats`, `report`).

mod args;
mod http;
mod offline;
mod prompts;
mod report;
mod server;
mod stats;
mod tgi;
mod wire;

use std::ffi::OsString;
use std::io::{self, Write};

use clap::Parser;
use headrace_launcher::{Programs, PythonNotFound};

use crate::args::Cli;

pub use crate::tgi::run as run_tgi;

/// Everything wrong with a command line; clap's customary status.
const STATUS_USAGE: u8 = 2;
const STATUS_FAILED: u8 = 1;

/// Runs a benchmark; the exit status. `args` is what follows `headrace bench`.
pub fn run(
    args: &[OsString],
    find_programs: impl FnOnce() -> Result<Programs, PythonNotFound>,
) -> u8 {
    match args.first().and_then(|word| word.to_str()) {
        Some("offline") => offline::run(&args[1..], find_programs),
        Some("http") => http::run(&args[1..]),
        _ => {
            let line = std::iter::once("headrace bench".into()).chain(args.iter().cloned());
            match Cli::try_parse_from(line) {
                Ok(Cli { command }) => fail(STATUS_USAGE, &format!("unknown benchmark {command}")),
                Err(error) => usage(&error),
            }
        }
    }
}

/// Help, too, is an error of clap's; the exit status.
fn usage(error: &clap::Error) -> u8 {
    drop(error.print());
    if error.use_stderr() { STATUS_USAGE } else { 0 }
}

fn fail(status: u8, message: &str) -> u8 {
    // Nobody may be left to read it.
    drop(writeln!(io::stderr(), "Error: {message}"));
    status
}
