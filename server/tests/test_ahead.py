"""Kernels compiled ahead: which, by whom, and that a start finds them."""

from __future__ import annotations

import ctypes
import dataclasses
import json
import logging
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from test_config import example

from headrace import serve
from headrace.ahead import child, command, stamp
from headrace.ahead.child import Ahead
from headrace.ahead.stamp import KEYS, Wanted, facts_of, is_compiled, mark, read_facts
from headrace.config import Serve, keep_kernels, kernel_caches
from headrace.errors import ConfigError
from headrace.models import HfConfig, spec_of
from headrace.ops.triton import counting_kernels, warn_of_kernels
from headrace.startup import open_driver

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
HOPPER = (9, 0)
PUBLISHED = json.loads(command.PUBLISHED.read_text())


def environment(cache: Path) -> dict[str, str]:
    """Of a process that compiles for real, into a cache of its own."""
    kept = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "XDG_CACHE_HOME")}
    paths = [str(ROOT / "server"), str(ROOT / "server" / "tests"), kept.get("PYTHONPATH", "")]
    return kept | {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": os.pathsep.join(paths)}


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `rehearse.py` found out."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "server" / "tests" / "rehearse.py")],
        env=environment(tmp_path_factory.mktemp("cache")),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# === which kernels ===


def test_a_rehearsal_finds_kernels_of_every_operation(told: dict[str, Any]) -> None:
    wanted = {"decode_inputs", "rms_norm", "rope_and_kv_write", "silu_mul", "scan", "best"}
    wanted |= {"draw_filtered", "draw_whole", "alternatives", "edit", "raw"}
    assert {f"{name}_kernel" for name in wanted} <= told["names"].keys()
    assert {"_decode_kernel", "_schedule_kernel"} <= told["names"].keys()


def test_a_rehearsal_of_a_group_finds_what_sums_over_ranks(told: dict[str, Any]) -> None:
    names = ["best_of_ranks_kernel", "draw_of_ranks_kernel", "reduce_norm_kernel"]
    assert told["group"] == names


def test_a_rehearsal_finds_what_multiplies_codes(told: dict[str, Any]) -> None:
    assert len(told["coded"]) == 5
    # A library multiplies the small weights of these tests in eight bits.
    assert told["coded"].pop("fp8") == ["rows8_kernel"]
    for names in told["coded"].values():
        assert names == ["coded_tiles_kernel", "widen_kernel"]


def test_rehearsals_agree_and_layers_of_a_kind_count_once(told: dict[str, Any]) -> None:
    assert told["again"] and told["more layers"]


def test_ranks_of_a_group_draw_from_all_logits(told: dict[str, Any]) -> None:
    assert told["group draws"]


def test_no_kernel_is_compiled_for_a_number_of_multiprocessors(told: dict[str, Any]) -> None:
    assert told["other multiprocessors"]


def test_a_device_without_dependent_launch_gets_no_such_kernels(told: dict[str, Any]) -> None:
    assert told["ampere"] == []


def test_a_rehearsal_does_not_import_a_tracing_compiler(told: dict[str, Any]) -> None:
    assert not told["dynamo"]


def test_steps_launch_nothing_that_the_start_did_not(told: dict[str, Any]) -> None:
    """A vocabulary that is no multiple of 16 has rows of logits at two distances."""
    assert told["late"] == {"1 of 320": [], "1 of 509": [], "2 of 509": []}


def test_launches_find_what_was_compiled_ahead(told: dict[str, Any]) -> None:
    assert told["quick"] == told["compiled"] > 3 and not told["missing"]
    assert told["launches"] == {"hits": told["quick"]}


# === the mark ===


class Watched(dict[str, Any]):
    """Remembers which keys were asked for."""

    def __init__(self, values: dict[str, Any]) -> None:
        super().__init__(values)
        self.asked: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)


@pytest.mark.parametrize("name", PUBLISHED)
def test_no_other_key_of_a_config_is_read_than_those_a_mark_knows(name: str) -> None:
    values = Watched(PUBLISHED[name])
    spec = spec_of(HfConfig(values))
    assert values.asked <= set(KEYS)
    assert spec_of(HfConfig(facts_of(PUBLISHED[name]))) == spec


def wanted(**differences: Any) -> Wanted:
    return dataclasses.replace(Wanted(facts_of(PUBLISHED["Qwen3-8B"]), HOPPER), **differences)


def test_whatever_decides_the_kernels_changes_the_mark(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {
        made.name()
        for made in (
            wanted(),
            wanted(model=facts_of(PUBLISHED["Mistral-7B-v0.3"])),
            wanted(capability=(8, 0)),
            wanted(ranks=2),
            wanted(dtype="float16"),
            wanted(quantize="fp8"),
            wanted(kv_dtype="float8_e5m2"),
            wanted(block_tokens=32),
            wanted(running_max=64),
            wanted(step_tokens_max=512),
            wanted(pipeline_depth=1),
        )
    }
    monkeypatch.setattr(stamp, "version", lambda package: "another")
    names.add(wanted().name())
    monkeypatch.setattr(stamp, "_sources", lambda: "other kernels")
    names.add(wanted().name())
    assert len(names) == 13
    assert Wanted.decode(wanted().encode()) == wanted()


def test_a_mark_is_found_in_either_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("TRITON_CACHE_DIR", "TRITON_CACHE_MANAGER"):
        monkeypatch.setenv(variable, "")
        monkeypatch.delenv(variable)
    shipped, own = tmp_path / "shipped", tmp_path / "own"
    monkeypatch.setattr("headrace.config.SHIPPED_KERNELS", shipped)
    keep_kernels(shipped)
    mark("one", "done")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(own))
    keep_kernels()
    assert kernel_caches() == [shipped, own]
    mark("two", "done")
    assert is_compiled("one") and is_compiled("two") and not is_compiled("three")
    assert [path.name for path in (own / stamp.FOLDER).iterdir()] == ["two"]


def rehearsed_block_tokens() -> int:
    text = (ROOT / "server" / "headrace" / "ahead" / "rehearsal.py").read_text()
    (found,) = re.findall(r"^BLOCK_TOKENS = (\d+)$", text, re.MULTILINE)
    return int(found)


def test_defaults_are_the_launchers() -> None:
    text = (ROOT / "launcher" / "config" / "src" / "resolve.rs").read_text()
    found = dict(re.findall(r"const (\w+): u32 = (\d+);", text))
    assert wanted().running_max == int(found["RUNNING_CUDA"])
    assert wanted().step_tokens_max == int(found["STEP_TOKENS_CUDA"])
    assert rehearsed_block_tokens() == serve.BLOCK_TOKENS[0]


# === a cache that is shipped ===


def test_shipped_kernels_are_found_wherever_they_were_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from headrace.ahead import shipped

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "own"))
    monkeypatch.setattr(shipped, "SHIPPED_KERNELS", tmp_path / "shipped")
    folder = tmp_path / "shipped" / "KEY"
    folder.mkdir(parents=True)
    (folder / "k.cubin").write_text("code")
    there = {"k.cubin": "/image/that/was/k.cubin"}
    (folder / "__grp__k.json").write_text(json.dumps({"child_paths": there}))
    (folder / "__grp__half.json").write_text(json.dumps({"child_paths": {"gone": "/gone"}}))
    cache = shipped.ShippedFirst("KEY")
    assert cache.get_group("k.json") == {"k.cubin": str(folder / "k.cubin")}
    assert cache.get_file("k.cubin") == str(folder / "k.cubin")
    assert cache.get_group("half.json") is None and cache.get_file("own") is None
    cache.put_group("half.json", {"own": cache.put("mine", "own")})
    assert cache.get_group("half.json") == {"own": str(tmp_path / "own" / "KEY" / "own")}
    assert shipped.ShippedFirst("OTHER").get_group("k.json") is None


# === beside a start ===


def serving(tmp_path: Path) -> Serve:
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED["Llama-3.1-8B"]))
    made = Serve.parse(example())
    return dataclasses.replace(made, model=dataclasses.replace(made.model, path=tmp_path))


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("TRITON_CACHE_MANAGER", raising=False)
    return tmp_path / "cache"


@pytest.mark.usefixtures("own_cache")
def test_a_start_whose_kernels_are_marked_starts_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    started = serving(tmp_path)
    mark(Wanted.of(started, HOPPER).name(), "done")
    monkeypatch.setattr(subprocess, "Popen", None)
    ahead = Ahead(started)
    ahead.begin(HOPPER)
    ahead.wait()
    assert not caplog.records


def saying(monkeypatch: pytest.MonkeyPatch, program: str) -> None:
    """Has the child be another program."""
    began = subprocess.Popen

    def begin(_: list[str], **named: Any) -> subprocess.Popen[str]:
        return began([sys.executable, "-c", program], **named)

    monkeypatch.setattr(child.subprocess, "Popen", begin)


# Succeeds if its lifeline is still there when it is done.
WATCHFUL = """
import select, sys
sys.stdin.readline()
closed, _, _ = select.select([0], [], [], 0.3)
print('{"error": "the lifeline was cut"}' if closed else '{"done": "all"}')
"""


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize(
    ("program", "level", "sentence"),
    [
        (WATCHFUL, logging.INFO, "compiled ahead: all"),
        ('input(); print(\'{"error": "why"}\')', logging.WARNING, "first launch: why"),
        ("import os; os._exit(7)", logging.WARNING, "status 7"),
        ("import os; os.kill(os.getpid(), 9)", logging.WARNING, "status -9"),
    ],
)
def test_whatever_becomes_of_the_child_is_one_line(
    program: str,
    level: int,
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    saying(monkeypatch, program)
    ahead = Ahead(serving(tmp_path))
    ahead.begin(HOPPER)
    ahead.wait()
    (record,) = caplog.records
    assert record.levelno == level and sentence in record.getMessage()


@pytest.mark.usefixtures("own_cache")
def test_a_child_that_takes_too_long_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(child, "WAIT_S", 0.2)
    saying(monkeypatch, "import signal; signal.pause()")
    ahead = Ahead(serving(tmp_path))
    ahead.begin(HOPPER)
    ahead.wait()
    (record,) = caplog.records
    assert "more than" in record.getMessage()


def test_a_folder_without_a_model_is_somebody_elses_to_refuse(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ahead = Ahead(serving(tmp_path))
    (tmp_path / "config.json").write_text("[]")
    ahead.begin(HOPPER)
    ahead.wait()
    (record,) = caplog.records
    assert "config.json is not a JSON object" in record.getMessage()
    (tmp_path / "config.json").unlink()
    with pytest.raises(ConfigError, match="cannot be read"):
        read_facts(tmp_path)


def compiling(cache: Path) -> subprocess.Popen[str]:
    """A child that compiles all of a large model, with workers."""
    process = subprocess.Popen(
        [sys.executable, "-m", "headrace", "compile", "--child"],
        env=environment(cache),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdin is not None
    process.stdin.write(wanted().encode() + "\n")
    process.stdin.flush()
    return process


def workers_of(process: subprocess.Popen[str]) -> list[int]:
    """Waits until a process has children that compile; returns them."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while process.poll() is None:
        found = [int(word) for word in children.read_text().split()]
        forked = [pid for pid in found if b"--child" in _command_of(pid)]
        if forked:
            return forked
    raise AssertionError("the child ended before it had workers")


def _command_of(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def wait_for_the_end_of(pids: list[int]) -> None:
    while any(_command_of(pid) for pid in pids):
        os.sched_yield()


@pytest.mark.parametrize("ends", ["lifeline", "kill"])
def test_no_process_outlives_the_shard(ends: str, tmp_path: Path) -> None:
    process = compiling(tmp_path)
    workers = workers_of(process)
    if ends == "lifeline":
        assert process.stdin is not None
        process.stdin.close()  # As the kernel does when the shard is gone.
    else:
        process.send_signal(signal.SIGKILL)
    assert process.wait() != 0
    wait_for_the_end_of(workers)
    assert process.stdout is not None and process.stdout.read() == ""


def test_the_driver_tells_the_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    class Driver:
        def cuInit(self, flags: int) -> int:
            return flags

        def cuDeviceGet(self, device: Any, index: int) -> int:
            del device
            return 0 * index

        def cuDeviceGetAttribute(self, value: Any, attribute: int, device: Any) -> int:
            del device
            value._obj.value = {75: 9, 76: 0}[attribute]
            return 0

        def cuDevicePrimaryCtxRetain(self, context: Any, device: Any) -> int:
            del context, device
            return 0

    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver())
    found: list[tuple[int, int]] = []
    open_driver(0, found.append).join(60)
    assert found == [HOPPER]


def test_a_kernel_that_no_warm_up_launched_is_warned_of(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    knobs = pytest.importorskip("triton").knobs
    monkeypatch.setattr(knobs.compilation, "listener", None)
    launched = {"src": None, "metadata": {"name": "late_kernel"}, "metadata_group": {}}
    with counting_kernels() as counted:
        for cache_hit in (True, False, False):
            knobs.compilation.listener(**launched, times=None, cache_hit=cache_hit)
    assert counted == {"found": 1, "compiled": 2} and knobs.compilation.listener is None
    warn_of_kernels()
    with counting_kernels():
        knobs.compilation.listener(**launched, times=None, cache_hit=False)
    assert not caplog.records
    knobs.compilation.listener(**launched, times=None, cache_hit=False)
    assert "late_kernel was compiled" in caplog.text
