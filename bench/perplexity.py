#!/usr/bin/env python3
"""Perplexity of a model on a text, as it is and quantized: what each format costs in quality.

    bench/perplexity.py MODEL TEXT --quantize fp8 eetq bitsandbytes-nf4 --checkpoint OTHER_FOLDER

MODEL is a folder; each --checkpoint is the same model quantized, each --quantize a format that it
is given on load. The text is cut into windows without overlap; every token of a window but the
first counts. Runs on the CPU, by the operations that a server there chooses.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tokenizers import Tokenizer

sys.path.insert(0, str(Path(__file__).parent.parent / "server"))

from headrace.comm import SingleComm
from headrace.device.cpu import CpuDevice
from headrace.models import load_model, read_scheme, read_spec
from headrace.ops import select
from headrace.ops.quant_matmul.reference import ReferenceRows8Matmul
from headrace.testing.paged import PagedRunner, PagedSequence


@dataclass(frozen=True)
class Case:
    """A folder and how it is quantized on load."""

    folder: Path
    quantize: str = ""
    rows8: bool = False  # whether activations have eight bits, too


@torch.inference_mode()
def nats(case: Case, windows: list[list[int]], dtype: torch.dtype | None) -> tuple[str, float]:
    """Returns what the weights are called, and the mean surprise of a token."""
    device = CpuDevice()
    device.start()
    spec, comm = read_spec(case.folder), SingleComm()
    scheme = read_scheme(case.folder, case.quantize)
    dtype = dtype or device.default_dtype(spec.checkpoint_dtype).dtype
    ops = select(spec.op_spec(dtype, 1, scheme), device)
    if case.rows8:
        coded = {**ops.coded_matmul, **dict.fromkeys(scheme.kinds, ReferenceRows8Matmul(dtype))}
        ops = replace(ops, coded_matmul=coded)
    model = load_model(
        case.folder,
        device=device,
        dtype=dtype,
        comm=comm,
        ops=ops,
        load_format="auto",
        quantize=case.quantize,
    )
    runner = PagedRunner(
        model, ops, dtype=dtype, blocks=2 + len(windows) * (len(windows[0]) // 16 + 1)
    )
    total, count = 0.0, 0
    for window in windows:
        logits_TV = runner.step([(PagedSequence(), window)], every=True)
        targets_T = torch.tensor(window[1:])
        loss = torch.nn.functional.cross_entropy(logits_TV[:-1], targets_T, reduction="sum")
        total, count = total + float(loss), count + len(window) - 1
    return scheme.name + ", activations of 8 bits" * case.rows8, total / count


def main() -> None:
    """Prints a table in Markdown."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--checkpoint", type=Path, nargs="*", default=[])
    parser.add_argument("--quantize", nargs="*", default=[])
    parser.add_argument(
        "--rows8",
        action="store_true",
        help="fp8 and checkpoints once more, activations rounded as GPUs do",
    )
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of activations")
    arguments = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(arguments.model / "tokenizer.json"))
    ids = tokenizer.encode(arguments.text.read_text(encoding="utf-8"), add_special_tokens=False).ids
    windows = [ids[at : at + arguments.window] for at in range(0, len(ids), arguments.window)]
    windows = [window for window in windows if len(window) > 1]
    dtype = None if arguments.dtype is None else getattr(torch, arguments.dtype)
    cases = [Case(arguments.model)]
    cases += [Case(arguments.model, name) for name in arguments.quantize]
    cases += [Case(arguments.model, "fp8", rows8=True)] * arguments.rows8
    cases += [Case(folder) for folder in arguments.checkpoint]
    cases += [Case(folder, rows8=True) for folder in arguments.checkpoint if arguments.rows8]
    print(f"{len(ids)} tokens, windows of {arguments.window}\n")
    print("| weights | perplexity | against the first |\n|---|---|---|")
    first = None
    for case in cases:
        name, surprise = nats(case, windows, dtype)
        first = first if first is not None else surprise
        label = f"{name} ({case.folder.name})" if case.folder != arguments.model else name
        loss = 100 * (math.exp(surprise - first) - 1)
        print(f"| {label} | {math.exp(surprise):.3f} | {loss:+.2f} % |", flush=True)


if __name__ == "__main__":
    main()
