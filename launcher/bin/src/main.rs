//! The one binary: what it does depends on the name it is called by and on its first argument.
//! `headrace [serve]` and `text-generation-launcher` serve, `headrace router` is the router,
//! `headrace bench` and `text-generation-benchmark` measure, `text-generation-router` tells the
//! schema and refuses the rest, and what is left is Python's, `text-generation-server` included.

use std::env;
use std::ffi::OsString;
use std::io::{self, Write};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, ExitCode};

use headrace_launcher::{Programs, PythonNotFound, find_python};

/// TGI's programs. A wheel installs scripts of these names, which put them before the arguments.
const TGI_NAMES: [&str; 4] = [
    "text-generation-launcher",
    "text-generation-server",
    "text-generation-router",
    "text-generation-benchmark",
];

/// What `text-generation-router` can be asked for.
const ROUTER_HELP: &str = "\
usage: text-generation-router print-schema

  print-schema    the description of the API (OpenAPI), as JSON

A router serves together with the shards it drives, and text-generation-launcher starts both.";

/// Why it does nothing else, and what does.
const ROUTER_REFUSAL: &str = "\
`text-generation-router` starts no router: one serves together with the shards it drives, and \
`text-generation-launcher` starts both, with the same flags. --tokenizer-name is its --model-id; \
--master-shard-uds-path has no counterpart, since no shard runs without its router. \
`text-generation-router print-schema` prints the description of the API";

fn main() -> ExitCode {
    let mut argv: Vec<OsString> = env::args_os().collect();
    if argv
        .get(1)
        .is_some_and(|word| TGI_NAMES.iter().any(|name| word == name))
    {
        argv.remove(0);
    }
    let called = argv.first().map(PathBuf::from).unwrap_or_default();
    let called_launcher = called.ends_with("text-generation-launcher");
    if called.ends_with("text-generation-server") {
        argv[0] = "tgi-server".into();
        return python(&argv);
    }
    if called.ends_with("text-generation-router") {
        return tgi_router(&argv[1..]);
    }
    if called.ends_with("text-generation-benchmark") {
        return ExitCode::from(headrace_bench::run_tgi(&argv[1..]));
    }
    let command = argv
        .get(1)
        .and_then(|argument| argument.to_str())
        .map(str::to_owned);
    match command.as_deref() {
        Some("router") if !called_launcher => router(&argv[2..]),
        Some("bench") if !called_launcher => {
            ExitCode::from(headrace_bench::run(&argv[2..], programs))
        }
        Some("shard" | "download" | "quantize" | "compile" | "replay" | "describe")
            if !called_launcher =>
        {
            python(&argv[1..])
        }
        Some(word) if word != "serve" && !word.starts_with('-') => fail(
            2,
            &format!("unknown command `{word}`; `headrace --help` names them"),
        ),
        _ => {
            if command.as_deref() == Some("serve") {
                argv.remove(1);
            }
            ExitCode::from(headrace_launcher::run(argv, programs))
        }
    }
}

fn programs() -> Result<Programs, PythonNotFound> {
    let binary = env::current_exe().unwrap_or_default();
    let python = find_python(&binary, env::var_os("VIRTUAL_ENV"))?;
    Ok(Programs {
        router: vec![binary.into(), "router".into()],
        server: vec![python.into(), "-m".into(), "headrace".into()],
    })
}

fn router(args: &[OsString]) -> ExitCode {
    match args {
        [flag, file] if flag == "--config" => match headrace_config::load(file.as_ref()) {
            Ok(serve) => headrace_router::run(serve),
            Err(error) => fail(1, &error.to_string()),
        },
        _ => fail(2, "usage: headrace router --config serve.json"),
    }
}

/// TGI's router by itself. Whatever flags stand around it, `print-schema` is a command.
fn tgi_router(args: &[OsString]) -> ExitCode {
    let has = |words: &[&str]| args.iter().any(|arg| words.iter().any(|word| arg == word));
    let told = if has(&["--help", "-h"]) {
        ROUTER_HELP
    } else if has(&["--version", "-V"]) {
        concat!("text-generation-router ", env!("CARGO_PKG_VERSION"))
    } else if has(&["print-schema"]) {
        headrace_router::schema()
    } else {
        return fail(2, ROUTER_REFUSAL);
    };
    // Nobody may be left to read it.
    drop(writeln!(io::stdout(), "{told}"));
    ExitCode::SUCCESS
}

/// Becomes Python.
fn python(args: &[OsString]) -> ExitCode {
    let server = match programs() {
        Ok(programs) => programs.server,
        Err(error) => return fail(1, &error.to_string()),
    };
    let error = Command::new(&server[0])
        .args(&server[1..])
        .args(args)
        .exec();
    fail(
        1,
        &format!("{} cannot be started: {error}", server[0].display()),
    )
}

fn fail(status: u8, message: &str) -> ExitCode {
    // Nobody may be left to read it.
    drop(writeln!(io::stderr(), "Error: {message}"));
    ExitCode::from(status)
}
