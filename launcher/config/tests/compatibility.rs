//! docs/tgi-compatibility.md says what is true: its flags are tried, the tests it names exist.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use clap::CommandFactory;
use headrace_config::{Machine, Typed, resolve};

const DOCUMENT: &str = include_str!("../../../docs/tgi-compatibility.md");
const MACHINE: Machine = Machine {
    cores: 8,
    gpus: 0,
    gpus_named: None,
    roots: None,
};
/// Every flag of TGI's launcher, but for help and version.
const FLAGS: &str = "
    model-id revision validation-workers sharded num-shard quantize speculate dtype kv-cache-dtype
    trust-remote-code max-concurrent-requests max-best-of max-stop-sequences max-top-n-tokens
    max-input-tokens max-input-length max-total-tokens waiting-served-ratio
    max-batch-prefill-tokens max-batch-total-tokens max-waiting-tokens max-batch-size cuda-graphs
    hostname port prometheus-port shard-uds-path master-addr master-port huggingface-hub-cache
    weights-cache-override disable-custom-kernels cuda-memory-fraction rope-scaling rope-factor
    json-output otlp-endpoint otlp-service-name cors-allow-origin api-key watermark-gamma
    watermark-delta ngrok ngrok-authtoken ngrok-edge tokenizer-config-path disable-grammar-support
    env max-client-batch-size lora-adapters usage-stats payload-limit enable-prefill-logprobs
    graceful-termination-timeout";
const STATUSES: [&str; 7] = [
    "matched",
    "extended",
    "repaired",
    "without effect",
    "warned of",
    "refused",
    "not yet",
];

/// The cells of the rows of the table under a heading.
fn rows(heading: &str) -> Vec<Vec<&'static str>> {
    let (_, section) = DOCUMENT
        .split_once(&format!("## {heading}\n"))
        .expect("the heading is there");
    let section = section.split("\n## ").next().unwrap_or_default();
    let lines = section.lines().filter(|line| line.starts_with("| "));
    lines
        .skip(1)
        .map(|line| {
            let cells = line.trim_matches('|').split('|');
            cells.map(|cell| cell.trim().trim_matches('`')).collect()
        })
        .collect()
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// What becomes of a command line: its warnings, or why it is refused.
fn tried(line: &str) -> Result<Vec<String>, String> {
    tried_with(line, &|_| None)
}

fn tried_with(line: &str, env: &dyn Fn(&str) -> Option<OsString>) -> Result<Vec<String>, String> {
    let words = std::iter::once("headrace").chain(line.split_whitespace());
    let words = words.map(|word| match word {
        // The test's own folder is not the repository's.
        "Cargo.toml" => root().join(word).into_os_string(),
        _ => OsString::from(word),
    });
    let typed = Typed::parse(words, env).map_err(|error| error.to_string())?;
    resolve(&typed, &MACHINE)
        .map(|resolved| resolved.warnings)
        .map_err(|error| error.to_string())
}

#[test]
fn every_flag_is_what_its_row_says() {
    let rows = rows("Command line");
    let command = Typed::command();
    for row in &rows {
        let [flag, variable, status, line, _, _] = row[..] else {
            panic!("no row: {row:?}")
        };
        let arg = command
            .get_arguments()
            .find(|arg| arg.get_long() == flag.strip_prefix("--"))
            .unwrap_or_else(|| panic!("{flag} is a flag"));
        let env = arg.get_env().and_then(|env| env.to_str());
        assert_eq!(env.unwrap_or("-"), variable, "{flag}");
        let short = arg.get_short().map(|short| format!("-{short} "));
        assert!(
            line.starts_with(flag) || short.is_some_and(|short| line.starts_with(&short)),
            "{line}"
        );
        let outcome = tried(line);
        match status {
            "refused" => assert!(outcome.is_err_and(|why| why.contains(flag)), "{line}"),
            _ => assert!(outcome.is_ok(), "{line}: {outcome:?}"),
        }
    }
    let listed: Vec<&str> = rows.iter().map(|row| &row[0][2..]).collect();
    assert_eq!(listed, FLAGS.split_whitespace().collect::<Vec<_>>());
}

#[test]
fn variables_are_what_their_rows_say() {
    for row in rows("Variables without a flag") {
        let (variable, status) = (row[0], row[1]);
        let env = |name: &str| (name == variable).then(|| OsString::from("0"));
        let warned = tried_with("", &env).is_ok_and(|warnings| {
            let about = |text: &String| text.starts_with(variable) && text.contains("without");
            warnings.iter().any(about)
        });
        assert_eq!(warned, status == "warned of", "{variable}");
    }
}

#[test]
fn what_is_without_effect_is_hidden_or_warned_of() {
    for row in rows("Command line") {
        let (flag, status, line) = (row[0], row[2], row[3]);
        let command = Typed::command();
        let hidden = command
            .get_arguments()
            .any(|arg| arg.get_long() == flag.strip_prefix("--") && arg.is_hide_set());
        let warned = tried(line).is_ok_and(|warnings| {
            let about = |warning: &String| warning.contains(flag) && warning.contains("without");
            warnings.iter().any(about)
        });
        let ineffective = status == "without effect";
        assert!(
            !ineffective || hidden || warned,
            "{flag} seems to do something"
        );
        assert!(
            ineffective || !warned,
            "{flag} says that it is without effect"
        );
        assert!(
            !hidden || ineffective || status == "refused",
            "{flag} is hidden"
        );
    }
}

/// The status and the test of each row of every table that names tests.
fn judged() -> Vec<(&'static str, &'static str)> {
    let headings = DOCUMENT.lines().filter_map(|line| line.strip_prefix("## "));
    let mut found = Vec::new();
    for heading in headings {
        let Some(column) = status_column(heading) else {
            continue;
        };
        for row in rows(heading) {
            let (Some(status), Some(test)) = (row.get(column), row.last()) else {
                panic!("no row: {row:?}")
            };
            found.push((*status, *test));
        }
    }
    found
}

/// Where the table under a heading has its statuses, if it is a table of rows with tests.
fn status_column(heading: &str) -> Option<usize> {
    let (_, section) = DOCUMENT.split_once(&format!("## {heading}\n"))?;
    let section = section.split("\n## ").next()?;
    let head = section.lines().find(|line| line.starts_with("| "))?;
    let head: Vec<&str> = head.split('|').skip(1).map(str::trim).collect();
    assert!(head.contains(&"test"), "the table of {heading} names tests");
    head.iter().position(|cell| *cell == "status")
}

#[test]
fn every_test_that_is_named_exists() {
    let mut named = BTreeSet::new();
    for (status, test) in judged() {
        assert!(STATUSES.contains(&status), "{status}");
        match test.split_once("::") {
            Some(test) => drop(named.insert(test)),
            None => assert_eq!((status, test), ("not yet", "-"), "no test is named"),
        }
    }
    for (file, test) in named {
        let text = std::fs::read_to_string(root().join(file)).expect("a file of the repository");
        let is_there =
            text.contains(&format!("fn {test}(")) || text.contains(&format!("def {test}("));
        assert!(is_there, "{file} has no {test}");
    }
}

#[test]
fn rows_are_counted_by_status() {
    let judged = judged();
    let counts = STATUSES.map(|status| {
        let count = judged.iter().filter(|(found, _)| *found == status).count();
        format!("{count} {status}")
    });
    let sentence = format!("Rows: {}; {} in all.", counts.join(", "), judged.len());
    assert!(DOCUMENT.contains(&sentence), "it should say: {sentence}");
}
