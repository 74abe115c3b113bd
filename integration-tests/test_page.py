"""The page at `/`, in a browser: what it shows, what it sends, and that it asks nobody else."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from browser import Browser, found
from headrace.testing.tiny import Tiny
from stack import Stack

pytestmark = [
    pytest.mark.clients,
    pytest.mark.skipif(found() is None, reason="no Chromium is installed"),
]

FLAGS = ("--device", "cpu", "--dtype", "float32", "--threads", "1", "--kv-memory", "32000000")
# Where pictures go, for whoever wants to look: a folder.
PICTURES = os.environ.get("HEADRACE_PICTURES")
PHONE, DESK = (390, 844), (1200, 900)
# More tokens than a test has patience for: only Stop ends them.
ENDLESS = 30000


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # No token ends a text, so that answers are as long as they are asked for.
    config = {"max_position_embeddings": 32768, "eos_token_id": None}
    folder = Tiny(config=config).write(tmp_path_factory.mktemp("models") / "tiny")
    (folder / "generation_config.json").unlink()
    path = folder / "tokenizer_config.json"
    tokenizer = json.loads(path.read_text())
    del tokenizer["eos_token"], tokenizer["model_max_length"]
    path.write_text(json.dumps(tokenizer))
    return folder


@pytest.fixture(scope="module")
def served(model: Path) -> Iterator[Stack]:
    with Stack("--model-id", str(model), *FLAGS) as stack:
        yield stack.wait_ready()


@pytest.fixture
def browser() -> Iterator[Browser]:
    with Browser(*DESK) as browser:
        yield browser


def opened(browser: Browser, stack: Stack) -> Browser:
    browser.open(f"http://127.0.0.1:{stack.port}/")
    browser.wait("document.getElementById('state').dataset.state === 'ready'")
    return browser


def text(browser: Browser, selector: str) -> str:
    return browser.value(f"document.querySelector({selector!r}).textContent")


def put(browser: Browser, name: str, value: str) -> None:
    browser.value(f"document.getElementById({name!r}).value = {value!r}")


def ask(browser: Browser, prompt: str) -> None:
    browser.value("document.getElementById('prompt').focus()")
    browser.type(prompt)
    browser.enter()


def wait_idle(browser: Browser) -> None:
    browser.wait("document.getElementById('chat').ariaBusy === 'false'")


def picture(browser: Browser, name: str) -> None:
    if PICTURES:
        browser.picture(Path(PICTURES) / f"{name}.png")


def test_a_stranger_sees_what_is_served_and_gets_an_answer(
    browser: Browser, served: Stack, model: Path
) -> None:
    opened(browser, served)
    browser.wait(f"document.querySelector('#model b')?.textContent === {str(model)!r}")
    assert "float32 on cpu" in text(browser, "#model")
    assert f"127.0.0.1:{served.port}/v1/chat/completions" in text(browser, "#curl")
    put(browser, "max-tokens", "48")
    # From the page's own focus, by the keyboard alone; Shift and Enter break the line.
    assert browser.value("document.activeElement.id") == "prompt"
    browser.type("What is")
    browser.press("Enter", 13, "\r", shift=True)
    browser.type("water?")
    browser.enter()
    note = browser.wait("document.querySelector('.assistant .note')?.textContent")
    assert "48 out" in note and "tokens/s" in note and "limit of new tokens" in note
    wait_idle(browser)
    assert text(browser, ".user .text") == "What is\nwater?"
    assert text(browser, ".assistant .text")
    # A second turn carries the first one.
    ask(browser, "And fire?")
    browser.wait("document.querySelectorAll('.assistant .note').length === 2")
    wait_idle(browser)
    notes = browser.value("[...document.querySelectorAll('.note')].map((n) => n.textContent)")
    sizes = [int(n.split(" tokens in")[0].replace(",", "")) for n in notes if n]
    assert len(sizes) == 2 and sizes[1] > sizes[0] + 48
    browser.wait("document.getElementById('requests').textContent === '2'")
    own = f"http://127.0.0.1:{served.port}/"
    assert {url for url in browser.requested if not url.startswith((own, "data:"))} == set()
    assert browser.complaints == []


def test_figures_move_while_an_answer_streams_and_stop_stops_it(
    browser: Browser, served: Stack
) -> None:
    opened(browser, served)
    put(browser, "max-tokens", str(ENDLESS))
    before = served.metric("tgi_request_failure", err="dropped")
    ask(browser, "Go on.")
    browser.wait("document.querySelector('.assistant .text').textContent.length > 50")
    browser.wait("document.getElementById('running').textContent === '1'")
    browser.wait("Number(document.getElementById('decode').textContent.replace(',', '')) > 0")
    browser.wait("document.getElementById('decode-line').getAttribute('points').length > 5")
    browser.wait("parseInt(document.getElementById('kv').textContent) > 0")
    assert browser.value("document.getElementById('send').disabled")
    picture(browser, "streaming")
    browser.value("document.getElementById('stop').click()")
    browser.wait("document.querySelector('.assistant .note').textContent === 'stopped'")
    browser.wait("document.getElementById('running').textContent === '0'")
    assert served.metric("tgi_request_failure", err="dropped") == before + 1
    # Escape does the same.
    ask(browser, "Once more.")
    browser.wait("document.querySelectorAll('.assistant').length === 2")
    browser.wait("document.querySelector('.assistant:last-child .text').textContent.length > 50")
    browser.press("Escape", 27)
    browser.wait("document.querySelectorAll('.note').item(3).textContent === 'stopped'")
    browser.value("document.getElementById('clear').click()")
    assert browser.value("document.querySelectorAll('.turn').length") == 0
    assert browser.value("document.getElementById('welcome') !== null")
    assert browser.complaints == []


def test_a_refusal_is_shown_with_its_number_and_the_question_comes_back(
    browser: Browser, served: Stack
) -> None:
    opened(browser, served)
    put(browser, "temperature", "-0.25")
    ask(browser, "Hi")
    browser.wait("document.querySelector('.error b')?.textContent === '422'")
    assert "`temperature`" in text(browser, ".error") and "-0.25" in text(browser, ".error")
    wait_idle(browser)
    assert browser.value("document.getElementById('prompt').value") == "Hi"
    picture(browser, "refused")
    put(browser, "max-tokens", "8")
    put(browser, "temperature", "0")
    browser.value("document.getElementById('prompt').focus()")
    browser.enter()
    browser.wait("document.querySelector('.assistant .note')?.textContent.includes('8 out')")


def test_what_the_model_writes_is_text_and_never_a_page(browser: Browser, served: Stack) -> None:
    opened(browser, served)
    put(browser, "max-tokens", "4")
    ask(browser, "<img src=x onerror=alert(1)><b>bold</b>")
    browser.wait("document.querySelector('.assistant .note')?.textContent")
    assert text(browser, ".user .text") == "<img src=x onerror=alert(1)><b>bold</b>"
    assert browser.value("document.querySelectorAll('#chat img, .text b').length") == 0


def test_a_key_is_asked_for_where_the_server_wants_one(model: Path, browser: Browser) -> None:
    with Stack("--model-id", str(model), *FLAGS, "--api-key", "sesame") as stack:
        opened(browser, stack.wait_ready())
        browser.wait("!document.getElementById('key-form').hidden")
        put(browser, "max-tokens", "8")
        ask(browser, "Hi")
        browser.wait("document.querySelector('.error b')?.textContent === '401'")
        wait_idle(browser)
        assert browser.value("document.activeElement.id") == "key"
        picture(browser, "key")
        for key, outcome in (("wrong", "'401'"), ("sesame", "undefined")):
            browser.value("document.getElementById('clear').click()")
            browser.value("document.getElementById('key').focus()")
            browser.type(key)
            browser.enter()
            browser.wait("document.getElementById('key-form').hidden")
            put(browser, "prompt", "")
            ask(browser, "Hi")
            browser.wait(
                "document.querySelector('.error, .assistant .note:not(:empty)') !== null && "
                f"document.querySelector('.error b')?.textContent === {outcome}"
            )
            wait_idle(browser)
        assert "8 out" in text(browser, ".assistant .note")
        assert "Authorization: Bearer $API_KEY" in text(browser, "#curl")
        assert "sesame" not in browser.value("document.documentElement.outerHTML")
    # The server is gone: the page says so, and what is asked then.
    browser.wait("document.getElementById('state').dataset.state === 'unreachable'")
    ask(browser, "Still there?")
    browser.wait("document.querySelector('.error b')?.textContent === 'No answer'")


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("size", [PHONE, DESK], ids=["phone", "desk"])
def test_it_fits_and_can_be_read(
    browser: Browser, served: Stack, theme: str, size: tuple[int, int]
) -> None:
    browser.theme(theme)
    browser.size(*size)
    opened(browser, served)
    browser.wait("/^[0-9]/.test(document.getElementById('requests').textContent)")
    picture(browser, f"{theme}-{size[0]}-first")
    put(browser, "max-tokens", "60")
    ask(browser, "What is water?")
    browser.wait("document.querySelector('.assistant .note')?.textContent")
    picture(browser, f"{theme}-{size[0]}")
    # Nothing is wider than the screen, nothing that is pressed is smaller than a finger's tip.
    assert browser.value("document.scrollingElement.scrollWidth") <= size[0]
    small = (
        "[...document.querySelectorAll('button, input, textarea')]"
        ".filter((e) => e.offsetParent && e.getBoundingClientRect().height < 24)"
        ".map((e) => e.outerHTML)"
    )
    assert browser.value(small) == []
    assert browser.value(CONTRAST) == []


# Texts whose colour is too close to what is behind them: WCAG 2's ratio, at least 4.5.
CONTRAST = """
(() => {
  const channels = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const light = (colour) => {
    const linear = channels(colour).slice(0, 3).map((c) => {
      const share = c / 255;
      return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
  };
  const behind = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const colour = getComputedStyle(at).backgroundColor;
      if ((channels(colour)[3] ?? 1) > 0) return colour;
    }
    return "rgb(255, 255, 255)";
  };
  const texts = [...document.querySelectorAll("body *")].filter(
    (e) => e.offsetParent && !e.disabled
      && [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim()),
  );
  return texts.flatMap((e) => {
    const pair = [light(getComputedStyle(e).color), light(behind(e))];
    const ratio = (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
    return ratio < 4.5 ? [`${e.tagName} ${e.id} ${e.className}: ${ratio.toFixed(2)}`] : [];
  });
})()
"""
