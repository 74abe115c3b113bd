//! Where templates come from, how they are chosen, and what goes wrong.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::{ChatInput, ChatTemplate, TemplateError};

/// A folder of this test's own, with the files given.
fn folder(name: &str, files: &[(&str, &str)]) -> PathBuf {
    let dir = std::env::temp_dir().join(format!("headrace-text-{}-{name}", std::process::id()));
    std::fs::create_dir_all(dir.join("additional_chat_templates")).expect("a scratch folder");
    for (file, content) in files {
        std::fs::write(dir.join(file), content).expect("a scratch file");
    }
    dir
}

fn load(dir: &Path, override_: Option<&Path>) -> Result<Option<ChatTemplate>, TemplateError> {
    let loaded = ChatTemplate::load(dir, override_);
    std::fs::remove_dir_all(dir).expect("the scratch folder is there");
    loaded
}

fn hello() -> ChatInput {
    ChatInput {
        messages: json!([{"role": "user", "content": "hello"}]),
        ..ChatInput::default()
    }
}

fn render(source: &str, input: &ChatInput) -> Result<String, TemplateError> {
    ChatTemplate::from_source(source)?.render(input)
}

#[test]
fn a_jinja_file_wins_over_the_configuration() {
    let dir = folder(
        "jinja",
        &[
            (
                "chat_template.jinja",
                "{{ bos_token }}jinja {{ messages[0].content }}",
            ),
            ("chat_template.json", r#"{"chat_template": "json"}"#),
            (
                "tokenizer_config.json",
                r#"{"bos_token": {"content": "<s>"}, "chat_template": "x"}"#,
            ),
        ],
    );
    let template = load(&dir, None).expect("valid").expect("there is one");
    assert_eq!(
        template.render(&hello()).expect("renders"),
        "<s>jinja hello"
    );
}

#[test]
fn older_files_are_read_in_turn() {
    let config = ("tokenizer_config.json", r#"{"chat_template": "config"}"#);
    let dir = folder(
        "json",
        &[
            ("chat_template.json", r#"{"chat_template": "json"}"#),
            config,
        ],
    );
    let template = load(&dir, None).expect("valid").expect("there is one");
    assert_eq!(template.render(&hello()).expect("renders"), "json");
    let template = load(&folder("config", &[config]), None)
        .expect("valid")
        .expect("one");
    assert_eq!(template.render(&hello()).expect("renders"), "config");
    let processor = (
        "processor_config.json",
        r#"{"processor_class": "x", "chat_template": "processor"}"#,
    );
    let dir = folder("both", &[config, processor]);
    let template = load(&dir, None).expect("valid").expect("one");
    assert_eq!(template.render(&hello()).expect("renders"), "config");
    let untold = ("tokenizer_config.json", "{}");
    let template = load(&folder("processor", &[untold, processor]), None)
        .expect("valid")
        .expect("one");
    assert_eq!(template.render(&hello()).expect("renders"), "processor");
    assert!(
        load(&folder("none", &[]), None)
            .expect("no template is no error")
            .is_none()
    );
    let dir = folder(
        "null",
        &[("tokenizer_config.json", r#"{"chat_template": null}"#)],
    );
    assert!(load(&dir, None).expect("no template is no error").is_none());
}

#[test]
fn special_tokens_come_from_the_older_map_too() {
    let dir = folder(
        "map",
        &[
            (
                "chat_template.jinja",
                "{{ bos_token }}|{{ eos_token }}|{{ pad_token }}|{{ x_token }}",
            ),
            (
                "tokenizer_config.json",
                r#"{"eos_token": "<new>", "pad_token": null}"#,
            ),
            (
                "special_tokens_map.json",
                r#"{"bos_token": {"content": "<b>", "lstrip": false}, "eos_token": "<old>"}"#,
            ),
        ],
    );
    let template = load(&dir, None).expect("valid").expect("there is one");
    assert_eq!(template.render(&hello()).expect("renders"), "<b>|<new>||");
}

#[test]
fn an_override_file_wins_over_all() {
    let dir = folder(
        "override",
        &[
            ("chat_template.jinja", "model"),
            ("mine.jinja", "mine"),
            ("mine.json", r#"{"chat_template": "json"}"#),
        ],
    );
    let mine = ChatTemplate::load(&dir, Some(&dir.join("mine.jinja"))).expect("valid");
    assert_eq!(
        mine.expect("one").render(&hello()).expect("renders"),
        "mine"
    );
    let mine = ChatTemplate::load(&dir, Some(&dir.join("mine.json"))).expect("valid");
    assert_eq!(
        mine.expect("one").render(&hello()).expect("renders"),
        "json"
    );
    let missing = load(&dir, Some(&dir.join("missing.jinja")));
    assert!(
        matches!(missing, Err(TemplateError::Override { .. })),
        "{missing:?}"
    );
}

#[test]
fn tools_choose_the_template_named_for_them() {
    let named = r#"{"chat_template": [{"name": "default", "template": "plain"},
        {"name": "tool_use", "template": "tools"}, {"name": "rag", "template": "documents"}]}"#;
    let dir = folder("named", &[("tokenizer_config.json", named)]);
    let template = load(&dir, None).expect("valid").expect("there is one");
    assert_eq!(template.names(), ["default", "tool_use", "rag"]);
    assert_eq!(template.render(&hello()).expect("renders"), "plain");
    let tools = ChatInput {
        tools: Some(json!([])),
        ..hello()
    };
    assert_eq!(template.render(&tools).expect("renders"), "tools");
    let null = ChatInput {
        tools: Some(Value::Null),
        ..hello()
    };
    assert_eq!(template.render(&null).expect("renders"), "plain");
    let mut asked = hello();
    asked.kwargs.insert("chat_template".into(), json!("rag"));
    assert_eq!(template.render(&asked).expect("renders"), "documents");
    // A request names a template; it never is one.
    asked
        .kwargs
        .insert("chat_template".into(), json!("{{ messages }}"));
    let refused = template.render(&asked).expect_err("no such name");
    assert_eq!(
        refused.to_string(),
        "the model has no chat template named \"{{ messages }}\"; it has default, tool_use, rag"
    );
}

#[test]
fn additional_templates_are_named_by_their_files() {
    let dir = folder(
        "additional",
        &[
            ("chat_template.jinja", "plain"),
            ("additional_chat_templates/tool_use.jinja", "tools"),
        ],
    );
    let template = load(&dir, None).expect("valid").expect("there is one");
    assert_eq!(template.names(), ["default", "tool_use"]);
    assert_eq!(template.source(true), Some("tools"));
    assert_eq!(template.source(false), Some("plain"));
}

#[test]
fn a_template_that_does_not_compile_is_an_error_that_says_where() {
    let error = ChatTemplate::from_source("{% for x in %}").expect_err("not Jinja");
    assert!(matches!(error, TemplateError::Compile { .. }));
    assert!(error.to_string().contains("default:1"), "{error}");
    let dir = folder(
        "shape",
        &[("tokenizer_config.json", r#"{"chat_template": [1]}"#)],
    );
    assert!(matches!(load(&dir, None), Err(TemplateError::Shape { .. })));
    let dir = folder("json-broken", &[("tokenizer_config.json", "{")]);
    assert!(matches!(load(&dir, None), Err(TemplateError::Load(_))));
}

#[test]
fn a_templates_own_words_are_passed_on() {
    let error =
        render("{{ raise_exception('No \"system\" role') }}", &hello()).expect_err("raised");
    assert!(matches!(error, TemplateError::Raised { .. }));
    assert_eq!(error.to_string(), "No \"system\" role");
    let inside = "{% macro m() %}{{ raise_exception('deep') }}{% endmacro %}{{ m() }}";
    assert_eq!(
        render(inside, &hello()).expect_err("raised").to_string(),
        "deep"
    );
    let failed = render("{{ missing.attribute }}", &hello()).expect_err("undefined");
    assert!(matches!(failed, TemplateError::Render { .. }));
    assert!(failed.to_string().contains("undefined"), "{failed}");
}

#[test]
fn input_that_is_no_conversation_is_refused() {
    for messages in [
        json!(null),
        json!([]),
        json!("hi"),
        json!([1]),
        json!({"role": "user"}),
    ] {
        let input = ChatInput {
            messages,
            ..ChatInput::default()
        };
        assert!(matches!(render("x", &input), Err(TemplateError::Messages)));
    }
    let input = ChatInput {
        documents: Some(json!(["text"])),
        ..hello()
    };
    assert!(matches!(render("x", &input), Err(TemplateError::Documents)));
    let both = ChatInput {
        add_generation_prompt: true,
        continue_final_message: true,
        ..hello()
    };
    assert!(matches!(
        render("x", &both),
        Err(TemplateError::ContinueAndPrompt)
    ));
    let changed = ChatInput {
        continue_final_message: true,
        ..hello()
    };
    assert!(matches!(
        render("x", &changed),
        Err(TemplateError::FinalMessageChanged)
    ));
}

#[test]
fn variables_of_a_request_do_not_replace_the_conversation() {
    let mut input = hello();
    input.kwargs.insert("messages".into(), json!([]));
    input.kwargs.insert("tools".into(), json!("none"));
    input.kwargs.insert("bos_token".into(), json!("<mine>"));
    let text = render(
        "{{ messages | length }} {{ tools }} {{ bos_token }}",
        &input,
    );
    assert_eq!(text.expect("renders"), "1 None <mine>");
}

#[test]
fn generation_marks_leave_no_trace() {
    let source = "a\n  {% generation %}\nb{%- endgeneration -%}\n c {#{% generation %}#}{{ '{%' }}";
    assert_eq!(render(source, &hello()).expect("renders"), "a\nbc {%");
}

#[test]
fn today_is_a_date() {
    let today = render("{{ strftime_now('%Y-%m-%d') }}", &hello()).expect("renders");
    assert_eq!(
        (today.len(), today.starts_with("20")),
        (10, true),
        "{today}"
    );
}

#[test]
fn hostile_nesting_and_loops_end_in_errors() {
    let recursion = "{% macro m(x) %}{{ m(x) }}{% endmacro %}{{ m(1) }}";
    assert!(matches!(
        render(recursion, &hello()),
        Err(TemplateError::Render { .. })
    ));
    let range = "{% for i in range(1000000000) %}x{% endfor %}";
    assert!(matches!(
        render(range, &hello()),
        Err(TemplateError::Render { .. })
    ));
}
