"""What operators look at: every panel of the dashboards and every alert, by a real Prometheus."""

import itertools
import json
import math
import re
import shutil
import subprocess
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from headrace.testing.tiny import Tiny
from stack import Stack, free_port

pytestmark = [
    pytest.mark.clients,
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="no Prometheus is installed"),
]

MONITORING = Path(__file__).parents[1] / "docs" / "monitoring"
BOARD = json.loads((MONITORING / "dashboard.json").read_text())
PANELS = [panel for panel in BOARD["panels"] if panel["type"] != "row"]
WAIT_SECONDS_MAX = 30.0

# The panels of TGI's dashboard: how they ask, and for which series.
TGI = """
first   tgi_request_queue_duration method=prefill
median  tgi_batch_forward_duration method=decode
mean    tgi_request_generated_tokens
three   tgi_request_input_length
three   tgi_request_generated_tokens
growth  tgi_request_success
growth  tgi_request_failure by err
three   tgi_request_mean_time_per_token_duration
heat    tgi_request_mean_time_per_token_duration
count   tgi_request_count
sum     tgi_queue_size
avg     tgi_batch_current_max_tokens
three   tgi_request_skipped_tokens
three   tgi_request_duration
avg     tgi_batch_current_size
growth  tgi_batch_concat by reason
three   tgi_request_queue_duration
three   tgi_batch_inference_duration method=prefill
heat    tgi_batch_inference_duration method=prefill
three   tgi_batch_inference_duration method=decode
heat    tgi_batch_inference_duration method=decode
three   tgi_batch_forward_duration method=decode
heat    tgi_batch_forward_duration method=decode
three   tgi_batch_decode_duration method=decode
heat    tgi_batch_decode_duration method=decode
three   tgi_batch_filter_duration method=decode
heat    tgi_batch_filter_duration method=decode
three   tgi_batch_concat_duration method=decode
heat    tgi_batch_concat_duration method=decode
"""

# What the time to a first token is made of there, beside the queue.
PREFILL = "tgi_batch_inference_duration"


def quantile(share: str, series: str, labels: str = "") -> str:
    chosen = f'{series}_bucket{{container="$service"{labels}}}'
    return f"histogram_quantile({share}, sum by (le) (rate({chosen}[10m])))"


def of_tgi(line: str) -> list[str]:
    """The expressions of a line of `TGI`."""
    how, series, *rest = line.split()
    chosen = '{container="$service"}'
    label = [part.split("=") for part in rest if "=" in part]
    labels = "".join(f', {name}="{value}"' for name, value in label)
    bucket = f'{series}_bucket{{container="$service"{labels}}}'
    by = " ".join(rest).replace("by ", "by (") + ")" if rest else ""
    sums = (f"rate({series}_{part}{chosen}[10m])" for part in ("sum", "count"))
    ways = {
        "first": [f"{quantile('0.5', series)} + {quantile('0.5', PREFILL, labels)}"],
        "median": [quantile("0.5", series, labels)],
        "three": [quantile(share, series, labels) for share in ("0.5", "0.9", "0.99")],
        "mean": [" / ".join(sums)],
        "growth": [f"sum {by} (increase({series}{chosen}[1m]))"],
        "heat": [f"sum by (le) (increase({bucket}[5m]))"],
    }
    return ways.get(how, [f"{how} ({series}{chosen})"])


class Prometheus:
    """One that scrapes a server every second. A context manager."""

    def __init__(self, folder: Path, target: int) -> None:
        self.port = free_port()
        config = folder / "prometheus.yml"
        config.write_text(
            "global: {scrape_interval: 1s, scrape_timeout: 1s, evaluation_interval: 1s}\n"
            f"rule_files: ['{MONITORING / 'alerts.yml'}']\n"
            "scrape_configs:\n"
            "  - job_name: headrace\n"
            "    static_configs:\n"
            f"      - {{targets: ['127.0.0.1:{target}'], labels: {{container: served}}}}\n"
        )
        self.log = folder / "prometheus.log"
        argv = ["prometheus", f"--config.file={config}", f"--storage.tsdb.path={folder / 'tsdb'}"]
        argv.append(f"--web.listen-address=127.0.0.1:{self.port}")
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(argv, stdout=log, stderr=subprocess.STDOUT)

    def __enter__(self) -> "Prometheus":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    def get(self, path: str, **parameters: str) -> Any:
        asked = urllib.parse.urlencode(parameters)
        url = f"http://127.0.0.1:{self.port}/api/v1/{path}?{asked}"
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{parameters}: {error.read().decode()}") from error

    def values(self, expression: str) -> list[float]:
        """The numbers that an expression has now, those that a panel would show."""
        expression = expression.replace("$service", "served")
        result = self.get("query", query=expression)["result"]
        found = (float(sample["value"][1]) for sample in result)
        return [value for value in found if math.isfinite(value)]

    def wait(self, expression: str) -> list[float]:
        """The same, once there are any."""
        give_up = time.monotonic() + WAIT_SECONDS_MAX
        while time.monotonic() < give_up:
            assert self.process.poll() is None, self.log.read_text()
            try:
                if values := self.values(expression):
                    return values
            except urllib.error.URLError:
                pass  # It starts.
            time.sleep(0.1)
        raise AssertionError(f"blank: {expression}")


def load(stack: Stack) -> None:
    """Something of everything: prompts seen before, more streams than run, refusals."""
    prompt = "The quick brown fox " * 12

    def one(length: int) -> None:
        body = {"inputs": prompt, "parameters": {"max_new_tokens": length}}
        stack.ok("/generate", body)

    one(4)
    threads = [threading.Thread(target=one, args=(20 + 4 * n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert stack.post("/generate", {"inputs": ""})[0] == 422


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    folder = tmp_path_factory.mktemp("monitoring")
    model = Tiny().write(folder / "model")
    flags = ("--model-id", str(model), "--device", "cpu", "--threads", "1")
    flags += ("--kv-memory", "16000000", "--max-running", "4")
    with Stack(*flags) as stack, Prometheus(folder, stack.port) as prometheus:
        stack.wait_ready()
        # A rate needs a value before and one after: series are born by the first load.
        load(stack)
        prometheus.wait('tgi_request_failure{err="validation"}')
        load(stack)
        prometheus.wait("increase(tgi_request_success[1m]) > 0")
        yield prometheus


@pytest.mark.parametrize("line", TGI.strip().split("\n"))
def test_no_panel_of_tgi_s_dashboard_is_blank(prometheus: Prometheus, line: str) -> None:
    for expression in of_tgi(line):
        values = prometheus.wait(expression)
        if line.startswith("heat"):
            assert any(value > 0 for value in values), expression


@pytest.mark.parametrize("panel", PANELS, ids=[f"{p['id']} {p['title']}" for p in PANELS])
def test_no_panel_of_ours_is_blank(prometheus: Prometheus, panel: Any) -> None:
    for target in panel["targets"]:
        values = prometheus.wait(target["expr"])
        if panel["type"] == "heatmap":
            assert any(value > 0 for value in values), target["expr"]


def test_services_are_found_by_their_label(prometheus: Prometheus) -> None:
    (variable,) = BOARD["templating"]["list"]
    series, label = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["definition"]).groups()  # type: ignore[union-attr]
    found = prometheus.get(f"label/{label}/values", **{"match[]": series})
    assert (variable["name"], found) == ("service", ["served"])


def test_every_alert_can_be_asked_and_none_comes_from_a_server_that_works(
    prometheus: Prometheus,
) -> None:
    (group,) = prometheus.get("rules")["groups"]
    rules = group["rules"]
    assert len(rules) > 10
    known = set(prometheus.get("label/__name__/values"))
    for rule in rules:
        named = set(re.findall(r"\b(?:headrace|tgi|process)_\w+", rule["query"]))
        assert named and named <= known, named - known
        assert (rule["health"], rule["alerts"]) in [("ok", []), ("unknown", [])], rule
        assert rule["annotations"]["summary"] and len(rule["annotations"]["action"]) > 60
        assert rule["labels"]["severity"] in {"warning", "critical"}


def test_alerts_come_when_they_should_and_only_then() -> None:
    tests = MONITORING / "alerts_test.yml"
    promtool = ["promtool", "test", "rules", str(tests)]
    done = subprocess.run(promtool, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    alerts = re.findall(r"alert: (\w+)", (MONITORING / "alerts.yml").read_text())
    rehearsed = re.findall(r'alertname="(\w+)"', tests.read_text())
    assert sorted(alerts) == sorted(rehearsed)


def test_the_dashboard_is_laid_out_without_holes_and_says_what_it_shows() -> None:
    ids = [panel["id"] for panel in BOARD["panels"]]
    assert len(ids) == len(set(ids))
    cells: set[tuple[int, int]] = set()
    for panel in BOARD["panels"]:
        at = panel["gridPos"]
        columns = range(at["x"], at["x"] + at["w"])
        own = set(itertools.product(columns, range(at["y"], at["y"] + at["h"])))
        assert at["x"] + at["w"] <= 24 and not cells & own, panel["title"]
        cells |= own
    assert len(cells) == 24 * (1 + max(y for _, y in cells)), "a hole"
    for panel in PANELS:
        assert panel["title"] and panel["description"].endswith(".")
        assert panel["fieldConfig"]["defaults"]["unit"]
        for target in panel["targets"]:
            assert 'container="$service"' in target["expr"]
