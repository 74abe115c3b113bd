"""`python -m headrace compile`: kernels of some models, or of the start that is under way."""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

from headrace.ahead.stamp import Wanted, alone, facts_of, is_compiled, mark, read_facts
from headrace.config import SHIPPED_KERNELS, keep_kernels
from headrace.errors import ConfigError

# What an image ships kernels for unless folders are named: facts of published checkpoints.
PUBLISHED = Path(__file__).with_name("published.json")
# The child's place behind the shard that it compiles for.
NICENESS = 5


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Declares what the subcommand takes."""
    command.add_argument("--capability", type=_capability, help="of the GPU, such as 9.0")
    command.add_argument("--ranks", type=int, default=1, help="shards of the model [default: 1]")
    command.add_argument("--dtype", default="auto", help="as of the server [default: auto]")
    command.add_argument(
        "--ship", action="store_true", help="into the package, where every start looks first"
    )
    # What a starting shard calls.
    command.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    command.add_argument(
        "folders", nargs="*", type=Path, help="with a config.json [default: some published models]"
    )


def run(arguments: argparse.Namespace) -> int:
    """Compiles; returns the exit status."""
    if arguments.child:
        return _child()
    if arguments.capability is None:
        raise ConfigError("compile needs the --capability of the GPU, such as 9.0")
    keep_kernels(SHIPPED_KERNELS if arguments.ship else None)
    models = {str(folder): read_facts(folder) for folder in arguments.folders}
    failed = False
    for name, model in (models or _published()).items():
        wanted = Wanted(model, arguments.capability, ranks=arguments.ranks, dtype=arguments.dtype)
        result = compile_all(wanted, small=arguments.ship)
        failed |= "error" in result
        print(f"{name}: {result.get('error') or result['done']}", flush=True)
    return int(failed)


def compile_all(wanted: Wanted, small: bool = False) -> dict[str, str]:
    """Compiles what a start wants, unless that is done; marks it if nothing is missing.

    Args:
        small: whether to store only what a start reads.

    Returns: `done` or `error`, a sentence.
    """
    name = wanted.name()
    with alone(name):
        if is_compiled(name):
            return {"done": "by another process"}
        begin = time.perf_counter()
        from triton import knobs

        from headrace.ahead.compile import compile_variants
        from headrace.ahead.rehearsal import variants_wanted
        from headrace.device.cpu import usable_cores

        if small:
            knobs.compilation.store_binary_only = True
        variants = variants_wanted(wanted)
        recorded = time.perf_counter() - begin
        compiled = compile_variants(variants, wanted.capability, usable_cores())
        seconds = time.perf_counter() - begin
        if compiled.missing:
            return {"error": "; ".join(compiled.missing)}
        done = (
            f"{compiled.kernels} kernels in {seconds:.1f} s, {recorded:.1f} of them to find out "
            f"which; {compiled.cpu_s:.1f} s of processors"
        )
        for kernel, longest in compiled.slowest[:1]:
            done += f", the longest {kernel}: {longest:.1f} s"
        mark(name, done)
        return {"done": done}


def _child() -> int:
    """Compiles what the first line of standard input says; ends when that input does."""
    told = os.dup(1)
    os.dup2(2, 1)  # What libraries print is no answer.
    line = sys.stdin.readline()
    threading.Thread(target=_watch_lifeline, name="lifeline", daemon=True).start()
    os.nice(NICENESS)
    try:
        result: dict[str, Any] = compile_all(Wanted.decode(line))
    except Exception as error:
        result = {"error": f"{type(error).__name__}: {error}"}
    os.write(told, (json.dumps(result) + "\n").encode())
    return int("error" in result)


def _watch_lifeline() -> None:
    """Ends the process when the shard's end of the pipe is closed."""
    while os.read(0, 4096):
        pass
    os._exit(1)


def _published() -> dict[str, dict[str, Any]]:
    models = json.loads(PUBLISHED.read_text(encoding="utf-8"))
    return {name: facts_of(values) for name, values in models.items()}


def _capability(text: str) -> tuple[int, int]:
    major, _, minor = text.partition(".")
    return int(major), int(minor)
