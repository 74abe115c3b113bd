//! Whatever way a text is cut, it says the same, in linear time.

use proptest::prelude::*;

use super::super::HELD_BYTES_MAX;
use super::{CallsMax, Piece, Told, ToolCallParser, ToolFormat, feed, parser, tools};

const FORMATS: [ToolFormat; 8] = [
    ToolFormat::Llama3Json,
    ToolFormat::Pythonic,
    ToolFormat::Hermes,
    ToolFormat::Mistral,
    ToolFormat::Qwen3Coder,
    ToolFormat::DeepSeekV3,
    ToolFormat::DeepSeekV31,
    ToolFormat::Json,
];

/// What texts are made of: whole calls, their parts, and what only looks like them.
const PARTS: [&str; 67] = [
    "<tool_call>",
    "</tool_call>",
    "<tool_",
    "call>",
    "[TOOL_CALLS]",
    "[TOOL_",
    "[ARGS]",
    "[CALL_ID]",
    "<|python_tag|>",
    "<|python_start|>",
    "<|python_end|>",
    "<|",
    "{",
    "}",
    "[",
    "]",
    "(",
    ")",
    "\"",
    "'",
    "\\",
    ":",
    ",",
    ";",
    "=",
    " ",
    "\n",
    "\"name\": ",
    "\"arguments\": ",
    "\"parameters\": ",
    "\"add\"",
    "\"unknown\"",
    "add",
    "now(",
    "a=",
    "True",
    "1e400",
    "é",
    "中😀",
    "{\"name\": \"add\", \"arguments\": {\"a\": \"}\"}}",
    "{\"name\": \"unknown\", \"parameters\": {}}",
    "add[ARGS]{\"b\": [1]}",
    "[add(a='x', b=[1])]",
    "\\u00e9",
    "<function=",
    "<function=add>",
    "<function=get_weather>\n",
    "</function>",
    "</fun",
    "<parameter=",
    "<parameter=a>",
    "<parameter=city>\n",
    "<parameter=note>",
    "</parameter>",
    "\n</parameter>\n",
    "</par",
    "null",
    "<tool_call>\n<function=now>\n</function>\n</tool_call>",
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁sep｜>",
    "<｜tool▁call▁end｜>",
    "<｜tool▁calls▁end｜>",
    "<｜tool▁call",
    "function",
    "\n```json\n",
    "\n```",
];

fn text() -> impl Strategy<Value = String> {
    prop::collection::vec(prop::sample::select(PARTS.to_vec()), 0..30)
        .prop_map(|parts| parts.concat())
}

/// Pieces of a text, cut at characters.
fn pieces<'a>(text: &'a str, cuts: &[usize]) -> Vec<Piece<'a>> {
    let mut at: Vec<usize> = cuts
        .iter()
        .map(|cut| text.floor_char_boundary(cut % (text.len() + 1)))
        .collect();
    at.extend([0, text.len()]);
    at.sort_unstable();
    at.windows(2)
        .map(|pair| Piece::Text(&text[pair[0]..pair[1]]))
        .collect()
}

fn told(format: ToolFormat, pieces: &[Piece<'_>]) -> Told {
    Told::of(&feed(parser(format, &[]), pieces))
}

proptest! {
    #[test]
    fn any_cut_says_the_same(
        text in text(),
        cuts in prop::collection::vec(0usize..1000, 0..40),
    ) {
        for format in FORMATS {
            let whole = told(format, &[Piece::Text(&text)]);
            prop_assert_eq!(&told(format, &pieces(&text, &cuts)), &whole, "{:?}", format);
            if whole.calls.is_empty() {
                prop_assert_eq!(&whole.content, &text, "{:?}", format);
            }
            // Content is the text without some of it, in order.
            let mut rest = text.chars();
            let in_order = whole.content.chars().all(|c| rest.any(|other| other == c));
            prop_assert!(in_order, "{:?}: {:?}", format, whole.content);
        }
    }

    #[test]
    fn each_character_is_looked_at_twice_at_most(text in text()) {
        for format in FORMATS {
            let mut parser = ToolCallParser::new(format, &[], tools(), CallsMax::Many);
            parser.push(&text);
            let steps = parser.out.steps();
            prop_assert!(steps <= 2 * text.chars().count(), "{:?}: {}", format, steps);
        }
    }

    #[test]
    fn a_text_without_quotes_comes_out_as_it_went_in(
        text in "[a-z<>/={}\"\\\\é中\u{1} \t\n]{0,40}",
        cuts in prop::collection::vec(0usize..1000, 0..20),
    ) {
        let call = format!("<function=get_weather>\n<parameter=city>\n{text}\n</parameter>\n</function>");
        let told = told(ToolFormat::Qwen3Coder, &pieces(&call, &cuts));
        prop_assert_eq!(&told.content, "");
        prop_assert_eq!(told.calls.len(), 1);
        let arguments: serde_json::Value = serde_json::from_str(&told.calls[0].arguments)?;
        prop_assert_eq!(arguments, serde_json::json!({"city": text}));
    }

    #[test]
    fn arguments_come_out_as_they_went_in(
        arguments in "\\{( |\\\\u00e9|\"[a-z<>\\[{é中 ]*\" ?: ?[0-9]{1,30}(e[0-9]{1,3})?,?){0,6}\\}",
        cuts in prop::collection::vec(0usize..1000, 0..20),
    ) {
        // Quotes are even and brackets outside of them are the outer ones.
        for (format, before, after) in [
            (ToolFormat::Hermes, "<tool_call>{\"name\": \"add\", \"arguments\": ", "}</tool_call>"),
            (ToolFormat::Mistral, "[TOOL_CALLS]add[ARGS]", ""),
            (ToolFormat::Mistral, "[TOOL_CALLS][{\"name\": \"add\", \"arguments\": ", "}]"),
            (ToolFormat::Llama3Json, "{\"name\": \"add\", \"parameters\": ", "}"),
            (ToolFormat::Json, "[{\"name\": \"add\", \"arguments\": ", "}]"),
            (ToolFormat::DeepSeekV31, "<｜tool▁call▁begin｜>add<｜tool▁sep｜>", "<｜tool▁call▁end｜>"),
            (
                ToolFormat::DeepSeekV3,
                "<｜tool▁call▁begin｜>function<｜tool▁sep｜>add\n```json\n",
                "\n```<｜tool▁call▁end｜>",
            ),
        ] {
            let text = format!("{before}{arguments}{after}");
            let told = told(format, &pieces(&text, &cuts));
            prop_assert_eq!(&told.content, "");
            prop_assert_eq!(told.calls.len(), 1);
            prop_assert!(told.calls[0].is_whole);
            prop_assert_eq!(&told.calls[0].arguments, &arguments);
        }
    }
}

#[test]
fn beginnings_that_come_to_nothing_cost_no_more_than_their_length() {
    for unit in [
        "<",
        "<tool_call>",
        "<tool_call>{",
        "[",
        "{",
        "[TOOL_CALLS]",
        "[TOOL_CALLS]add[",
        "{\"name\": \"",
        "[add(",
        "[now(a",
        "<|python_tag|>",
        "{\"parameters\": {",
        " ",
        "[TOOL_CALLS]add[CALL_ID]a[",
        "<tool_call>\n",
        "<tool_call><",
        "<function=add>",
        "<function=add><parameter=a>",
        "<function=add><parameter=a>\n<",
        "<parameter=",
        "<｜tool▁call▁begin｜>",
        "<｜tool▁calls▁begin｜>\n",
        "<｜tool▁call▁begin｜>add<｜tool▁sep｜>{",
        "<｜tool▁call▁begin｜>add<｜tool▁sep｜>{}`",
    ] {
        let text = unit.repeat(4 * HELD_BYTES_MAX / unit.len());
        for format in FORMATS {
            let mut parser = ToolCallParser::new(format, &[], tools(), CallsMax::Many);
            for c in text.chars() {
                parser.push(c.encode_utf8(&mut [0; 4]));
                assert!(
                    parser.out.held().len() <= HELD_BYTES_MAX,
                    "{format:?} {unit}"
                );
            }
            let steps = parser.out.steps();
            assert!(steps <= 2 * text.len(), "{format:?} {unit}: {steps}");
        }
    }
}
