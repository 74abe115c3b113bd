#!/usr/bin/env python3
"""Whole steps of a model, through the executor and without a router.

    bench/gpu/step.py --dummy                       Llama-3.1-8B's shape, random weights
    bench/gpu/step.py --model FOLDER --batches 1 64 --profile 64
    bench/gpu/step.py --dummy --ranks 2             divided over two GPUs, rank 0 tells
    bench/gpu/step.py --dummy --weights gptq        as a checkpoint of four bits in groups of 128
    bench/gpu/step.py --dummy --weights fp8         quantized on load, as --quantize fp8 does
    bench/gpu/step.py --dummy --kv fp8_e4m3fn       codes of eight bits in the KV cache
    bench/gpu/step.py --dummy --shape llama-3-70b --weights gptq

Decode: so many sequences of `--context` tokens, two plans in flight as the router keeps them. Wall
time a step, the device's own time for it, and the difference, which is what the host costs. With
`--profile`, what the device did in some steps at that batch: idle time between two steps, and a
table of kernels. Prefill: one prompt, from the plan's arrival to its result.
"""

from __future__ import annotations

import argparse
import json
import queue
import socket
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import multiprocessing

from headrace.comm import join_group
from headrace.device import open_device
from headrace.engine import Engine, Preparation
from headrace.executor import Executor
from headrace.telemetry import NoTracer
from headrace.testing.engine import load as load_engine
from headrace.wire import Binding, Plan, RowFlag, Sampling, decode_result, encode_plan

BLOCK_TOKENS = 16
STEP_TOKENS = 8192
RESULT_S = 120.0
KV_DTYPES = {"fp8_e4m3fn": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
NO_INTS = np.zeros(0, np.int32)


@dataclass(frozen=True)
class Place:
    """A rank: each is a process that executes the same plans."""

    rank: int
    size: int
    address: str  # where ranks meet

    def tell(self, what: Any) -> None:
        if self.rank == 0:
            print(what, flush=True)


@dataclass(frozen=True)
class LoadHow:
    """How weights come."""

    load_format: str
    quantize: str
    kv_dtype: torch.dtype | None
    rows8: bool


class Server:
    """An executor, driven as the router drives it."""

    def __init__(self, place: Place, folder: Path, how: LoadHow, rows: int, slots: int) -> None:
        self._results: queue.Queue[bytes | str] = queue.Queue()
        self._executor = Executor(
            lambda: load(place, folder, how),
            NoTracer(),
            self._results.put,
            self._results.put,
        )
        begin = time.perf_counter()
        engine = self._executor.start().result()
        loaded = time.perf_counter()
        self.vocab_size = engine.vocab_size
        wanted = Preparation(
            first_step=0,
            block_tokens=BLOCK_TOKENS,
            slots_max=slots,
            state_slots_max=1,
            step_tokens_max=STEP_TOKENS,
            step_rows_max=rows,
        )
        prepared = self._executor.prepare(wanted).result()
        done = time.perf_counter()
        place.tell(f"loaded in {loaded - begin:.1f} s, prepared in {done - loaded:.1f} s")
        self.memory = dict(prepared.memory)
        self._step = 0
        self._rng = np.random.default_rng(0)

    def submit(self, **columns: Any) -> None:
        """Sends a plan of these columns, numbered."""
        ints = [name for name in Plan.__dataclass_fields__ if name not in columns]
        values: dict[str, Any] = dict.fromkeys(ints, NO_INTS)
        values |= {"data": b"", "trace_context": b""} | columns
        values["bindings"] = columns.get("bindings", [])
        values["step"] = self._step
        self._executor.submit(encode_plan(Plan(**values)))
        self._step += 1

    def result(self) -> Any:
        """Waits for the next result."""
        got = self._results.get(timeout=RESULT_S)
        if isinstance(got, str):
            raise SystemExit(f"a step failed: {got}")
        return decode_result(got)

    def prefill(self, slots: list[int], tokens: int, room: int, first_block: int) -> None:
        """Binds slots and computes prompts of random tokens, as many rows a step as fit."""
        blocks = -(-(tokens + room) // BLOCK_TOKENS)
        rows_max = max(1, STEP_TOKENS // tokens)
        for at in range(0, len(slots), rows_max):
            group = slots[at : at + rows_max]
            start = 0
            while start < tokens:
                length = min(tokens - start, STEP_TOKENS // len(group))
                flags = int(RowFlag.SAMPLE) if start + length == tokens else 0
                first = first_block + at * blocks
                columns: dict[str, Any] = {}
                if start == 0:
                    columns = {
                        "bindings": [Binding(s, 0, Sampling(), NO_INTS, tokens, 0) for s in group],
                        "append_slot": i32(group),
                        "append_at": np.zeros(len(group), np.int32),
                        "append_len": np.full(len(group), blocks, np.int32),
                        "append_block": np.arange(
                            first, first + len(group) * blocks, dtype=np.int32
                        ),
                    }
                self.submit(
                    **columns,
                    row_slot_S=i32(group),
                    row_start_S=np.full(len(group), start, np.int32),
                    row_len_S=np.full(len(group), length, np.int32),
                    row_flags_S=np.full(len(group), flags, np.int32),
                    token_id=self._rng.integers(
                        100, self.vocab_size - 1, len(group) * length, dtype=np.int32
                    ),
                )
                self.result()
                start += length

    def decode(self, slots: list[int], start: int, steps: int) -> tuple[float, float]:
        """Decodes with two plans in flight.

        Returns: milliseconds a step by the clock, and by the device.
        """
        slot_S = i32(slots)
        flag_S = np.full(len(slots), int(RowFlag.SAMPLE | RowFlag.FROM_SLOT), np.int32)
        one_S = np.ones(len(slots), np.int32)

        def submit(k: int) -> None:
            self.submit(
                row_slot_S=slot_S,
                row_start_S=np.full(len(slots), start + k, np.int32),
                row_len_S=one_S,
                row_flags_S=flag_S,
            )

        submit(0)
        submit(1)
        device: list[int] = []
        ends: list[float] = []
        for k in range(2, steps + 2):
            device.append(self.result().device_time_us)
            ends.append(time.perf_counter())
            if k < steps:
                submit(k)
        skip = min(4, steps // 2)
        wall = (ends[-1] - ends[skip - 1]) / (steps - skip)
        return 1e3 * wall, float(np.mean(device[skip:])) / 1e3

    def release(self, slots: list[int]) -> None:
        """Frees slots."""
        self.submit(release_slot=i32(slots))
        self.result()

    def stop(self) -> None:
        self._executor.stop()


def i32(values: list[int]) -> np.ndarray:
    return np.array(values, np.int32)


@torch.inference_mode()
def load(place: Place, folder: Path, how: LoadHow) -> Engine:
    """A rank's engine, on its GPU."""
    device = open_device("cuda", place.rank)
    device.start()
    comm = join_group(device, place.rank, place.size, place.address, RESULT_S)
    return load_engine(
        folder,
        device,
        load_format=how.load_format,
        quantize=how.quantize,
        kv_dtype=how.kv_dtype,
        rows8=how.rows8,
        comm=comm,
    )


def profile(server: Server, slots: list[int], start: int, steps: int) -> dict[str, Any]:
    """What the device did in some decode steps."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as recorded:
        server.decode(slots, start, steps)
        torch.cuda.synchronize()
    events = sorted(
        (e.time_range.start, e.time_range.end, e.name)
        for e in recorded.events()
        if e.device_type == torch.autograd.DeviceType.CUDA
    )
    kernels: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    gaps: list[float] = []
    idle = 0.0
    busy_until = events[0][0]
    for i, (begin, end, name) in enumerate(events):
        kernels[name] += end - begin
        counts[name] += 1
        idle += max(0.0, begin - busy_until)
        if "HtoD" in name and 0 < i < len(events) - 1:
            gaps.append(events[i + 1][0] - max(e[1] for e in events[max(0, i - 3) : i]))
        busy_until = max(busy_until, end)
    return {
        "gap_us_median": float(np.median(gaps)),
        "gap_us_max": max(gaps),
        "idle_us_step": idle / steps,
        "kernels": [
            (name[:70], counts[name] / steps, micros / steps)
            for name, micros in kernels.most_common(16)
        ],
    }


def write_config(folder: Path, shape: str, weights: str) -> None:
    """That of a published model, as the checkpoints for speed tests have it."""
    sys.path.append(str(Path(__file__).resolve().parents[1]))
    from random_checkpoint import GPTQ, SHAPES

    config = SHAPES[shape] | {"torch_dtype": "bfloat16"}
    if weights == "gptq":
        config["quantization_config"] = GPTQ
    (folder / "config.json").write_text(json.dumps(config))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", type=Path, help="a checkpoint's folder")
    source.add_argument("--dummy", action="store_true", help="a published shape, no files")
    parser.add_argument("--shape", default="llama-3.1-8b", help="with --dummy")
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8, 32, 64, 128, 256])
    parser.add_argument("--prefills", type=int, nargs="*", default=[512, 2048, 8192])
    parser.add_argument("--context", type=int, default=512, help="tokens before the first step")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--profile", type=int, nargs="*", default=[], help="batches to look into")
    parser.add_argument(
        "--weights", default="", help="gptq, with --dummy, or what --quantize takes: fp8, eetq, ..."
    )
    parser.add_argument("--kv", choices=KV_DTYPES, help="of the KV cache, where not the model's")
    parser.add_argument(
        "--rows8", action="store_true", help="activations of eight bits beside four"
    )
    parser.add_argument("--ranks", type=int, default=1, help="GPUs that the model is divided over")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{listener.getsockname()[1]}"
    places = [Place(rank, options.ranks, address) for rank in range(options.ranks)]
    context = multiprocessing.get_context("spawn")
    others = [context.Process(target=measure, args=(options, place)) for place in places[1:]]
    for process in others:
        process.start()
    measure(options, places[0])
    for process in others:
        process.join()


def measure(options: argparse.Namespace, place: Place) -> None:
    """What a rank does: all of them the same, and the first one tells."""
    with tempfile.TemporaryDirectory() as made:
        folder = options.model or Path(made)
        if options.dummy:
            write_config(folder, options.shape, options.weights)
        largest = max([*options.batches, *options.profile, 1])
        load_format = "dummy" if options.dummy else "auto"
        quantize = "" if options.weights == "gptq" else options.weights
        how = LoadHow(load_format, quantize, KV_DTYPES.get(options.kv), options.rows8)
        server = Server(place, folder, how, largest, largest + 8)
    rows: list[dict[str, Any]] = []
    room = 2 * options.steps + 64
    for tokens in options.prefills:
        times = []
        for _ in range(4):
            begin = time.perf_counter()
            chunks_begin = begin
            server.prefill([0], tokens, room, 1)
            times.append(1e3 * (time.perf_counter() - chunks_begin))
            server.release([0])
        rows.append({"what": "prefill", "isl": tokens, "ttft_ms": round(min(times[1:]), 2)})
        place.tell(rows[-1])
    for batch in sorted({*options.batches, *options.profile}):
        slots = list(range(batch))
        server.prefill(slots, options.context, room, 1)
        wall, device = server.decode(slots, options.context, options.steps)
        row: dict[str, Any] = {
            "what": "decode", "batch": batch, "step_ms": round(wall, 3),
            "device_ms": round(device, 3), "host_us": round(1e3 * (wall - device), 1),
        }  # fmt: skip
        place.tell(row)
        if batch in options.profile:
            found = profile(server, slots, options.context + options.steps, 16)
            row |= found
            for key in ("gap_us_median", "gap_us_max", "idle_us_step"):
                place.tell(f"  {key} {found[key]:.1f}")
            for name, count, micros in found["kernels"]:
                place.tell(f"  {micros:9.1f} us  {count:6.1f}  {name}")
        rows.append(row)
        server.release(slots)
    if options.json and place.rank == 0:
        options.json.write_text(json.dumps(rows, indent=1))
    server.stop()


if __name__ == "__main__":
    main()
