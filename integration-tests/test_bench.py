"""`headrace bench` on the CPU, and the table of its figures beside a peer's."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from stack import FLAGS, HEADRACE, Stack

COMPARE = Path(__file__).resolve().parents[1] / "bench" / "compare.py"
SECONDS_MAX = 120.0


def bench(*args: str, status: int = 0) -> tuple[list[dict[str, Any]], str]:
    """Lines of JSON on standard output, and standard error."""
    done = subprocess.run(
        [str(HEADRACE), "bench", *args],
        capture_output=True,
        text=True,
        timeout=SECONDS_MAX,
        check=False,
    )
    assert done.returncode == status, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()], done.stderr


def test_offline_measures_what_was_asked_for(tiny_model: Path) -> None:
    rows, log = bench("offline", "--quick", "--model-id", str(tiny_model), *FLAGS)
    what = [row["what"] for row in rows]
    assert what == ["server", "startup", "decode", "decode", "prefill", "prefill", "offline"]
    server, startup, decode, *_, offline = rows
    assert server["device"] == "cpu" and server["prefix_caching"] is False
    assert 0 < startup["startup_s"] < SECONDS_MAX
    assert decode["batch"] == 1 and "step_ms" in decode
    assert (offline["n"], offline["isl"], offline["osl"]) == (8, 32, 8)
    assert offline["out_tok_s"] > 0
    assert "| decode, batch | step ms | tok/s |" in log


def test_a_scenario_that_does_not_fit_is_told_and_left_out(tiny_model: Path) -> None:
    flags = ("--only", "prefill", "--lengths", "64,100000", "--model-id", str(tiny_model), *FLAGS)
    rows, _ = bench("offline", *flags)
    fits, skipped = rows[-2:]
    assert fits["ttft_ms"] > 0
    assert "100001 tokens a sequence" in skipped["skipped"]


def test_a_model_that_is_not_there_ends_the_benchmark() -> None:
    rows, log = bench("offline", "--model-id", "/no/such/folder", status=1)
    assert rows == [] and "DownloadError" in log


def http(server: Stack, *flags: str) -> dict[str, Any]:
    url = f"http://127.0.0.1:{server.port}"
    rows, log = bench("http", "--url", url, "--isl", "24", "--osl", "8", "-n", "6", *flags)
    assert len(rows) == 1, log
    return rows[0]


@pytest.mark.parametrize(
    "flags",
    [
        ("-c", "3", "--vocab", "200"),
        ("-c", "2", "--vocab", "200", "--rate", "50"),
    ],
)
def test_http_counts_every_token(server: Stack, flags: tuple[str, ...]) -> None:
    row = http(server, *flags)
    assert (row["n"], row["errors"], row["other_length"]) == (6, 0, 0)
    assert row["ttft_p50_ms"] <= row["ttft_p99_ms"] <= row["e2e_p99_ms"]
    # The seconds are told in hundredths, and these runs are about as short.
    rounding = 0.006 * row["out_tok_s"]
    assert row["out_tok_s"] * row["s"] == pytest.approx(6 * 8, abs=rounding)


def test_http_refusals_are_told(server: Stack) -> None:
    url = f"http://127.0.0.1:{server.port}"
    _, log = bench("http", "--url", url, "--isl", "24", "--osl", "100000", status=1)
    assert "422" in log and "must be <= 512" in log


def test_tgi_s_benchmark_measures_a_running_server(server: Stack) -> None:
    program = HEADRACE.with_name("text-generation-benchmark")
    flags = (
        "--tokenizer-name org/m --batch-size 1 --batch-size 2"
        " --sequence-length 10 --decode-length 8 --runs 2 --warmups 1"
        " --temperature 0.8 --top-k 9 --top-p 0.9 --typical-p 0.9"
        " --repetition-penalty 1.1 --frequency-penalty 0.1 --watermark --do-sample --top-n-tokens 2"
        f" --master-shard-uds-path /tmp/s --port {server.port}"
    )
    done = subprocess.run(
        [str(program), *flags.split()],
        capture_output=True,
        text=True,
        timeout=SECONDS_MAX,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line]
    steps = [(row[0], row[1], len(row)) for row in rows if row[1:2] in (["1"], ["2"])]
    latencies = ("Prefill", "Decode (token)", "Decode (total)")
    assert steps[-10:] == [
        *((step, batch, 8) for step in latencies for batch in "12"),
        *((step, batch, 5) for step in ("Prefill", "Decode") for batch in "12"),
    ]
    for sentence in ("--master-shard-uds-path has no", "--watermark has no", "not org/m"):
        assert f"{sentence}" in done.stderr
    assert "Warning: --revision" not in done.stderr


def test_comparison_marks_every_target(tmp_path: Path) -> None:
    def side(name: str, step_ms: float, tok_s: float) -> str:
        rows = [
            {"what": "server"},
            {"what": "decode", "batch": 1, "isl": 512, "step_ms": 99.0},
            {"what": "decode", "batch": 1, "isl": 512, "step_ms": step_ms},
            {"what": "decode", "batch": 8, "isl": 512, "skipped": "too long"},
            {"what": "offline", "n": 1000, "isl": 512, "osl": 256, "out_tok_s": tok_s},
            {"what": "http", "concurrency": 256, "isl": 512, "osl": 256, "out_tok_s": tok_s},
        ]
        path = tmp_path / name
        path.write_text("noise\n" + "\n".join(json.dumps(row) for row in rows) + "\n")
        return str(path)

    files = ["--ours", side("ours", 4.0, 12000), "--theirs", side("theirs", 4.9, 10000)]
    command = [sys.executable, str(COMPARE), *files]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    for line in (
        "| batch 1 | 4.00 | 4.90 | 0.82 | ≤ 0.80 | ✗ |",
        "| batch 8 | - | - | - | ≤ 0.86 |  |",
        "| 1,000 x 512/256 | 12,000 | 10,000 | 1.20 | ≥ 1.10 | ✓ |",
        "| 256 concurrent | 12,000 | 10,000 | 1.20 | ≥ 1.25 | ✗ |",
        "| output tok/s | 12,000 | 12,000 | 1.00 | ≥ 0.95 | ✓ |",
    ):
        assert line in done.stdout.splitlines(), done.stdout
    assert "missed: decode, step ms, batch 1; HTTP, output tok/s, 256 concurrent" in done.stdout
    strict = subprocess.run([*command, "--strict"], capture_output=True, check=False)
    assert strict.returncode == 1
