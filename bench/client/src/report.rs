//! Figures: a line of JSON for each scenario as it ends, a table at the end.

use std::fs::{File, OpenOptions};
use std::io::{self, IsTerminal, Write};
use std::path::Path;

use serde_json::Value;

/// Where figures go.
#[derive(Debug)]
pub(crate) struct Report {
    file: Option<File>,
    rows: Vec<Value>,
    progress: bool,
}

// === impl Report ===

impl Report {
    /// Lines are appended to the file, or written to standard output.
    pub(crate) fn open(json: Option<&Path>) -> Result<Self, String> {
        let open = |path: &Path| {
            let file = OpenOptions::new().create(true).append(true).open(path);
            file.map_err(|error| format!("{}: {error}", path.display()))
        };
        Ok(Self {
            file: json.map(open).transpose()?,
            rows: Vec::new(),
            progress: io::stderr().is_terminal(),
        })
    }

    /// Says on a terminal what is measured now.
    pub(crate) fn progress(&self, what: &str) {
        if self.progress {
            drop(writeln!(io::stderr(), "bench | {what} …"));
        }
    }

    /// Takes the figures of a scenario.
    pub(crate) fn push(&mut self, row: Value) -> Result<(), String> {
        let line = format!("{row}\n");
        let written = match &mut self.file {
            Some(file) => file.write_all(line.as_bytes()),
            None => io::stdout().lock().write_all(line.as_bytes()),
        };
        self.rows.push(row);
        written.map_err(|error| format!("figures cannot be written: {error}"))
    }

    /// Writes the table.
    pub(crate) fn finish(&self) {
        let table = table(&self.rows);
        // Standard output is for the lines when they have no file of their own. Nobody may be left
        // to read either.
        drop(if self.file.is_some() {
            io::stdout().lock().write_all(table.as_bytes())
        } else {
            io::stderr().lock().write_all(table.as_bytes())
        });
    }
}

/// Scenario, load and figures, as Markdown.
pub(crate) fn table(rows: &[Value]) -> String {
    let mut out = String::new();
    let mut heading = "";
    for row in rows {
        let (head, cells) = cells(row);
        if head.is_empty() {
            continue;
        }
        if head != heading {
            let rule = "|---".repeat(head.matches('|').count() - 1);
            push(&mut out, &format!("\n{head}\n{rule}|"));
            heading = head;
        }
        push(&mut out, &format!("| {} |", cells.join(" | ")));
    }
    out
}

fn push(out: &mut String, line: &str) {
    out.push_str(line);
    out.push('\n');
}

/// The heading of a row's table, and its cells.
fn cells(row: &Value) -> (&'static str, Vec<String>) {
    let text = |name: &str| {
        let value = &row[name];
        let text = value.as_str().map(str::to_owned);
        let number = || {
            if value.is_null() {
                "–".to_owned()
            } else {
                value.to_string()
            }
        };
        text.unwrap_or_else(number)
    };
    let pair = |what: &str| {
        format!(
            "{} / {}",
            text(&format!("{what}_p50_ms")),
            text(&format!("{what}_p99_ms"))
        )
    };
    let skipped = |cells: Vec<String>| match row["skipped"].as_str() {
        Some(why) => vec![cells[0].clone(), format!("skipped: {why}"), String::new()],
        None => cells,
    };
    match row["what"].as_str() {
        Some("startup") => (
            "| start | seconds to ready |",
            vec![text("m"), text("startup_s")],
        ),
        Some("decode") => (
            "| decode, batch | step ms | tok/s |",
            skipped(vec![text("batch"), text("step_ms"), text("tok_s")]),
        ),
        Some("prefill") => (
            "| prefill, tokens | ms | tok/s |",
            skipped(vec![text("isl"), text("ttft_ms"), text("tok_s")]),
        ),
        Some("offline") => (
            "| offline | s | output tok/s |",
            skipped(vec![
                format!("{} x {}/{}", text("n"), text("isl"), text("osl")),
                text("s"),
                text("out_tok_s"),
            ]),
        ),
        Some("http") => (
            "| HTTP, concurrent | requests | output tok/s | TTFT p50 / p99 ms | ITL p50 / p99 ms | tokens a chunk | errors |",
            vec![
                row["rate"]
                    .as_f64()
                    .map_or_else(|| text("concurrency"), |rate| format!("{rate} req/s")),
                text("n"),
                text("out_tok_s"),
                pair("ttft"),
                pair("itl"),
                text("tokens_per_chunk"),
                text("errors"),
            ],
        ),
        _ => ("", Vec::new()),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_table_has_a_heading_for_each_kind_of_scenario() {
        let rows = [
            json!({"what": "server", "m": "x"}),
            json!({"what": "decode", "batch": 1, "step_ms": 4.9, "tok_s": 203.1}),
            json!({"what": "decode", "batch": 8, "skipped": "too long"}),
            json!({"what": "http", "concurrency": 16, "n": 64, "out_tok_s": 2593.0,
                "ttft_p50_ms": 183.0, "ttft_p99_ms": 231.0, "itl_p50_ms": 5.3, "itl_p99_ms": null,
                "tokens_per_chunk": 1.0, "errors": 0}),
        ];
        let expected = "\n| decode, batch | step ms | tok/s |\n|---|---|---|\n| 1 | 4.9 | 203.1 |\n\
            | 8 | skipped: too long |  |\n\n\
            | HTTP, concurrent | requests | output tok/s | TTFT p50 / p99 ms | ITL p50 / p99 ms | tokens a chunk | errors |\n\
            |---|---|---|---|---|---|---|\n\
            | 16 | 64 | 2593.0 | 183.0 / 231.0 | 5.3 / – | 1.0 | 0 |\n";
        assert_eq!(table(&rows), expected);
    }
}
