//! Replays what `transformers` rendered (`make_templates.py`), byte by byte.

#![expect(clippy::unwrap_used, reason = "a test")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use headrace_text::{ChatInput, ChatTemplate, TemplateError};
use serde::Deserialize;
use serde_json::{Map, Value, json};

#[derive(Deserialize)]
struct Fixture {
    transformers: String,
    special: BTreeMap<String, String>,
    conversations: BTreeMap<String, Conversation>,
    rendered: BTreeMap<String, BTreeMap<String, Outcome>>,
}

#[derive(Deserialize, Clone)]
#[serde(deny_unknown_fields)]
struct Conversation {
    messages: Value,
    tools: Option<Value>,
    documents: Option<Value>,
    #[serde(default)]
    add_generation_prompt: bool,
    #[serde(default)]
    continue_final_message: bool,
    #[serde(default)]
    kwargs: Map<String, Value>,
}

#[derive(Deserialize, Debug, PartialEq)]
#[serde(rename_all = "snake_case")]
enum Outcome {
    Text(String),
    /// The words of `raise_exception`.
    Raised(String),
    /// Any other failure; its words are not compared.
    Failed(String),
}

impl From<Conversation> for ChatInput {
    fn from(given: Conversation) -> Self {
        Self {
            messages: given.messages,
            tools: given.tools,
            add_generation_prompt: given.add_generation_prompt,
            continue_final_message: given.continue_final_message,
            documents: given.documents,
            kwargs: given.kwargs,
        }
    }
}

fn here() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests")
}

/// A model folder as transformers 4 wrote it: templates in `tokenizer_config.json`.
fn folder(name: &str, special: &BTreeMap<String, String>) -> PathBuf {
    let single = here().join("templates").join(format!("{name}.jinja"));
    let entry = |entry: &str| {
        let path = here()
            .join("templates")
            .join(format!("{name}.{entry}.jinja"));
        json!({"name": entry, "template": std::fs::read_to_string(path).unwrap()})
    };
    let template = if single.exists() {
        Value::String(std::fs::read_to_string(single).unwrap())
    } else {
        json!([entry("default"), entry("tool_use")])
    };
    let mut config = json!(special);
    config["chat_template"] = template;
    let dir = scratch(&format!("replay-{name}"));
    std::fs::write(dir.join("tokenizer_config.json"), config.to_string()).unwrap();
    dir
}

/// An empty folder of this test's own.
fn scratch(name: &str) -> PathBuf {
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    if dir.exists() {
        std::fs::remove_dir_all(&dir).unwrap();
    }
    std::fs::create_dir_all(&dir).unwrap();
    dir
}

fn outcome(template: &ChatTemplate, input: &ChatInput) -> Outcome {
    match template.render(input) {
        Ok(text) => Outcome::Text(text),
        Err(TemplateError::Raised { message }) => Outcome::Raised(message),
        Err(error) => Outcome::Failed(error.to_string()),
    }
}

/// Where the two part, with a little of what follows.
fn difference(ours: &Outcome, expected: &Outcome) -> String {
    const SHOWN: usize = 160;
    let (ours, expected) = (format!("{ours:?}"), format!("{expected:?}"));
    let same = ours
        .chars()
        .zip(expected.chars())
        .take_while(|(a, b)| a == b)
        .count();
    let after = |text: &str| {
        text.chars()
            .skip(same.saturating_sub(SHOWN / 4))
            .take(SHOWN)
            .collect::<String>()
    };
    format!(
        "\n  here         …{}\n  transformers …{}",
        after(&ours),
        after(&expected)
    )
}

#[test]
fn every_template_renders_as_transformers_renders_it() {
    let bytes = std::fs::read(here().join("templates.json")).unwrap();
    let fixture: Fixture = serde_json::from_slice(&bytes).unwrap();
    let mut differences = Vec::new();
    for (name, outcomes) in &fixture.rendered {
        let dir = folder(name, &fixture.special);
        let template = ChatTemplate::load(&dir, None).unwrap().unwrap();
        for (conversation, expected) in outcomes {
            let input = ChatInput::from(fixture.conversations[conversation].clone());
            let ours = outcome(&template, &input);
            let equal = match (&ours, expected) {
                (Outcome::Failed(_), Outcome::Failed(_)) => true,
                (ours, expected) => ours == expected,
            };
            if !equal {
                differences.push(format!(
                    "{name}, {conversation}:{}",
                    difference(&ours, expected)
                ));
            }
        }
    }
    assert!(
        differences.is_empty(),
        "{} differ from transformers {}:\n{}",
        differences.len(),
        fixture.transformers,
        differences
            .iter()
            .take(20)
            .cloned()
            .collect::<Vec<_>>()
            .join("\n")
    );
}
