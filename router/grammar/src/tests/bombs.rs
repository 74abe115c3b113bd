//! Grammars that cost too much or mean nothing: refused by name, and nothing panics.

use serde_json::{Value, json};

use super::{compile, compile_with, compiler};
use crate::{Bounds, GrammarError, GrammarSpec, Vocabulary, VocabularyError};

fn refusal(spec: GrammarSpec) -> String {
    let t = std::time::Instant::now();
    let error = compile(spec).map(|_| ()).map_err(|e| e.to_string());
    eprintln!(
        "{:?} {:?}",
        t.elapsed(),
        error.as_ref().map_err(|e| &e[..e.len().min(300)])
    );
    error.err().unwrap_or_default()
}

fn nested(depth: usize) -> Value {
    (0..depth).fold(
        json!({"type": "integer"}),
        |inner, _| json!({"type": "object", "properties": {"a": inner}, "required": ["a"]}),
    )
}

#[test]
fn explore() {
    let regex = |p: &str| GrammarSpec::Regex(p.to_owned());
    for p in [
        "(((a{1,1000}){1,1000}){1,1000})",
        "(a{1,1000}b{1,1000}){1,1000}",
        "a{1,100000}",
        "(((((a|b)?){1,99}c?){1,99}d?){1,99}){1,99}",
        "(.*a.{20})",
        "(.*a.{200})*x",
        "(a|aa|aaa|b)*c(a?){1000}a{1000}",
        "(?i)[\\p{L}]{1,500}",
        "((a*)*)*b",
        "(x+x+)+y",
        "a**",
        "(",
        "[z-a]",
        "(?=a)b",
        "\\1",
        "",
        "(?P<n>a)",
        "^abc$",
        "\\bfoo\\b",
    ] {
        eprint!("{p}: ");
        refusal(regex(p));
    }
    for n in [10usize, 100, 1000, 10_000] {
        eprint!("enum {n}: ");
        let values: Vec<String> = (0..n).map(|i| format!("v{i}")).collect();
        refusal(GrammarSpec::JsonSchema(
            json!({"type":"object","properties":{"a":{"enum": values}}}),
        ));
    }
    for n in [10usize, 40, 49, 60] {
        eprint!("nested {n}: ");
        refusal(GrammarSpec::JsonSchema(nested(n)));
    }
    eprint!("props: ");
    let mut m = serde_json::Map::new();
    for i in 0..3000 {
        m.insert(format!("p{i}"), json!({"type":"string"}));
    }
    refusal(GrammarSpec::JsonSchema(
        json!({"type":"object","properties":m}),
    ));
    eprint!("allOf: ");
    let all: Vec<Value> = (0..30).map(|i| json!({"anyOf":[{"properties":{format!("a{i}"):{"type":"string"}}},{"properties":{format!("b{i}"):{"type":"integer"}}}]})).collect();
    refusal(GrammarSpec::JsonSchema(json!({"allOf": all})));
    eprint!("maxLength: ");
    refusal(GrammarSpec::JsonSchema(
        json!({"type":"string","maxLength":10_000_000}),
    ));
    eprint!("pattern bomb: ");
    refusal(GrammarSpec::JsonSchema(
        json!({"type":"string","pattern":"^(((a{1,1000}){1,1000}){1,1000})$"}),
    ));
    eprint!("items: ");
    refusal(GrammarSpec::JsonSchema(
        json!({"type":"array","items":{"type":"string"},"minItems":100_000,"maxItems":200_000}),
    ));
    eprint!("items: ");
    refusal(GrammarSpec::JsonSchema(
        json!({"type":"array","items":{"type":"array","items":{"type":"array","items":{"type":"integer"},"minItems":1000,"maxItems":1000},"minItems":1000,"maxItems":1000},"minItems":1000,"maxItems":1000}),
    ));
    eprint!("multipleOf: ");
    refusal(GrammarSpec::JsonSchema(
        json!({"type":"integer","multipleOf":1_000_003}),
    ));
    eprint!("multipleOf: ");
    refusal(GrammarSpec::JsonSchema(
        json!({"allOf":[{"type":"integer","multipleOf":9973},{"multipleOf":7919}]}),
    ));
    eprint!("required additional: ");
    refusal(GrammarSpec::JsonSchema(
        json!({"type":"object","required": (0..100).map(|i| format!("k{i}")).collect::<Vec<_>>()}),
    ));
    eprint!("self ref: ");
    refusal(GrammarSpec::JsonSchema(json!({"$ref":"#"})));
    eprint!("remote ref: ");
    refusal(GrammarSpec::JsonSchema(
        json!({"$ref":"https://example.org/x.json"}),
    ));
    eprint!("patternProperties: ");
    let mut m = serde_json::Map::new();
    for i in 0..100 {
        m.insert(format!("^.*a{i}.*$"), json!({"type":"string"}));
    }
    refusal(GrammarSpec::JsonSchema(
        json!({"type":"object","patternProperties":m}),
    ));
    eprint!("empty enum: ");
    refusal(GrammarSpec::JsonSchema(json!({"enum":[]})));
    eprint!("unknown kw: ");
    refusal(GrammarSpec::JsonSchema(
        json!({"type":"object","unevaluatedProperties":false}),
    ));
    eprint!("format: ");
    refusal(GrammarSpec::JsonSchema(
        json!({"type":"string","format":"password"}),
    ));
    eprint!("bad type: ");
    refusal(GrammarSpec::JsonSchema(json!({"type":"flower"})));
    eprint!("bad: ");
    refusal(GrammarSpec::JsonSchema(json!(true)));
    let lark = |t: String| GrammarSpec::Lark(t);
    eprint!("lark chain: ");
    refusal(lark(
        (0..8000)
            .map(|i| format!("A{i}: A{}\n", i + 1))
            .collect::<String>()
            + "A8000: \"a\"\nstart: A0\n",
    ));
    eprint!("lark rules chain: ");
    refusal(lark(
        (0..8000)
            .map(|i| format!("a{i}: a{}\n", i + 1))
            .collect::<String>()
            + "a8000: \"a\"\nstart: a0\n",
    ));
    eprint!("lark doubling: ");
    refusal(lark(
        (0..60)
            .map(|i| format!("A{i}: A{} A{}\n", i + 1, i + 1))
            .collect::<String>()
            + "A60: \"a\"\nstart: A0\n",
    ));
    eprint!("lark doubling rules: ");
    refusal(lark(
        (0..60)
            .map(|i| format!("a{i}: a{} a{}\n", i + 1, i + 1))
            .collect::<String>()
            + "a60: \"a\"\nstart: a0\n",
    ));
    eprint!("lark ambiguous: ");
    refusal(lark("start: start start | \"a\"\n".into()));
    eprint!("lark left rec: ");
    refusal(lark("start: start\n".into()));
    eprint!("lark stars: ");
    refusal(lark(format!("start: A{}\nA: \"a\"", "*".repeat(100_000))));
    eprint!("lark not: ");
    refusal(lark(format!("start: {}A\nA: \"a\"", "~".repeat(10_000))));
    eprint!("lark alternatives: ");
    refusal(lark(format!("start: \"a\"{}\n", " | \"b\"".repeat(40_000))));
    eprint!("lark junk: ");
    refusal(lark("nonsense \u{0} ((".into()));
    eprint!("lark repeat: ");
    refusal(lark(
        "start: a{1000,1000}\na: b{1000}\nb: \"a\"{1000}".into(),
    ));
    eprint!("lark json: ");
    refusal(lark("start: %json {\"type\":\"object\"}\n".into()));
}
