//! Which program the one binary is.

use std::os::unix::process::CommandExt;
use std::process::{Command, Output};

fn headrace(name: &str, args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_headrace"));
    command.arg0(name).args(args).env_remove("VIRTUAL_ENV");
    command.output().expect("the binary runs")
}

#[test]
fn help_and_version_are_answers_and_not_errors() {
    for name in ["headrace", "/opt/bin/text-generation-launcher"] {
        let output = headrace(name, &["--help"]);
        assert_eq!(output.status.code(), Some(0));
        let text = String::from_utf8_lossy(&output.stdout);
        for part in [
            "--model-id",
            "[env: MODEL_ID]",
            "headrace download",
            "Examples:",
        ] {
            assert!(text.contains(part), "no `{part}` in {text}");
        }
    }
    for (args, part) in [
        (&["bench", "--help"][..], "headrace bench offline"),
        (&["bench", "offline", "--help"], "--batches"),
        (&["bench", "http", "-h"], "--concurrency"),
    ] {
        let output = headrace("headrace", args);
        assert_eq!(output.status.code(), Some(0));
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(text.contains(part), "no `{part}` in {text}");
    }
    let output = headrace("headrace", &["serve", "--version"]);
    let text = String::from_utf8_lossy(&output.stdout);
    assert_eq!(
        text.trim(),
        format!("headrace {}", env!("CARGO_PKG_VERSION"))
    );
}

#[test]
fn tgi_s_python_program_is_python_s() {
    let output = headrace("/opt/bin/text-generation-server", &["serve"]);
    assert_ne!(output.status.code(), Some(0));
    let text = String::from_utf8_lossy(&output.stderr);
    // Without an installed server there is no Python to ask.
    assert!(
        text.contains("Python") || text.contains("text-generation-launcher"),
        "{text}"
    );
}

#[test]
fn tgi_s_names_may_stand_before_the_arguments() {
    for (args, part) in [
        (&["text-generation-launcher", "--help"][..], "--model-id"),
        (&["text-generation-router", "print-schema"], "\"openapi\""),
        (&["text-generation-benchmark", "--help"], "--decode-length"),
    ] {
        let output = headrace("headrace", args);
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(text.contains(part), "no `{part}` in {text}");
    }
}

#[test]
fn tgi_s_router_tells_the_schema_and_refuses_to_be_alone() {
    let name = "/opt/bin/text-generation-router";
    let flags = ["--tokenizer-name", "m", "--port", "8080", "print-schema"];
    for args in [&flags[4..], &flags] {
        let output = headrace(name, args);
        assert_eq!(output.status.code(), Some(0));
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(
            text.starts_with('{') && text.contains("\"/generate_stream\""),
            "{text}"
        );
    }
    for args in [&["--help"][..], &["-h"], &["--version"]] {
        let output = headrace(name, args);
        assert_eq!(output.status.code(), Some(0));
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(text.contains("text-generation-router"), "{text}");
    }
    for args in [&[][..], &flags[..4], &["--master-shard-uds-path", "/tmp/s"]] {
        let output = headrace(name, args);
        assert_eq!(output.status.code(), Some(2));
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(
            text.contains("`text-generation-launcher` starts both"),
            "{text}"
        );
    }
}

#[test]
fn tgi_s_benchmark_measures_a_server_that_runs() {
    let name = "text-generation-benchmark";
    let output = headrace(name, &["--help"]);
    assert_eq!(output.status.code(), Some(0));
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(text.contains("--master-shard-uds-path"), "{text}");
    for (args, status, part) in [
        (&[][..], 2, "--tokenizer-name"),
        // A port that nobody listens on.
        (
            &["-t", "org/m", "--port", "1", "-m", "/tmp/s"],
            1,
            "headrace --model-id org/m",
        ),
    ] {
        let output = headrace(name, args);
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(text.contains(part), "{text}");
        assert_eq!(output.status.code(), Some(status), "{text}");
    }
}

#[test]
fn a_mistyped_command_line_is_refused() {
    let table: [(&str, &[&str], i32, &str); 7] = [
        ("headrace", &["sreve"], 2, "unknown command `sreve`"),
        ("headrace", &["bench", "x"], 2, "unknown benchmark x"),
        (
            "headrace",
            &["bench", "offline", "--mixes", "1x2"],
            2,
            "is not of the form 1000x512/256",
        ),
        (
            "text-generation-launcher",
            &["router"],
            2,
            "unknown command `router`",
        ),
        (
            "headrace",
            &["--prot", "1"],
            2,
            "unexpected argument '--prot'",
        ),
        (
            "headrace",
            &["router"],
            2,
            "usage: headrace router --config serve.json",
        ),
        (
            "headrace",
            &["router", "--config", "/no/such"],
            1,
            "/no/such: No such file",
        ),
    ];
    for (name, args, status, text) in table {
        let output = headrace(name, args);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(stderr.contains(text), "{stderr}");
        assert_eq!(output.status.code(), Some(status), "{stderr}");
    }
}

#[test]
fn without_python_it_says_where_it_looked() {
    for args in [&[][..], &["download"]] {
        let output = headrace("headrace", args);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(
            stderr.contains("no Python beside") && stderr.contains("VIRTUAL_ENV"),
            "{stderr}"
        );
        assert_eq!(output.status.code(), Some(1), "{stderr}");
    }
}
