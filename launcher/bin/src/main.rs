//! The one binary: what it does depends on the name it is called by and on its first argument.
//! `headrace [serve]` and `text-generation-launcher` serve, `headrace router` is the router,
//! `headrace bench` measures, and the rest is Python's, `text-generation-server` included.

use std::env;
use std::ffi::OsString;
use std::io::{self, Write};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, ExitCode};

use headrace_launcher::{Programs, PythonNotFound, find_python};

fn main() -> ExitCode {
    let mut argv: Vec<OsString> = env::args_os().collect();
    let called = argv.first().map(PathBuf::from).unwrap_or_default();
    let called_launcher = called.ends_with("text-generation-launcher");
    if called.ends_with("text-generation-server") {
        argv[0] = "tgi-server".into();
        return python(&argv);
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
