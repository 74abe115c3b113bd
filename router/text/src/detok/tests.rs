//! The pieces of a stream are the text of decoding at once, for every kind of decoder.

use std::sync::Arc;

use proptest::prelude::*;
use serde_json::{Value, json};

use super::{Detokenizer, SpecialTokens};
use crate::Tokenizer;

/// The alphabet of byte-level vocabularies, as GPT-2 defines it: position = byte.
fn byte_alphabet() -> Vec<char> {
    let printable = |byte: u32| matches!(byte, 0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF);
    let mut next = 256;
    (0..256u32)
        .map(|byte| {
            let code = if printable(byte) {
                byte
            } else {
                next += 1;
                next - 1
            };
            char::from_u32(code).expect("all of them are characters")
        })
        .collect()
}

fn load(vocab: Vec<String>, decoder: &Value, model: &str) -> Arc<Tokenizer> {
    let words = vocab.len();
    let vocab: serde_json::Map<String, Value> = vocab
        .into_iter()
        .enumerate()
        .map(|(id, token)| (token, json!(id)))
        .collect();
    let model = match model {
        "BPE" => json!({"type": "BPE", "vocab": vocab, "merges": [], "byte_fallback": true}),
        _ => json!({
            "type": "WordPiece", "vocab": vocab, "unk_token": "[UNK]",
            "continuing_subword_prefix": "##", "max_input_chars_per_word": 100
        }),
    };
    let added = |id: usize, content: &str, special: bool| {
        json!({"id": id, "content": content, "special": special, "single_word": false,
               "lstrip": false, "rstrip": false, "normalized": false})
    };
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null,
        "pre_tokenizer": null, "post_processor": null, "decoder": decoder, "model": model,
        "added_tokens": [
            added(words, "<|end|>", true),
            added(words + 1, "<tool call>", false),
            added(words + 2, "<｜深｜>", true),
        ],
    });
    let bytes = serde_json::to_vec(&tokenizer).expect("JSON of strings");
    Arc::new(Tokenizer::from_json(&bytes).expect("a tokenizer made for this test"))
}

/// All bytes, and tokens of several characters and of halves of characters.
fn byte_level() -> Arc<Tokenizer> {
    let alphabet = byte_alphabet();
    let spell = |bytes: &[u8]| {
        bytes
            .iter()
            .map(|b| alphabet[usize::from(*b)])
            .collect::<String>()
    };
    let mut vocab: Vec<String> = alphabet.iter().map(char::to_string).collect();
    let emoji = "🦀".as_bytes();
    let family = "👩\u{200d}🚀é中".as_bytes();
    for bytes in [
        &b" the"[..],
        b"ing",
        emoji,
        &emoji[..2],
        &emoji[2..],
        &emoji[1..],
        &family[..5],
    ] {
        vocab.push(spell(bytes));
    }
    vocab.push(spell(&family[5..]));
    vocab.push(spell(b"\xFFa\xE4\xBD"));
    load(
        vocab,
        &json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true,
        "use_regex": true}),
        "BPE",
    )
}

fn sentencepiece_vocab() -> Vec<String> {
    let mut vocab: Vec<String> = (0..=255).map(|byte| format!("<0x{byte:02X}>")).collect();
    vocab.extend(
        [
            "▁", "▁the", "▁▁", "ing", "é", "中文", "a▁b", "\u{fffd}", ".",
        ]
        .map(String::from),
    );
    vocab
}

fn replace() -> Value {
    json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "})
}

fn llama2() -> Arc<Tokenizer> {
    let decoder = json!({"type": "Sequence", "decoders": [
        replace(), {"type": "ByteFallback"}, {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0}]});
    load(sentencepiece_vocab(), &decoder, "BPE")
}

fn gemma() -> Arc<Tokenizer> {
    let decoder = json!({"type": "Sequence", "decoders": [
        replace(), {"type": "ByteFallback"}, {"type": "Fuse"}]});
    load(sentencepiece_vocab(), &decoder, "BPE")
}

fn metaspace() -> Arc<Tokenizer> {
    let decoder = json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always",
        "split": true});
    load(sentencepiece_vocab()[256..].to_vec(), &decoder, "BPE")
}

fn wordpiece() -> Arc<Tokenizer> {
    let vocab = [
        "[UNK]", "the", "##ing", "run", ".", "##é", "中", "don", "'", "t",
    ];
    load(
        vocab.map(String::from).to_vec(),
        &json!({"type": "WordPiece", "prefix": "##",
        "cleanup": true}),
        "WordPiece",
    )
}

fn streamed(tokenizer: &Arc<Tokenizer>, ids: &[u32], special: SpecialTokens) -> String {
    let mut detokenizer = Detokenizer::new(Arc::clone(tokenizer), special);
    let mut text = String::new();
    for id in ids {
        text.push_str(&detokenizer.push(*id));
    }
    text + &detokenizer.finish()
}

/// The crate's own decoding of the whole.
fn at_once(tokenizer: &Tokenizer, ids: &[u32], skip: bool) -> String {
    tokenizer.decode_generic(ids, skip)
}

/// Ids of the vocabulary and a few beyond it.
fn ids() -> impl Strategy<Value = Vec<u32>> {
    prop::collection::vec(0u32..272, 0..40)
}

/// Ids as the tokens of text would be: mostly whole characters, some in bytes.
fn wild_ids() -> impl Strategy<Value = Vec<u32>> {
    let bytes = prop::sample::select(vec!["é", "中", "🦀", "a", " ", "\u{7ff}\u{800}"])
        .prop_map(|text| text.bytes().map(u32::from).collect::<Vec<_>>());
    let token = (256u32..270).prop_map(|id| vec![id]);
    prop::collection::vec(prop_oneof![bytes, token], 0..20).prop_map(|parts| parts.concat())
}

proptest! {
    #[test]
    fn byte_level_pieces_are_the_whole(ids in prop_oneof![ids(), wild_ids()]) {
        let tokenizer = byte_level();
        prop_assert!(tokenizer.table().is_some());
        for (special, skip) in [(SpecialTokens::Keep, false), (SpecialTokens::Skip, true)] {
            let whole = at_once(&tokenizer, &ids, skip);
            prop_assert_eq!(&streamed(&tokenizer, &ids, special), &whole);
            prop_assert_eq!(&tokenizer.decode(&ids, skip), &whole);
        }
    }

    #[test]
    fn byte_fallback_pieces_are_the_whole(ids in prop_oneof![ids(), wild_ids()]) {
        for tokenizer in [llama2(), gemma()] {
            prop_assert!(tokenizer.table().is_some());
            for (special, skip) in [(SpecialTokens::Keep, false), (SpecialTokens::Skip, true)] {
                let text = streamed(&tokenizer, &ids, special);
                prop_assert_eq!(&tokenizer.decode(&ids, skip), &text);
            }
        }
    }

    /// The crate turns a whole run of byte tokens into U+FFFD when any part of it is broken, also
    /// characters long complete. A stream cannot take those back, so only unbroken runs agree.
    #[test]
    fn unbroken_byte_fallback_is_what_the_crate_decodes(ids in wild_ids()) {
        for tokenizer in [llama2(), gemma()] {
            for (special, skip) in [(SpecialTokens::Keep, false), (SpecialTokens::Skip, true)] {
                let whole = at_once(&tokenizer, &ids, skip);
                prop_assert_eq!(&streamed(&tokenizer, &ids, special), &whole);
            }
        }
    }

    #[test]
    fn metaspace_pieces_are_the_whole(ids in prop::collection::vec(0u32..14, 0..30)) {
        let tokenizer = metaspace();
        prop_assert!(tokenizer.table().is_some());
        for (special, skip) in [(SpecialTokens::Keep, false), (SpecialTokens::Skip, true)] {
            let whole = at_once(&tokenizer, &ids, skip);
            prop_assert_eq!(&streamed(&tokenizer, &ids, special), &whole);
            prop_assert_eq!(&tokenizer.decode(&ids, skip), &whole);
        }
    }

    #[test]
    fn wordpiece_pieces_are_the_whole(ids in prop::collection::vec(0u32..14, 0..30)) {
        let tokenizer = wordpiece();
        prop_assert!(tokenizer.table().is_none());
        for (special, skip) in [(SpecialTokens::Keep, false), (SpecialTokens::Skip, true)] {
            let whole = at_once(&tokenizer, &ids, skip);
            prop_assert_eq!(&streamed(&tokenizer, &ids, special), &whole);
        }
    }

    #[test]
    fn random_text_survives_its_bytes(text in "\\PC{0,40}") {
        let tokenizer = byte_level();
        let ids: Vec<u32> = text.bytes().map(u32::from).collect();
        prop_assert_eq!(streamed(&tokenizer, &ids, SpecialTokens::Skip), text);
    }
}

#[test]
fn half_a_character_waits_and_is_shown_broken_at_the_end() {
    let tokenizer = byte_level();
    let mut detokenizer = Detokenizer::new(Arc::clone(&tokenizer), SpecialTokens::Keep);
    assert_eq!(detokenizer.push(0xF0), "");
    assert_eq!(detokenizer.push(0x9F), "");
    assert_eq!(detokenizer.push(0xA6), "");
    assert_eq!(detokenizer.push(0x80), "🦀");
    assert_eq!(detokenizer.push(0xE4), "");
    assert_eq!(detokenizer.push(u32::from(b'a')), "\u{fffd}a");
    assert_eq!(detokenizer.push(0xE4), "");
    assert_eq!(detokenizer.finish(), "\u{fffd}");
    assert_eq!(detokenizer.finish(), "");
}

#[test]
fn broken_byte_fallback_keeps_the_characters_that_were_whole() {
    let tokenizer = gemma();
    let ids = [0xC3, 0xA9, 0xE4, 0xBD, 0xFF];
    assert_eq!(tokenizer.decode(&ids, false), "é\u{fffd}\u{fffd}\u{fffd}");
    assert_eq!(
        at_once(&tokenizer, &ids[2..], false),
        "\u{fffd}\u{fffd}\u{fffd}"
    );
}

#[test]
fn a_continued_text_keeps_the_space_that_separates_it() {
    for tokenizer in [llama2(), metaspace()] {
        let the = tokenizer.token_id("▁the").expect("in the vocabulary");
        let mut first = Detokenizer::new(Arc::clone(&tokenizer), SpecialTokens::Skip);
        assert_eq!(first.push(the), "the");
        assert_eq!(first.push(the), " the");
        let mut later =
            Detokenizer::continuing(Arc::clone(&tokenizer), SpecialTokens::Skip, &[the]);
        assert_eq!(later.push(the), " the");
    }
    let tokenizer = wordpiece();
    let mut later = Detokenizer::continuing(tokenizer, SpecialTokens::Skip, &[1]);
    assert_eq!(later.push(3), " run");
    assert_eq!(later.push(2), "ing");
}

#[test]
fn specials_are_kept_or_skipped() {
    let tokenizer = byte_level();
    let end = tokenizer.token_id("<|end|>").expect("an added token");
    let call = tokenizer.token_id("<tool call>").expect("an added token");
    let deep = tokenizer.token_id("<｜深｜>").expect("an added token");
    assert!(tokenizer.is_special(end) && !tokenizer.is_special(call));
    let ids = [end, u32::from(b'a'), call, deep];
    assert_eq!(
        streamed(&tokenizer, &ids, SpecialTokens::Keep),
        "<|end|>a<tool call><｜深｜>"
    );
    assert_eq!(
        streamed(&tokenizer, &ids, SpecialTokens::Skip),
        "a<tool call>"
    );
    assert_eq!(tokenizer.token_text(end), "<|end|>");
    assert_eq!(tokenizer.token_bytes(0xE4), Some(&[0xE4][..]));
}
