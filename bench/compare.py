#!/usr/bin/env python3
"""Ours ÷ theirs for every figure, beside its target: a table for a document.

    bench/compare.py --ours ours*.jsonl --theirs vllm*.jsonl [--precision bf16] [--gpus 1]

The files hold the lines of `headrace bench`; where one figure occurs twice the last counts. Only
ratios of runs beside each other on one machine mean something. Exit status 1 with `--strict` when
a target is missed or not measured.
"""

import argparse
import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]

BATCHES = (1, 8, 32, 64, 128, 256)
LENGTHS = (512, 2048, 8192, 32768)
MIXES = ((1000, 512, 256), (300, 2048, 128), (512, 128, 512))
LEVELS = (1, 16, 64, 256)

# Decode step, ours / theirs at most, by precision and number of GPUs.
DECODE_TARGETS: dict[tuple[str, int], dict[int, float]] = {
    ("bf16", 1): {1: 0.80, 8: 0.86, 32: 0.86, 64: 0.85, 128: 0.84, 256: 0.84},
    ("fp8", 1): {1: 0.84, 8: 0.84, 32: 0.73, 64: 0.80, 128: 0.76, 256: 0.73},
    ("int4", 1): {1: 0.66, 8: 0.70, 32: 0.78, 64: 0.73},
    ("bf16", 2): {1: 0.78, 8: 0.78, 32: 0.78, 64: 0.78},
}
PREFILL_TARGETS = {512: 0.80, 2048: 0.97, 8192: 1.00, 32768: 1.00}
# Output tokens a second, ours / theirs at least.
OFFLINE_TARGETS = {"bf16": 1.10, "fp8": 1.20}
HTTP_TARGETS = {
    ("out_tok_s", 256): 1.25,
    ("ttft_p50_ms", 64): 0.5,
    ("ttft_p50_ms", 256): 0.5,
    ("ttft_p99_ms", 64): 0.85,
    ("ttft_p99_ms", 256): 0.85,
    ("itl_p99_ms", 256): 0.5,
}
STARTUP_TARGET = 0.25
# Our own HTTP throughput / our own offline throughput at least.
HTTP_OF_OFFLINE_TARGET = 0.95


@dataclass(frozen=True)
class Cell:
    """A figure of both sides. `more` says that more is better; a target bounds the ratio."""

    group: str
    name: str
    ours: float | None
    theirs: float | None
    target: float | None = None
    more: bool = False

    @property
    def ratio(self) -> float | None:
        return self.ours / self.theirs if self.ours is not None and self.theirs else None

    @property
    def is_met(self) -> bool | None:
        """None where there is no target or no figure."""
        if self.ratio is None or self.target is None:
            return None
        return self.ratio >= self.target if self.more else self.ratio <= self.target

    def line(self) -> str:
        mark = {True: "✓", False: "✗", None: ""}[self.is_met]
        sign = "≥" if self.more else "≤"
        target = "" if self.target is None else f"{sign} {self.target:.2f}"
        ratio = "-" if self.ratio is None else f"{self.ratio:.2f}"
        cells = (self.name, number(self.ours), number(self.theirs), ratio, target, mark)
        return "| " + " | ".join(cells) + " |"


def number(value: float | None) -> str:
    """With as many digits as are read."""
    if value is None:
        return "-"
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 100 else f"{value:.2f}"


def key(row: Row) -> tuple[Any, ...] | None:
    """What a row is a figure of."""
    match row.get("what"):
        case "decode":
            return "decode", row["batch"], row["isl"]
        case "prefill":
            return "prefill", row["isl"]
        case "offline":
            return "offline", row["n"], row["isl"], row["osl"]
        case "http" if row.get("concurrency"):
            return "http", row["concurrency"], row["isl"], row["osl"]
        case "startup" | "http_startup" as what:
            return (what,)
    return None


def read(paths: Iterable[Path]) -> dict[tuple[Any, ...], Row]:
    """The rows of all files by what they are figures of."""
    found: dict[tuple[Any, ...], Row] = {}
    for path in paths:
        for line in path.read_text().splitlines():
            if not line.startswith("{"):
                continue
            row = json.loads(line)
            name = key(row)
            if name is not None and "skipped" not in row:
                found[name] = row
    return found


class Figures:
    """Figures of both sides by what they are figures of."""

    def __init__(self, ours: Iterable[Path], theirs: Iterable[Path]):
        self.ours, self.theirs = read(ours), read(theirs)

    def cell(
        self,
        group: str,
        name: str,
        of: tuple[Any, ...],
        field: str,
        target: float | None = None,
        more: bool = False,
    ) -> Cell:
        ours, theirs = (side.get(of, {}).get(field) for side in (self.ours, self.theirs))
        return Cell(group, name, ours, theirs, target, more)

    def keys(self, what: str, fixed: Iterable[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
        """Those that have targets, then whatever else was measured."""
        known = [(what, *rest) for rest in fixed]
        seen = {of for of in (*self.ours, *self.theirs) if of[0] == what}
        return known + sorted(seen - set(known))


def cells(figures: Figures, precision: str, gpus: int) -> list[Cell]:
    """Every figure that has a target and every other that both sides could have."""
    done: list[Cell] = []
    decode = DECODE_TARGETS.get((precision, gpus), {})
    for of in figures.keys("decode", [(batch, 512) for batch in BATCHES]):
        target = decode.get(of[1]) if of[2] == 512 else None
        name = f"batch {of[1]}" + (f", {of[2]} tokens" if of[2] != 512 else "")
        done.append(figures.cell("decode, step ms", name, of, "step_ms", target))
    for of in figures.keys("prefill", [(length,) for length in LENGTHS]):
        target = PREFILL_TARGETS.get(of[1]) if gpus == 1 else None
        done.append(figures.cell("prefill, ms", f"{of[1]:,} tokens", of, "ttft_ms", target))
    for of in figures.keys("offline", MIXES):
        name = f"{of[1]:,} x {of[2]}/{of[3]}"
        has_target = gpus == 1 and of[1:] in MIXES
        target = OFFLINE_TARGETS.get(precision) if has_target else None
        done.append(figures.cell("offline, output tok/s", name, of, "out_tok_s", target, more=True))
    done += http_cells(figures)
    for what, name in (("startup", "offline"), ("http_startup", "HTTP server")):
        target = STARTUP_TARGET
        done.append(figures.cell("start to ready, s", name, (what,), "startup_s", target))
    return done


def http_cells(figures: Figures) -> list[Cell]:
    fields = (
        ("out_tok_s", "HTTP, output tok/s", True),
        ("ttft_p50_ms", "HTTP, TTFT p50 ms", False),
        ("ttft_p99_ms", "HTTP, TTFT p99 ms", False),
        ("itl_p50_ms", "HTTP, ITL p50 ms", False),
        ("itl_p99_ms", "HTTP, ITL p99 ms", False),
    )
    done = []
    for field, group, more in fields:
        for of in figures.keys("http", [(level, 512, 256) for level in LEVELS]):
            usual = of[2:] == (512, 256)
            name = f"{of[1]} concurrent" + ("" if usual else f", {of[2]}/{of[3]}")
            target = HTTP_TARGETS.get((field, of[1])) if usual else None
            done.append(figures.cell(group, name, of, field, target, more))
    http = figures.ours.get(("http", 256, 512, 256), {}).get("out_tok_s")
    offline = figures.ours.get(("offline", *MIXES[0]), {}).get("out_tok_s")
    group = "HTTP at 256 concurrent (first column) ÷ our own offline figure (second)"
    return [*done, Cell(group, "output tok/s", http, offline, HTTP_OF_OFFLINE_TARGET, more=True)]


def table(rows: list[Cell], names: tuple[str, str]) -> str:
    """Markdown, a heading a group."""
    ours, theirs = names
    lines = [f"| | {ours} | {theirs} | {ours} ÷ {theirs} | target | |", "|---|---|---|---|---|---|"]
    group = ""
    for cell in rows:
        if cell.group != group:
            group = cell.group
            lines.append(f"| **{group}** | | | | | |")
        lines.append(cell.line())
    return "\n".join(lines)


def summary(rows: list[Cell]) -> str:
    with_target = [cell for cell in rows if cell.target is not None]
    met = sum(cell.is_met is True for cell in with_target)
    missed = [f"{c.group}, {c.name}" for c in with_target if c.is_met is False]
    unmeasured = sum(cell.is_met is None for cell in with_target)
    text = f"{met} of {len(with_target)} targets reached, {unmeasured} not measured"
    return text + (f"; missed: {'; '.join(missed)}" if missed else "")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--ours", type=Path, nargs="+", required=True, help="files of lines of JSON")
    add("--theirs", type=Path, nargs="+", required=True)
    add("--precision", choices=["bf16", "fp8", "int4"], default="bf16", help="chooses the targets")
    add("--gpus", type=int, default=1)
    add("--names", nargs=2, default=["headrace", "vLLM"], help="headings of the columns")
    add("--measured-only", action="store_true", help="leave out what one side did not measure")
    add("--strict", action="store_true")
    args = parser.parse_args()
    figures = Figures(args.ours, args.theirs)
    rows = cells(figures, args.precision, args.gpus)
    if args.measured_only:
        rows = [cell for cell in rows if cell.ratio is not None]
    print(table(rows, tuple(args.names)))
    print(f"\n{summary(rows)}")
    failed = any(cell.target is not None and cell.is_met is not True for cell in rows)
    return 1 if args.strict and failed else 0


if __name__ == "__main__":
    sys.exit(main())
