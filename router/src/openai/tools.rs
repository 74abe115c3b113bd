//! Tools of a request: what may be called, and what must be.

use std::sync::Arc;

use headrace_text::{CallsAsked, CallsMax, Signature, ToolConstraint, ToolStyle};
use serde_json::Value;

use crate::calls::ToolRules;
use crate::error::ToolRefusal;
use crate::openai::wire::ChatRequest;

/// Tools of one request at most: a template writes all of them into the prompt.
const TOOLS_MAX: usize = 512;

/// Bytes of a function's name at most: so much of a possible call is held back.
const NAME_BYTES_MAX: usize = 256;

/// The tools that a request may use.
#[derive(Debug, Clone)]
pub(crate) struct Tools {
    /// As the template gets them.
    pub(crate) list: Vec<Value>,
    signatures: Arc<[Signature]>,
    choice: Choice,
    /// The caller's words about them.
    pub(crate) prompt: Option<String>,
    calls_max: CallsMax,
}

/// What is to be done with tools.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Choice {
    Auto,
    None,
    Required,
    Named(String),
}

// === impl Tools ===

impl Tools {
    /// Takes the tools out of a request; `None` if it is to be answered without any.
    pub(crate) fn take(body: &mut ChatRequest) -> Result<Option<Self>, ToolRefusal> {
        let choice = Choice::read(body.tool_choice.as_ref())?;
        let mut list = body.tools.take().unwrap_or_default();
        match &choice {
            Choice::None => return Ok(None),
            Choice::Auto if list.is_empty() => return Ok(None),
            Choice::Required if list.is_empty() => return Err(ToolRefusal::NothingToCall),
            Choice::Auto | Choice::Required | Choice::Named(_) => {}
        }
        if list.len() > TOOLS_MAX {
            let (given, max) = (list.len(), TOOLS_MAX);
            return Err(ToolRefusal::Count { given, max });
        }
        let names = list.iter_mut().enumerate();
        let names: Vec<String> = names
            .map(|(index, tool)| read_tool(index, tool))
            .collect::<Result<_, _>>()?;
        if let Choice::Named(name) = &choice
            && !names.contains(name)
        {
            return Err(ToolRefusal::UnknownFunction { name: name.clone() });
        }
        let wants_text = |kind: &str| kind == "text";
        let format = body.response_format.as_ref();
        if format.is_some_and(|format| !wants_text(&format.kind)) {
            return Err(ToolRefusal::Format);
        }
        let signature = |(name, tool): (&String, &Value)| Signature::new(name, &tool["function"]);
        let signatures = names.iter().zip(&list).map(signature).collect();
        let is_parallel = body.parallel_tool_calls.unwrap_or(true);
        let is_named = matches!(choice, Choice::Named(_));
        Ok(Some(Self {
            list,
            signatures,
            prompt: body.tool_prompt.take(),
            calls_max: if is_parallel && !is_named {
                CallsMax::Many
            } else {
                CallsMax::One
            },
            choice,
        }))
    }

    /// What answers are searched for.
    pub(crate) fn rules(&self) -> ToolRules {
        ToolRules {
            tools: Arc::clone(&self.signatures),
            calls_max: self.calls_max,
        }
    }

    /// What an answer must be. `None` leaves it to the model.
    pub(crate) fn constraint(
        &self,
        style: &ToolStyle,
    ) -> Result<Option<ToolConstraint>, ToolRefusal> {
        let asked = match &self.choice {
            Choice::Auto | Choice::None => return Ok(None),
            Choice::Required => CallsAsked::Any,
            Choice::Named(name) => CallsAsked::Named(name),
        };
        let constraint = style.constraint(&self.list, asked, self.calls_max);
        constraint.ok_or(ToolRefusal::NoParser).map(Some)
    }
}

// === impl Choice ===

impl Choice {
    fn read(choice: Option<&Value>) -> Result<Self, ToolRefusal> {
        match choice {
            None | Some(Value::Null) => Ok(Self::Auto),
            Some(Value::String(word)) => Ok(match word.as_str() {
                "auto" => Self::Auto,
                "none" => Self::None,
                "required" => Self::Required,
                name => Self::Named(name.to_owned()),
            }),
            Some(object) => {
                let name = object.pointer("/function/name").and_then(Value::as_str);
                let named = name.map(|name| Self::Named(name.to_owned()));
                named.ok_or(ToolRefusal::Choice)
            }
        }
    }
}

// === free functions ===

/// The name of a tool, which is put into the form that templates know.
fn read_tool(index: usize, tool: &mut Value) -> Result<String, ToolRefusal> {
    let max = NAME_BYTES_MAX;
    let function = tool.get_mut("function").and_then(Value::as_object_mut);
    let function = function.ok_or(ToolRefusal::Name { index, max })?;
    // TGI's other name for them.
    if !function.contains_key("parameters")
        && let Some(parameters) = function.shift_remove("arguments")
    {
        function.insert("parameters".to_owned(), parameters);
    }
    let name = function.get("name").and_then(Value::as_str);
    name.filter(|name| (1..=max).contains(&name.len()))
        .map(str::to_owned)
        .ok_or(ToolRefusal::Name { index, max })
}
