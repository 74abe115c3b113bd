//! A mask allows a token exactly where some text of the grammar goes on with it.

use serde_json::{Value, json};

use super::{BROKEN, ENDING, SIZE, SPECIAL, bytes_of, compile, compile_with, compiler};
use crate::{Bounds, GrammarSpec, Matcher};

fn allowed(matcher: &mut Matcher) -> Vec<u32> {
    let mask = matcher.mask().expect("the grammar goes on");
    let allowed: Vec<u32> = (0..SIZE).filter(|id| mask.allows(*id)).collect();
    assert_eq!(mask.count() as usize, allowed.len(), "no bit is beyond");
    assert_eq!(mask.0.len(), SIZE.div_ceil(32) as usize);
    allowed
}

/// What a text may go on with, by looking at every text there is.
fn expected(texts: &[String], prefix: &[u8]) -> Vec<u32> {
    let begins = |with: &[u8]| texts.iter().any(|text| text.as_bytes().starts_with(with));
    let ends = texts.iter().any(|text| text.as_bytes() == prefix);
    let goes_on = |id: &u32| {
        if ENDING.contains(id) {
            return ends;
        }
        bytes_of(*id).is_some_and(|more| !more.is_empty() && begins(&[prefix, &more].concat()))
    };
    (0..SIZE).filter(goes_on).collect()
}

/// Walks every way through a grammar of few texts.
fn check(spec: GrammarSpec, texts: &[String]) {
    let compiled = compile(spec).expect("it is in order");
    let mut todo = vec![(compiled.matcher(), Vec::new())];
    let mut seen = std::collections::HashSet::new();
    let mut complete = 0;
    while let Some((mut matcher, prefix)) = todo.pop() {
        let may = allowed(&mut matcher);
        let text = String::from_utf8_lossy(&prefix).into_owned();
        assert_eq!(may, expected(texts, &prefix), "after {text:?}");
        for id in may {
            let mut next = matcher.clone();
            next.accept(id).expect("the mask allows it");
            if ENDING.contains(&id) {
                assert_eq!(allowed(&mut next), ENDING, "nothing follows the end");
                complete += 1;
                continue;
            }
            let longer = [&prefix[..], &bytes_of(id).expect("it has bytes")].concat();
            if seen.insert(longer.clone()) {
                todo.push((next, longer));
            }
        }
    }
    assert_eq!(complete, ENDING.len() * texts.len(), "every text was met");
}

fn texts(list: &[&str]) -> Vec<String> {
    list.iter().map(|text| (*text).to_owned()).collect()
}

#[test]
fn a_regex_allows_its_texts_and_nothing_else() {
    let regex = |pattern: &str| GrammarSpec::Regex(pattern.to_owned());
    check(
        regex("(abc|ab|bc){1,2}"),
        &texts(&[
            "abc", "ab", "bc", "abcabc", "abcab", "abcbc", "ababc", "abab", "abbc", "bcabc",
            "bcab", "bcbc",
        ]),
    );
    check(regex("é?a"), &texts(&["éa", "a"]));
    check(regex("true"), &texts(&["true"]));
}

/// A space behind a comma and a colon, or none.
fn spaced(pieces: &[&str]) -> Vec<String> {
    let mut texts = vec![String::new()];
    for piece in pieces {
        let optional = piece.ends_with(',') || piece.ends_with(':');
        let mut longer = Vec::new();
        for text in &texts {
            longer.push(format!("{text}{piece}"));
            if optional {
                longer.push(format!("{text}{piece} "));
            }
        }
        texts = longer;
    }
    texts
}

#[test]
fn a_schema_allows_its_texts_and_nothing_else() {
    let schema = json!({
        "type": "object",
        "properties": {"a": {"type": "boolean"}, "bc": {"enum": [12, "ab"]}},
        "required": ["a"],
        "additionalProperties": false,
    });
    let mut texts = Vec::new();
    for value in ["true", "false"] {
        texts.extend(spaced(&["{", "\"a\":", value, "}"]));
        for other in ["12", "\"ab\""] {
            texts.extend(spaced(&["{", "\"a\":", value, ",", "\"bc\":", other, "}"]));
        }
    }
    check(GrammarSpec::JsonSchema(schema), &texts);
}

#[test]
fn a_lark_grammar_allows_its_texts_and_nothing_else() {
    let lark = "start: \"a\" rest?\nrest: \"bc\" | \"12\" start";
    // Its texts are endless: those of few letters are compared.
    let compiled = compile(GrammarSpec::Lark(lark.to_owned())).expect("it is in order");
    let mut matcher = compiled.matcher();
    for letter in *b"a12a" {
        let id = u32::from(letter);
        assert!(allowed(&mut matcher).contains(&id));
        matcher.accept(id).expect("the mask allows it");
    }
    let words = ["b", "bc", "1", "12"];
    let id = |word: &str| (0..SIZE).find(|id| bytes_of(*id).as_deref() == Some(word.as_bytes()));
    let mut may: Vec<u32> = words
        .iter()
        .map(|word| id(word).expect("a token"))
        .collect();
    may.extend(ENDING);
    may.sort_unstable();
    assert_eq!(allowed(&mut matcher), may);
}

/// Follows a text byte by byte, and says whether it may end there.
fn takes(matcher: &mut Matcher, text: &str) -> bool {
    for byte in text.bytes() {
        let id = u32::from(byte);
        if !allowed(matcher).contains(&id) {
            return false;
        }
        matcher.accept(id).expect("the mask allows it");
    }
    allowed(matcher).contains(&ENDING[0])
}

#[test]
fn any_object_is_an_object_and_nothing_else() {
    let compiled = compile(GrammarSpec::AnyJsonObject).expect("it is in order");
    let object = r#"{"a": [1, 2.5, {"b": null}], "c": "x\ny", "d": {}}"#;
    assert!(takes(&mut compiled.matcher(), object));
    for other in ["[1]", "1", "\"a\"", "{'a': 1}", "{\"a\":  1}", " {}"] {
        assert!(!takes(&mut compiled.matcher(), other), "{other}");
    }
}

#[test]
fn recursion_and_references_are_followed() {
    let schema = json!({
        "$defs": {"node": {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}},
            "additionalProperties": false}},
        "$ref": "#/$defs/node",
    });
    let compiled = compile(GrammarSpec::JsonSchema(schema)).expect("it is in order");
    assert!(takes(&mut compiled.matcher(), r#"{"next":{"next":{}}}"#));
    assert!(!takes(&mut compiled.matcher(), r#"{"next":{"next":1}}"#));
}

#[test]
fn special_and_broken_tokens_are_never_allowed() {
    for spec in [
        GrammarSpec::Regex("(?s).*".to_owned()),
        GrammarSpec::AnyJsonObject,
    ] {
        let compiled = compile(spec).expect("it is in order");
        let may = allowed(&mut compiled.matcher());
        for id in [SPECIAL, BROKEN, SIZE - 1] {
            assert!(!may.contains(&id), "{id}");
        }
    }
}

#[test]
fn a_text_does_not_end_before_its_least_tokens_where_it_need_not() {
    let compiled = compile(GrammarSpec::Regex("a{1,3}".to_owned())).expect("it is in order");
    let mut matcher = compiled.matcher().with_tokens_min(9);
    assert_eq!(matcher.first_mask(), matcher.mask().expect("it begins"));
    matcher.accept(u32::from(b'a')).expect("allowed");
    assert_eq!(allowed(&mut matcher), [u32::from(b'a')]);
    matcher.accept(u32::from(b'a')).expect("allowed");
    matcher.accept(u32::from(b'a')).expect("allowed");
    assert_eq!(allowed(&mut matcher), ENDING, "it cannot go on");
    let mut matcher = compiled.matcher().with_tokens_min(1);
    matcher.accept(u32::from(b'a')).expect("allowed");
    let may = [u32::from(b'a'), ENDING[0], ENDING[1]];
    assert_eq!(allowed(&mut matcher), may, "one token was enough");
}

#[test]
fn matchers_of_one_grammar_do_not_know_of_each_other() {
    let compiled = compile(GrammarSpec::Regex("ab|bc".to_owned())).expect("it is in order");
    let (mut one, mut other) = (compiled.matcher(), compiled.matcher());
    one.accept(u32::from(b'a')).expect("allowed");
    other.accept(u32::from(b'b')).expect("allowed");
    assert_eq!(allowed(&mut one), [u32::from(b'b')]);
    assert_eq!(allowed(&mut other), [u32::from(b'c')]);
    assert_eq!((one.accepted(), other.accepted()), (1, 1));
}

#[test]
fn a_matcher_that_fails_takes_its_grammar_from_the_cache() {
    let compiler = compiler(Bounds::default());
    let spec = || GrammarSpec::Regex("ab".to_owned());
    let first = compile_with(&compiler, spec()).expect("it is in order");
    let again = compile_with(&compiler, spec()).expect("it is in order");
    assert!(std::sync::Arc::ptr_eq(&first, &again), "it is found");
    let mut matcher = first.matcher();
    matcher.accept(u32::from(b'x')).expect_err("not allowed");
    matcher.mask().expect_err("and it stays so");
    let anew = compile_with(&compiler, spec()).expect("it is in order");
    assert!(
        !std::sync::Arc::ptr_eq(&first, &anew),
        "it is compiled anew"
    );
    assert_eq!(allowed(&mut anew.matcher()).len(), 2);
}

#[test]
fn the_least_recently_used_grammar_is_given_up() {
    let compiler = compiler(Bounds {
        cached_max: 2,
        ..Bounds::default()
    });
    let get = |pattern: &str| {
        let spec = GrammarSpec::Regex(pattern.to_owned());
        compile_with(&compiler, spec).expect("it is in order")
    };
    let (a, b) = (get("a"), get("b"));
    assert!(std::sync::Arc::ptr_eq(&a, &get("a")));
    get("c");
    assert!(std::sync::Arc::ptr_eq(&a, &get("a")), "it was used");
    assert!(!std::sync::Arc::ptr_eq(&b, &get("b")), "it was not");
}

#[test]
fn options_of_a_schema_are_kept() {
    let schema: Value = json!({"type": "object", "properties": {"a": {"const": 1}},
        "required": ["a"], "x-guidance": {"key_separator": " : "}});
    let compiled = compile(GrammarSpec::JsonSchema(schema)).expect("it is in order");
    assert!(takes(&mut compiled.matcher(), "{\"a\" : 1}"));
    assert!(!takes(&mut compiled.matcher(), "{\"a\":1}"));
}
