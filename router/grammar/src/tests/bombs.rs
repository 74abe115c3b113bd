//! Grammars that cost too much or mean nothing: refused by name, and nothing panics.

use serde_json::{Map, Value, json};

use super::{compile, compile_with, compiler};
use crate::{Bounds, Compiler, GrammarError, GrammarSpec, Vocabulary};

fn regex(pattern: &str) -> GrammarSpec {
    GrammarSpec::Regex(pattern.to_owned())
}

fn lark(text: impl Into<String>) -> GrammarSpec {
    GrammarSpec::Lark(text.into())
}

fn refused(spec: GrammarSpec) -> GrammarError {
    compile(spec).expect_err("it is refused")
}

/// Bounds, some of them tighter.
fn refused_by(bounds: Bounds, spec: GrammarSpec) -> String {
    let error = compile_with(&compiler(bounds), spec);
    error.expect_err("it is refused").to_string()
}

fn strings(count: usize) -> Value {
    (0..count).map(|i| json!(format!("value {i}"))).collect()
}

fn nested(depth: usize) -> Value {
    let outer = |inner, _| json!({"type": "object", "properties": {"a": inner}});
    (0..depth).fold(json!({"type": "integer"}), outer)
}

#[test]
fn a_bound_that_is_exceeded_is_told_with_both_numbers() {
    let bounds = Bounds::default();
    let schema = json!({"enum": strings(80_000)});
    let given = schema.to_string().len();
    let max = bounds.source_bytes_max;
    assert!(given > 1_000_000);
    let error = refused(GrammarSpec::JsonSchema(schema));
    assert_eq!(error, GrammarError::TooLong { max, given });
    assert!(error.to_string().contains("source_bytes_max"), "{error}");

    let (max, given) = (bounds.depth_max, 121);
    let deep = refused(GrammarSpec::JsonSchema(nested(60)));
    assert_eq!(deep, GrammarError::TooDeep { max, given });
    let deep = "(".repeat(100_000);
    let given = 100_000;
    assert_eq!(refused(regex(&deep)), GrammarError::TooDeep { max, given });
    assert_eq!(refused(lark(deep)), GrammarError::TooDeep { max, given });

    let (max, given) = (bounds.repeats_max, 1_000_000_000);
    let bomb = "(((a{1,1000}){1,1000}){1,1000})";
    let repeats = GrammarError::Repeats { max, given };
    assert_eq!(refused(regex(bomb)), repeats);
    let string = json!({"type": "string", "pattern": bomb});
    assert_eq!(refused(GrammarSpec::JsonSchema(string)), repeats);
    let mut patterns = Map::new();
    patterns.insert(bomb.to_owned(), json!(true));
    let object = json!({"type": "object", "patternProperties": patterns});
    assert_eq!(refused(GrammarSpec::JsonSchema(object)), repeats);

    let max = bounds.multiple_max;
    let both = json!({"allOf": [{"type": "integer", "multipleOf": 99.72}, {"multipleOf": 7919}]});
    let given = 9972 * 7919;
    let multiples = GrammarError::Multiples { max, given };
    let embedded = format!("start: \"a\" %json {both}");
    assert_eq!(refused(GrammarSpec::JsonSchema(both)), multiples);
    assert_eq!(refused(lark(embedded)), multiples);
}

#[test]
fn what_the_compiler_bounds_is_refused_with_its_reason() {
    let doubled = |i: usize| format!("A{i}: A{0} A{0}", i + 1);
    let doubling = (0..60).map(doubled).collect::<Vec<_>>().join("\n");
    let doubling = lark(format!("{doubling}\nA60: \"a\"\nstart: A0\n"));
    let reason = refused(doubling).to_string();
    assert!(
        reason.contains("(limit for this grammar: 1000000)"),
        "{reason}"
    );
    let either = |i| {
        json!({"anyOf": [{"properties": {format!("a{i}"): {"type": "string"}}},
            {"properties": {format!("b{i}"): {"type": "integer"}}}]})
    };
    let all = json!({"allOf": (0..30).map(either).collect::<Value>()});
    let reason = refused(GrammarSpec::JsonSchema(all)).to_string();
    assert_eq!(reason, "schema too large");
    let few = Bounds {
        symbols_max: 100,
        ..Bounds::default()
    };
    let reason = refused_by(few, GrammarSpec::JsonSchema(nested(40)));
    assert!(reason.contains("(limit for this grammar: 100)"), "{reason}");
}

#[test]
fn what_cannot_be_understood_is_refused_with_its_reason() {
    for (spec, reason) in [
        (regex("("), "unclosed group"),
        (regex("[z-a]"), "invalid character class range"),
        (regex("(?=a)b"), "look-around"),
        (lark("nonsense \u{0} (("), "lexer error"),
        (lark("start: missing"), "missing"),
        (lark("start: start"), "allows no text"),
        (GrammarSpec::JsonSchema(json!(true)), "must be an object"),
        (
            GrammarSpec::JsonSchema(json!({"enum": []})),
            "Unsatisfiable",
        ),
        (GrammarSpec::JsonSchema(json!({"type": "flower"})), "flower"),
        (
            GrammarSpec::JsonSchema(json!({"$ref": "#"})),
            "allows no text",
        ),
        (
            GrammarSpec::JsonSchema(json!({"$ref": "https://example.org/a"})),
            "$ref",
        ),
        (
            GrammarSpec::JsonSchema(json!({"type": "object", "unevaluatedProperties": false})),
            "unevaluatedProperties",
        ),
    ] {
        let told = refused(spec.clone()).to_string();
        assert!(told.contains(reason), "{spec:?}: {told}");
        assert!(!told.contains('\n'), "{told}");
    }
}

#[test]
fn large_grammars_of_use_are_compiled() {
    for spec in [
        GrammarSpec::JsonSchema(
            json!({"type": "object", "properties": {"a": {"enum": strings(9000)}}}),
        ),
        GrammarSpec::JsonSchema(nested(48)),
        GrammarSpec::JsonSchema(json!({"type": "string", "maxLength": 10_000_000})),
        GrammarSpec::JsonSchema(json!({"type": "integer", "multipleOf": 5})),
        regex("a{1,100000}"),
        regex("((a*)*)*b"),
        lark(
            (0..5000)
                .map(|i| format!("A{i}: A{}", i + 1))
                .chain(["A5000: \"a\"\nstart: A0\n".to_owned()])
                .collect::<Vec<_>>()
                .join("\n"),
        ),
    ] {
        compile(spec.clone()).unwrap_or_else(|error| panic!("{spec:?}: {error}"));
    }
}

/// What is only known while a text comes is bounded for each mask.
#[test]
fn a_grammar_that_becomes_too_much_fails_its_text_alone() {
    let generous = Bounds {
        repeats_max: u64::MAX,
        ..Bounds::default()
    };
    let compiler = compiler(generous);
    let bomb = regex("(((a{1,1000}){1,1000}){1,1000})");
    let mut matcher = compile_with(&compiler, bomb)
        .expect("the compiler takes it")
        .matcher();
    let error = (0..1000).find_map(|_| {
        let accepted = matcher.accept(u32::from(b'a'));
        accepted.and_then(|()| matcher.mask()).err()
    });
    let error = error.expect("it is too much for one mask").to_string();
    assert!(error.contains("cannot be followed any further"), "{error}");
    let other = compile_with(&compiler, regex("ab")).expect("it is in order");
    other.matcher().mask().expect("others go on");
}

#[test]
fn a_full_queue_is_told_and_a_model_without_an_end_refuses_all() {
    let endless = || Vocabulary::new(8, &[], |_| None);
    let compiler = Compiler::new(Bounds::default(), 1, endless);
    let error = compile_with(&compiler, regex("a")).expect_err("no ending");
    assert!(matches!(error, GrammarError::Model(_)), "{error}");

    let bounds = Bounds {
        queue_max: 1,
        ..Bounds::default()
    };
    let (hold, release) = std::sync::mpsc::channel::<()>();
    let (started, start) = std::sync::mpsc::channel();
    let compiler = super::compiler(bounds);
    let wait = move |_| {
        started.send(()).expect("somebody waits for it");
        release.recv().ok();
    };
    compiler.compile(regex("a"), wait).expect("there is room");
    start.recv().expect("it is compiled");
    compiler.compile(regex("b"), |_| ()).expect("there is room");
    let full = compiler.compile(regex("c"), |_| ());
    let (waiting, queue_max) = (1, 1);
    assert_eq!(full, Err(GrammarError::QueueFull { waiting, queue_max }));
    drop(hold);
}
