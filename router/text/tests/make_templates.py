"""Renders chat templates with transformers, for the test that replays them byte by byte.

    python router/text/tests/make_templates.py

Reads the templates beside this file (``templates/*.jinja``; ``name.entry.jinja`` is an entry of a
named list), renders each with every conversation below by ``apply_chat_template`` and writes
``templates.json``: inputs, and per template the text or the reason there is none.
Nothing depends on the day it runs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jinja2
import transformers
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}

Message = dict[str, Any]


def system(content: str) -> Message:
    return {"role": "system", "content": content}


def user(content: Any) -> Message:
    return {"role": "user", "content": content}


def assistant(content: Any, **more: Any) -> Message:
    return {"role": "assistant", "content": content, **more}


def call(name: str, arguments: Any, call_id: str = "abcdef123") -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def tool_result(content: Any, call_id: str = "abcdef123", name: str = "weather") -> Message:
    return {"role": "tool", "name": name, "tool_call_id": call_id, "content": content}


WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": 'The weather of a place; "now" <b>only</b> & honest.',
        "parameters": {
            "type": "object",
            "properties": {
                "place": {"type": "string", "description": "Città, 都市 or\ntown"},
                "unit": {"type": "string", "enum": ["°C", "°F"], "default": "°C"},
                "items": {"type": "array", "items": {"type": "integer"}, "minItems": 0},
                "limit": {"type": ["number", "null"], "maximum": 1.5e-07, "minimum": -1e20},
            },
            "required": ["place"],
            "additionalProperties": False,
        },
    },
}
CLOCK = {
    "type": "function",
    "function": {
        "name": "clock",
        "description": "",
        "parameters": {"type": "object", "properties": {}},
    },
}
TOOLS = [WEATHER, CLOCK]
DOCUMENTS = [
    {"title": "Rivers", "text": "The mill stands\nat the headrace.", "doc_id": 7},
    {"title": "Ünïcode «docs»", "text": "", "doc_id": 8},
]
ARGUMENTS = {"place": "São Paulo", "limit": 0.1, "deep": {"a": [1, None, True], "b": {}, "c": []}}

TURNS = [user("Hello"), assistant("Hi there!"), user("How are you?")]
CALLED = [
    user("Weather in São Paulo?"),
    assistant(None, tool_calls=[call("weather", ARGUMENTS)]),
    tool_result('{"temperature": 22.5}'),
]

# Name to the arguments of apply_chat_template; "messages" is the conversation.
CONVERSATIONS: dict[str, dict[str, Any]] = {
    "one": {"messages": [user("Hello")]},
    "one_prompt": {"messages": [user("Hello")], "add_generation_prompt": True},
    "system": {"messages": [system("Be brief."), *TURNS], "add_generation_prompt": True},
    "system_padded": {"messages": [system("  Be \n\n"), user("\t x \u00a0\u001c ")]},
    "turns": {"messages": [*TURNS, assistant("Fine.\n\n  "), user(" ok ")]},
    "unicode": {
        "messages": [system("日本語で。"), user("🦀 «é» \u200d👩‍🚀 \\n \"q\" 'a' <|x|> {{ y }}")],
        "add_generation_prompt": True,
    },
    "empty": {"messages": [system(""), user(""), assistant(""), user("again")]},
    "two_users": {"messages": [user("a"), user("b")]},
    "starts_with_assistant": {"messages": [assistant("a"), user("b")]},
    "unknown_role": {"messages": [user("a"), {"role": "critic", "content": "b"}]},
    "no_content": {"messages": [user("a"), {"role": "assistant", "content": None}, user("b")]},
    "tools": {"messages": TURNS, "tools": TOOLS, "add_generation_prompt": True},
    "tools_system": {
        "messages": [system("Use tools."), *TURNS],
        "tools": TOOLS,
        "add_generation_prompt": True,
    },
    "tools_empty": {"messages": TURNS, "tools": []},
    "called": {"messages": CALLED, "tools": TOOLS, "add_generation_prompt": True},
    "called_string": {
        "messages": [
            user("When?"),
            assistant("One moment.", tool_calls=[call("clock", "{}"), call("clock", '{"a": 1}')]),
            tool_result("noon"),
            tool_result("night", "xyzxyz789", "clock"),
            assistant("It is noon."),
            user("Thanks"),
        ],
        "tools": [CLOCK],
    },
    "think": {
        "messages": [
            user("1+1?"),
            assistant("<think>\nadd them\n</think>\n\n2"),
            user("and 2+2?"),
            assistant("4", reasoning_content="double it\n"),
            user("ok"),
        ],
        "add_generation_prompt": True,
    },
    "think_alias": {"messages": [user("q"), assistant("a", reasoning="because"), user("r")]},
    "think_last": {"messages": [user("q"), assistant("a", thinking="since", note=None)]},
    "no_think": {
        "messages": [user("q")],
        "add_generation_prompt": True,
        "kwargs": {"enable_thinking": False},
    },
    "dated": {
        "messages": [system("S"), user("q")],
        "add_generation_prompt": True,
        "kwargs": {"date_string": "04 Jul 2031", "thinking": True, "level": 3, "ratio": 0.25},
    },
    "own_specials": {"messages": [user("q")], "kwargs": {"bos_token": "<B>", "eos_token": "<E>"}},
    "documents": {
        "messages": [user("Where is the mill?")],
        "documents": DOCUMENTS,
        "add_generation_prompt": True,
    },
    "parts": {
        "messages": [
            system("S"),
            user([{"type": "text", "text": "Look:"}, {"type": "text", "text": " here "}]),
        ],
        "add_generation_prompt": True,
    },
    "continue": {
        "messages": [user("Count"), assistant("one, two,")],
        "continue_final_message": True,
    },
    "continue_padded": {
        "messages": [user("Count"), assistant("one, two, \n")],
        "continue_final_message": True,
    },
    "continue_parts": {
        "messages": [user("Count"), assistant([{"type": "text", "text": "one "}])],
        "continue_final_message": True,
    },
    "continue_nothing": {
        "messages": [user("Count"), assistant(None)],
        "continue_final_message": True,
    },
    "continue_user": {"messages": [user("Once upon")], "continue_final_message": True},
}


def load(templates: Path) -> dict[str, str | dict[str, str]]:
    """Template name to its text, or to its named entries."""
    found: dict[str, str | dict[str, str]] = {}
    for path in sorted(templates.glob("*.jinja")):
        name, _, entry = path.stem.partition(".")
        text = path.read_text(encoding="utf-8")
        if entry:
            entries = found.setdefault(name, {})
            assert isinstance(entries, dict)
            entries[entry] = text
        else:
            found[name] = text
    return found


def render(tokenizer: PreTrainedTokenizerFast, given: dict[str, Any]) -> dict[str, str]:
    """``{"text": …}``; ``{"raised": …}`` by raise_exception; ``{"failed": …}`` otherwise."""
    given = json.loads(json.dumps(given))
    messages, kwargs = given.pop("messages"), given.pop("kwargs", {})
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, **given, **kwargs)
    except jinja2.exceptions.TemplateError as error:
        kind = "raised" if type(error) is jinja2.exceptions.TemplateError else "failed"
        return {kind: str(error)}
    except (TypeError, ValueError, KeyError) as error:
        return {"failed": type(error).__name__}
    assert isinstance(text, str)
    return {"text": text}


def main() -> None:
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2}, unk_token="<unk>"))
    templates: dict[str, Any] = {}
    for name, template in load(HERE / "templates").items():
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIAL)
        tokenizer.chat_template = template
        templates[name] = {
            conversation: render(tokenizer, given) for conversation, given in CONVERSATIONS.items()
        }
    fixture = {
        "transformers": transformers.__version__,
        "jinja2": jinja2.__version__,
        "special": SPECIAL,
        "conversations": CONVERSATIONS,
        "rendered": templates,
    }
    path = HERE / "templates.json"
    path.write_text(json.dumps(fixture, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    outcomes = [next(iter(result)) for each in templates.values() for result in each.values()]
    counts = {kind: outcomes.count(kind) for kind in ("text", "raised", "failed")}
    print(f"{len(templates)} templates, {counts}, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
