//! Chat templates: the Jinja template a model ships, rendered as `transformers` renders it.

mod json;
mod print;
mod python;
mod sources;
mod time;

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Value as Jinja;
use minijinja::{Environment, ErrorKind, UndefinedBehavior};
use serde_json::{Map, Value};

use crate::special::SpecialNames;
use crate::tokenizer::LoadError;

/// Why there is no template, or no text from it.
#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    /// A file of the model folder cannot be read or is not JSON.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// The override file cannot be read.
    #[error("the chat template {} cannot be read: {source}", .path.display())]
    Override {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// A template is not UTF-8.
    #[error("the chat template {} is not UTF-8", .path.display())]
    NotUtf8 {
        /// The file.
        path: PathBuf,
    },
    /// The `chat_template` of a JSON file is neither a string nor a list of named templates.
    #[error("chat_template in {} is neither a string nor a list of named templates", .path.display())]
    Shape {
        /// The file.
        path: PathBuf,
    },
    /// The template is not valid Jinja.
    #[error("the chat template {name:?} does not compile: {source}")]
    Compile {
        /// `default`, or the name in the model's list.
        name: String,
        /// Where and why.
        source: minijinja::Error,
    },
    /// None of the model's named templates fits the request.
    #[error("the model has no chat template named {wanted:?}; it has {}", .available.join(", "))]
    NoSuchTemplate {
        /// The name asked for, or `default`.
        wanted: String,
        /// What there is.
        available: Vec<String>,
    },
    /// The template called `raise_exception`: its own words.
    #[error("{message}")]
    Raised {
        /// The message, verbatim.
        message: String,
    },
    /// Rendering failed.
    #[error("the chat template cannot be rendered: {source}")]
    Render {
        /// Where and why.
        source: minijinja::Error,
    },
    /// `messages` is not a list of objects, or is empty.
    #[error("messages must be a non-empty list of objects")]
    Messages,
    /// `documents` is not a list of objects.
    #[error("documents must be a list of objects")]
    Documents,
    /// `continue_final_message` together with `add_generation_prompt`.
    #[error("continue_final_message and add_generation_prompt exclude each other")]
    ContinueAndPrompt,
    /// `continue_final_message`, and the last message has no text.
    #[error("continue_final_message is set but the final message has no content to continue")]
    NothingToContinue,
    /// `continue_final_message`, and the template left out or changed the last message.
    #[error(
        "continue_final_message is set but the chat template does not render the final message \
         as it is"
    )]
    FinalMessageChanged,
}

/// What a template is rendered with.
#[derive(Debug, Clone, Default)]
pub struct ChatInput {
    /// A list of messages, as the API received them.
    pub messages: Value,
    /// A list of tool schemas.
    pub tools: Option<Value>,
    /// Ends the text with the header of an assistant's turn.
    pub add_generation_prompt: bool,
    /// Leaves the last message open, for the model to go on with it.
    pub continue_final_message: bool,
    /// A list of documents for retrieval templates.
    pub documents: Option<Value>,
    /// Further variables. `chat_template`, when it names one of the model's templates, selects
    /// it; it is never a template itself.
    pub kwargs: Map<String, Value>,
}

/// A model's chat template, or its named templates.
pub struct ChatTemplate {
    env: Environment<'static>,
    names: Vec<String>,
    sources: BTreeMap<String, String>,
    special: SpecialNames,
}

const DEFAULT: &str = "default";
const TOOL_USE: &str = "tool_use";

/// Stands at the end of the message that is to be continued, so that it is found again.
const CONTINUE_MARK: &str = "CONTINUE_FINAL_MESSAGE_TAG ";

/// The names a message's reasoning comes under; the first is the one templates read.
const REASONING_FIELDS: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];

// === impl ChatTemplate ===

impl ChatTemplate {
    /// The template of a model folder, `None` if it has none: the override file, else
    /// `chat_template.jinja` (with `additional_chat_templates/*.jinja`), else
    /// `chat_template.json`, else the entry of `tokenizer_config.json`, else that of
    /// `processor_config.json`.
    pub fn load(dir: &Path, override_: Option<&Path>) -> Result<Option<Self>, TemplateError> {
        let sources = match override_ {
            Some(path) => sources::from_file(path)?,
            None => sources::from_folder(dir)?,
        };
        if sources.is_empty() {
            return Ok(None);
        }
        Self::compile(sources, SpecialNames::load(dir)?).map(Some)
    }

    /// A template from its source, with no special tokens.
    pub fn from_source(source: &str) -> Result<Self, TemplateError> {
        let sources = vec![(DEFAULT.to_owned(), source.to_owned())];
        Self::compile(sources, SpecialNames::default())
    }

    fn compile(
        sources: Vec<(String, String)>,
        special: SpecialNames,
    ) -> Result<Self, TemplateError> {
        let mut env = environment();
        let mut names = Vec::with_capacity(sources.len());
        for (name, source) in &sources {
            env.add_template_owned(name.clone(), sources::without_generation_tags(source))
                .map_err(|source| TemplateError::Compile {
                    name: name.clone(),
                    source,
                })?;
            names.push(name.clone());
        }
        Ok(Self {
            env,
            names,
            sources: sources.into_iter().collect(),
            special,
        })
    }

    /// The names of the model's templates; `default` for a single one.
    pub fn names(&self) -> &[String] {
        &self.names
    }

    /// The source of the template that a request with or without tools is rendered by.
    pub fn source(&self, tools: bool) -> Option<&str> {
        let name = if tools && self.sources.contains_key(TOOL_USE) {
            TOOL_USE
        } else {
            DEFAULT
        };
        self.sources.get(name).map(String::as_str)
    }

    /// The prompt of a conversation. Special tokens are written out in it, so it is encoded
    /// with `add_special_tokens = false`.
    pub fn render(&self, input: &ChatInput) -> Result<String, TemplateError> {
        if input.continue_final_message && input.add_generation_prompt {
            return Err(TemplateError::ContinueAndPrompt);
        }
        let mut messages = normalized(&input.messages)?;
        let final_text = if input.continue_final_message {
            Some(mark_final(&mut messages)?)
        } else {
            None
        };
        let documents = input
            .documents
            .as_ref()
            .filter(|documents| !documents.is_null());
        if let Some(documents) = documents
            && !documents
                .as_array()
                .is_some_and(|list| list.iter().all(Value::is_object))
        {
            return Err(TemplateError::Documents);
        }
        let tools = input.tools.as_ref().filter(|tools| !tools.is_null());
        let name = self.select(tools.is_some(), input.kwargs.get("chat_template"))?;

        let mut variables: BTreeMap<String, Jinja> = BTreeMap::new();
        for (name, content) in self.special.by_name() {
            variables.insert(name.clone(), Jinja::from(content.as_str()));
        }
        for (name, value) in &input.kwargs {
            variables.insert(name.clone(), json::to_jinja(value));
        }
        let list: Jinja = messages.iter().map(json::object_to_jinja).collect();
        variables.insert("messages".into(), list);
        variables.insert(
            "tools".into(),
            tools.map_or(Jinja::from(()), json::to_jinja),
        );
        variables.insert(
            "documents".into(),
            documents.map_or(Jinja::from(()), json::to_jinja),
        );
        variables.insert(
            "add_generation_prompt".into(),
            input.add_generation_prompt.into(),
        );

        let template = self.env.get_template(name).map_err(render_error)?;
        let rendered = template
            .render(Jinja::from_pairs(variables))
            .map_err(render_error)?;
        match final_text {
            Some(text) => cut_at_mark(rendered, &text),
            None => Ok(rendered),
        }
    }

    /// The template by the rule of `transformers`: a name asked for, else `tool_use` when there
    /// are tools, else `default`.
    fn select(&self, tools: bool, asked: Option<&Value>) -> Result<&str, TemplateError> {
        let known = |wanted: &str| self.names.iter().find(|name| *name == wanted);
        let found = match asked.and_then(Value::as_str) {
            Some(asked) => known(asked).ok_or(asked),
            None if tools => known(TOOL_USE).or_else(|| known(DEFAULT)).ok_or(DEFAULT),
            None => known(DEFAULT).ok_or(DEFAULT),
        };
        found
            .map(String::as_str)
            .map_err(|wanted| TemplateError::NoSuchTemplate {
                wanted: wanted.to_owned(),
                available: self.names.clone(),
            })
    }
}

impl fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ChatTemplate")
            .field("names", &self.names)
            .finish_non_exhaustive()
    }
}

fn environment() -> Environment<'static> {
    let mut env = Environment::new();
    let syntax = SyntaxConfig::builder()
        .trim_blocks(true)
        .lstrip_blocks(true)
        .build();
    env.set_syntax(
        syntax.expect("Jinja's own delimiters are valid; this is a fault of the engine"),
    );
    env.set_undefined_behavior(UndefinedBehavior::Lenient);
    env.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    env.set_unknown_method_callback(python::call_method);
    env.set_formatter(print::write);
    env.add_filter("string", print::string);
    env.add_filter("indent", python::indent);
    env.add_filter("tojson", json::tojson);
    env.add_filter("trim", python::trim);
    env.add_function("raise_exception", raise_exception);
    env.add_function("strftime_now", time::strftime_now);
    env
}

/// Carries a template's own message through the engine's error.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Raised(String);

fn raise_exception(message: &Jinja) -> Result<Jinja, minijinja::Error> {
    let message = message.to_string();
    Err(
        minijinja::Error::new(ErrorKind::InvalidOperation, message.clone())
            .with_source(Raised(message)),
    )
}

fn render_error(source: minijinja::Error) -> TemplateError {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(&source);
    while let Some(error) = cause {
        if let Some(Raised(message)) = error.downcast_ref() {
            return TemplateError::Raised {
                message: message.clone(),
            };
        }
        cause = error.source();
    }
    TemplateError::Render { source }
}

// --- Messages ---

/// The messages as `transformers` hands them to a template: keys without a value dropped,
/// reasoning under the name that templates read.
fn normalized(messages: &Value) -> Result<Vec<Map<String, Value>>, TemplateError> {
    let list = messages
        .as_array()
        .filter(|list| !list.is_empty())
        .ok_or(TemplateError::Messages)?;
    list.iter()
        .map(|message| message.as_object().map(normalized_message))
        .collect::<Option<_>>()
        .ok_or(TemplateError::Messages)
}

fn normalized_message(message: &Map<String, Value>) -> Map<String, Value> {
    let present = || message.iter().filter(|(_, value)| !value.is_null());
    let reasoning = REASONING_FIELDS
        .iter()
        .find_map(|field| message.get(*field).filter(|value| !value.is_null()));
    let mut out = Map::new();
    if let Some(reasoning) = reasoning {
        out.insert("thinking".into(), reasoning.clone());
    }
    out.extend(present().map(|(key, value)| (key.clone(), value.clone())));
    if let Some(reasoning) = reasoning {
        out.insert("reasoning_content".into(), reasoning.clone());
    }
    out
}

/// Marks the end of the last message's text; returns the text without the mark.
fn mark_final(messages: &mut [Map<String, Value>]) -> Result<String, TemplateError> {
    let content = messages
        .last_mut()
        .and_then(|message| message.get_mut("content"));
    let text = match content {
        Some(Value::Array(parts)) => parts.iter_mut().rev().find_map(|part| part.get_mut("text")),
        other => other,
    };
    match text {
        Some(Value::String(text)) => {
            let before = text.clone();
            text.push_str(CONTINUE_MARK);
            Ok(before)
        }
        Some(_) | None => Err(TemplateError::NothingToContinue),
    }
}

/// Everything before the mark. A template that trims the message has trimmed the mark's own
/// space; then what stands before the mark is trimmed too.
fn cut_at_mark(mut rendered: String, text: &str) -> Result<String, TemplateError> {
    let at = rendered
        .rfind(CONTINUE_MARK.trim_end())
        .ok_or(TemplateError::FinalMessageChanged)?;
    if !rendered.contains(python::strip(text)) {
        return Err(TemplateError::FinalMessageChanged);
    }
    let kept = rendered[at..].starts_with(CONTINUE_MARK);
    rendered.truncate(at);
    if !kept {
        rendered.truncate(python::rstrip(&rendered).len());
    }
    Ok(rendered)
}

#[cfg(test)]
mod tests;
