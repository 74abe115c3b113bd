//! Grammars as APIs ask for them, and the way to something that matches.

use std::sync::Arc;
use std::time::Duration;

use headrace_grammar::{Bounds, Compiled, Compiler, GrammarError, GrammarSpec, Vocabulary};
use serde_json::Value;
use tokio::sync::oneshot;
use tokio::time::timeout;

use crate::app::Ready;
use crate::error::{ApiError, Invalid, Overload};
use crate::openai::wire::ResponseFormat;

/// What the first grammar may wait for beside its own time: the vocabulary is put in order for it.
const VOCABULARY_TIME_MAX: Duration = Duration::from_secs(60);

/// What a field asks for, or what is wrong with it; `None` where it asks for nothing.
pub(crate) type Asked = Option<Result<GrammarSpec, Invalid>>;

/// TGI's `grammar`: a type and a value.
pub(crate) fn of_tgi(grammar: &Value) -> Result<GrammarSpec, Invalid> {
    let kind = grammar.get("type").and_then(Value::as_str);
    let kind = kind.ok_or_else(|| invalid("`grammar` needs a `type`"))?;
    let value = grammar.get("value").filter(|value| !value.is_null());
    let value = value.ok_or_else(|| invalid("`grammar` needs a `value`"))?;
    match kind {
        "json" | "json_object" | "json_schema" => {
            let schema = schema(value)?;
            // What TGI's clients know.
            if schema.get("properties").is_none() {
                return Err(invalid("Grammar must have a 'properties' field"));
            }
            Ok(GrammarSpec::JsonSchema(schema))
        }
        "regex" => regex(value),
        other => Err(unknown("grammar", other)),
    }
}

/// `response_format` and `grammar` of OpenAI's routes, of which one may ask for something.
pub(crate) fn of_openai(format: Option<ResponseFormat>, grammar: Option<&Value>) -> Asked {
    let format = format.and_then(|format| of_format(&format).transpose());
    match (format, grammar) {
        (Some(_), Some(_)) => Some(Err(invalid(
            "`grammar` and `response_format` exclude each other",
        ))),
        (format, None) => format,
        (None, Some(Value::String(text))) => Some(Ok(GrammarSpec::Lark(text.clone()))),
        (None, Some(other)) => Some(of_tgi(other)),
    }
}

/// The schema stands where TGI has it (`value`), where OpenAI has it (`json_schema`), or where
/// llama.cpp has it (`schema`).
fn of_format(format: &ResponseFormat) -> Result<Option<GrammarSpec>, Invalid> {
    let given = [&format.value, &format.json_schema, &format.schema];
    let given = given.into_iter().flatten().next();
    match (format.kind.as_str(), given) {
        ("text", _) => Ok(None),
        ("json_object", None) => Ok(Some(GrammarSpec::AnyJsonObject)),
        ("json" | "json_object" | "json_schema", Some(given)) => {
            schema(given).map(|schema| Some(GrammarSpec::JsonSchema(schema)))
        }
        ("regex", Some(given)) => regex(given).map(Some),
        (kind @ ("json" | "json_schema" | "regex"), None) => {
            let message = format!("`response_format` of type {kind:?} needs a `value`");
            Err(invalid(message))
        }
        (other, _) => Err(unknown("response_format", other)),
    }
}

/// A schema as it is, as a text, or named (`{"name": …, "schema": …}`).
fn schema(value: &Value) -> Result<Value, Invalid> {
    let parsed;
    let value = if let Value::String(text) = value {
        parsed = serde_json::from_str(text).map_err(|error| invalid(error.to_string()))?;
        &parsed
    } else {
        value
    };
    if !value.is_object() {
        return Err(Invalid::Grammar);
    }
    let is_named = |value: &Value| value.get("name").is_some_and(Value::is_string);
    let named = value.get("schema").filter(|schema| schema.is_object());
    let named = named.filter(|_| is_named(value) || value.get("properties").is_none());
    Ok(named.unwrap_or(value).clone())
}

fn regex(value: &Value) -> Result<GrammarSpec, Invalid> {
    let pattern = value.as_str();
    let pattern = pattern.ok_or_else(|| invalid("a regex must be a string"))?;
    Ok(GrammarSpec::Regex(pattern.to_owned()))
}

fn unknown(field: &str, kind: &str) -> Invalid {
    invalid(format!("`{field}` has the unknown type {kind:?}"))
}

fn invalid(message: impl Into<String>) -> Invalid {
    Invalid::GrammarText(message.into())
}

/// Compiles a grammar, or finds it.
pub(crate) async fn compile(
    ready: &Ready,
    workers: usize,
    spec: &GrammarSpec,
) -> Result<Arc<Compiled>, ApiError> {
    let grammars = &ready.text.grammars;
    let compiler = grammars.get_or_init(|| compiler(ready, workers));
    let max = compiler.bounds().compile_time_max;
    let patience = if compiler.is_ready() {
        max
    } else {
        max + VOCABULARY_TIME_MAX
    };
    let (send, outcome) = oneshot::channel();
    let deliver = move |compiled| {
        // A receiver that is gone has waited long enough.
        drop(send.send(compiled));
    };
    compiler
        .compile(spec.clone(), deliver)
        .map_err(|error| refusal(&error))?;
    match timeout(patience, outcome).await {
        Ok(Ok(outcome)) => outcome.map_err(|error| refusal(&error)),
        Ok(Err(_)) => Err(refusal(&GrammarError::Failed)),
        Err(_) => Err(refusal(&GrammarError::TooSlow { max })),
    }
}

fn compiler(ready: &Ready, workers: usize) -> Compiler {
    let tokenizer = Arc::clone(&ready.text.tokenizer);
    let size = ready.facts.limits.vocab_size;
    let ending: Vec<u32> = ready.text.ending.iter().map(|id| id.0).collect();
    Compiler::new(Bounds::default(), workers, move || {
        let bytes_of = |id| {
            tokenizer
                .token_bytes(id)
                .filter(|_| !tokenizer.is_special(id))
        };
        Vocabulary::new(size, &ending, bytes_of)
    })
}

fn refusal(error: &GrammarError) -> ApiError {
    if let &GrammarError::QueueFull { waiting, queue_max } = error {
        return ApiError::Overloaded(Overload::Grammar { waiting, queue_max });
    }
    invalid(error.to_string()).into()
}
