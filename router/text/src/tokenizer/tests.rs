//! Loading, encoding, and the ids that end a generation.

use std::path::PathBuf;

use serde_json::{Value, json};

use super::{LoadError, Tokenizer};

/// Words of lower-case letters, a special token around every text, truncation and padding of
/// somebody's training.
fn tokenizer_json() -> Value {
    json!({
        "version": "1.0",
        "truncation": {"direction": "Right", "max_length": 3, "strategy": "LongestFirst",
            "stride": 0},
        "padding": {"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": null,
            "pad_id": 0, "pad_type_id": 0, "pad_token": "?"},
        "added_tokens": [
            {"id": 3, "content": "<s>", "special": true, "single_word": false, "lstrip": false,
             "rstrip": false, "normalized": false},
            {"id": 4, "content": "</s>", "special": true, "single_word": false, "lstrip": false,
             "rstrip": false, "normalized": false},
        ],
        "normalizer": {"type": "Lowercase"},
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": {"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}},
                       {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [3], "tokens": ["<s>"]}}},
        "decoder": null,
        "model": {"type": "WordLevel", "vocab": {"?": 0, "été": 1, "b": 2}, "unk_token": "?"},
    })
}

fn folder(name: &str, files: &[(&str, Value)]) -> PathBuf {
    let dir = std::env::temp_dir().join(format!("headrace-tok-{}-{name}", std::process::id()));
    std::fs::create_dir_all(&dir).expect("a scratch folder");
    for (file, content) in files {
        std::fs::write(dir.join(file), content.to_string()).expect("a scratch file");
    }
    dir
}

fn load(name: &str, files: &[(&str, Value)]) -> Result<Tokenizer, LoadError> {
    let dir = folder(name, files);
    let loaded = Tokenizer::load(&dir);
    std::fs::remove_dir_all(dir).expect("the scratch folder is there");
    loaded
}

fn ending(name: &str, files: &[(&str, Value)]) -> Vec<u32> {
    let mut all = vec![("tokenizer.json", tokenizer_json())];
    all.extend_from_slice(files);
    load(name, &all).expect("it loads").ending_ids().to_vec()
}

#[test]
fn offsets_are_bytes_and_specials_are_asked_for() {
    let tokenizer = load("encode", &[("tokenizer.json", tokenizer_json())]).expect("it loads");
    let plain = tokenizer.encode("Été b x b b", false).expect("it encodes");
    assert_eq!(plain.ids, [1, 2, 0, 2, 2], "neither cut nor padded");
    assert_eq!(plain.offsets[..3], [(0, 5), (6, 7), (8, 9)]);
    let special = tokenizer.encode("b</s>", true).expect("it encodes");
    assert_eq!(special.ids, [3, 2, 4]);
    assert_eq!(special.offsets, [(0, 0), (0, 1), (1, 5)]);
    assert_eq!(tokenizer.encode("", true).expect("it encodes").ids, [3]);
    assert_eq!(
        tokenizer.encode("", false).expect("it encodes").ids,
        Vec::<u32>::new()
    );
    assert_eq!(tokenizer.vocab_size(), 5);
    assert!(tokenizer.is_special(4) && !tokenizer.is_special(2) && !tokenizer.is_special(99));
    assert_eq!(tokenizer.decode(&[3, 1, 2, 99], true), "été b");
    assert_eq!(tokenizer.vocabulary_entry(4).as_deref(), Some("</s>"));
}

#[test]
fn ending_ids_come_from_the_first_file_that_has_them() {
    let generation = ("generation_config.json", json!({"eos_token_id": [4, 2, 4]}));
    let config = ("config.json", json!({"eos_token_id": 2}));
    let named = (
        "tokenizer_config.json",
        json!({"eos_token": {"content": "</s>"}}),
    );
    assert_eq!(
        ending("a", &[generation, config.clone(), named.clone()]),
        [4, 2]
    );
    let empty = ("generation_config.json", json!({"eos_token_id": null}));
    assert_eq!(ending("b", &[empty, config, named.clone()]), [2]);
    let nested = ("config.json", json!({"text_config": {"eos_token_id": 1}}));
    assert_eq!(ending("c", &[nested, named.clone()]), [1]);
    assert_eq!(ending("d", &[named]), [4]);
    assert_eq!(
        ending(
            "e",
            &[("special_tokens_map.json", json!({"eos_token": "<s>"}))]
        ),
        [3]
    );
    assert_eq!(ending("f", &[]), Vec::<u32>::new());
}

#[test]
fn the_length_of_a_text_is_told_where_it_is_a_number_of_tokens() {
    let without_bound: Value =
        serde_json::from_str("1000000000000000019884624838656").expect("a number");
    for (name, length, expected) in [
        ("l", json!(2048), Some(2048)),
        ("m", without_bound, None),
        ("n", json!(1e30), None),
        ("o", json!(u64::from(u32::MAX) + 1), None),
        ("p", json!(0), None),
        ("q", json!(-1), None),
        ("r", json!("2048"), None),
        ("s", Value::Null, None),
    ] {
        let config = json!({"model_max_length": length});
        let files = [
            ("tokenizer.json", tokenizer_json()),
            ("tokenizer_config.json", config),
        ];
        let tokenizer = load(name, &files).expect("it loads");
        assert_eq!(tokenizer.tokens_max(), expected, "{length}");
    }
    let bare = load("t", &[("tokenizer.json", tokenizer_json())]).expect("it loads");
    assert_eq!(bare.tokens_max(), None);
}

#[test]
fn what_cannot_be_loaded_says_which_file_and_why() {
    let missing = load("missing", &[]).expect_err("no file");
    assert!(
        missing.to_string().contains("no tokenizer.json"),
        "{missing}"
    );
    let broken = load("broken", &[("tokenizer.json", json!({"model": 1}))]).expect_err("broken");
    assert!(matches!(broken, LoadError::Parse { .. }), "{broken}");
    assert!(
        broken
            .to_string()
            .contains("tokenizer.json is not a tokenizer"),
        "{broken}"
    );
    let dir = folder("json", &[("tokenizer.json", tokenizer_json())]);
    std::fs::write(dir.join("config.json"), "{").expect("a scratch file");
    let broken = Tokenizer::load(&dir).expect_err("config.json is no JSON");
    std::fs::remove_dir_all(dir).expect("the scratch folder is there");
    assert!(
        broken.to_string().contains("config.json is not valid JSON"),
        "{broken}"
    );
}
