//! What calls of a tool are told by: its name, and which of its arguments are texts. A form that
//! writes arguments without quotes does not tell that itself.

use serde_json::Value;

/// Schemas that are looked at for one argument: references may lead anywhere.
const SCHEMAS_MAX: usize = 64;

/// A tool as a parser knows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Signature {
    pub(super) name: String,
    /// The arguments that the schema names.
    parameters: Vec<(String, Kind)>,
}

/// What an argument is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// A text, whatever it looks like.
    Text,
    /// A text, or null.
    TextOrNull,
    /// JSON, and a text where it is none.
    Json,
}

/// Types that a schema allows.
#[derive(Debug, Clone, Copy, Default)]
struct Types {
    text: bool,
    null: bool,
    other: bool,
}

// === impl Signature ===

impl Signature {
    /// Of the `function` of a tool, whose schema is at `parameters`.
    pub fn new(name: &str, function: &Value) -> Self {
        let schema = &function["parameters"];
        let properties = schema["properties"].as_object();
        let kind = |(key, value): (&String, &Value)| {
            let types = Types::of(value, schema, &mut { SCHEMAS_MAX });
            (key.clone(), types.kind())
        };
        Self {
            name: name.to_owned(),
            parameters: properties.into_iter().flatten().map(kind).collect(),
        }
    }

    /// What the argument of this name is: a text, if the schema does not name it.
    pub(super) fn kind(&self, parameter: &str) -> Kind {
        let found = self.parameters.iter().find(|(name, _)| name == parameter);
        found.map_or(Kind::Text, |(_, kind)| *kind)
    }
}

// === impl Types ===

impl Types {
    const ANY: Self = Self {
        text: true,
        null: true,
        other: true,
    };

    /// Of a schema in the schema `root`. What tells nothing allows everything, and so does what
    /// takes more than is left to be looked at.
    fn of(schema: &Value, root: &Value, left: &mut usize) -> Self {
        if *left == 0 {
            return Self::ANY;
        }
        *left -= 1;
        if let Some(reference) = schema["$ref"].as_str() {
            let target = reference.strip_prefix('#').and_then(|at| root.pointer(at));
            return target.map_or(Self::ANY, |target| Self::of(target, root, left));
        }
        let listed = |key: &str| schema[key].as_array();
        if let Some(types) = listed("type") {
            return Self::any(types.iter().map(Self::named));
        }
        if schema["type"].is_string() {
            return Self::named(&schema["type"]);
        }
        if let Some(values) = listed("enum") {
            return Self::any(values.iter().map(Self::valued));
        }
        if let Some(value) = schema.get("const") {
            return Self::valued(value);
        }
        match listed("anyOf").or_else(|| listed("oneOf")) {
            Some(schemas) => Self::any(schemas.iter().map(|one| Self::of(one, root, left))),
            None => Self::ANY,
        }
    }

    fn named(name: &Value) -> Self {
        Self {
            text: name == "string",
            null: name == "null",
            other: name != "string" && name != "null",
        }
    }

    fn valued(value: &Value) -> Self {
        Self {
            text: value.is_string(),
            null: value.is_null(),
            other: !value.is_string() && !value.is_null(),
        }
    }

    /// What any of them allows.
    fn any(each: impl Iterator<Item = Self>) -> Self {
        each.fold(Self::default(), |one, other| Self {
            text: one.text || other.text,
            null: one.null || other.null,
            other: one.other || other.other,
        })
    }

    fn kind(self) -> Kind {
        match (self.text && !self.other, self.null) {
            (true, false) => Kind::Text,
            (true, true) => Kind::TextOrNull,
            (false, _) => Kind::Json,
        }
    }
}
