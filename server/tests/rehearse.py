"""What a process that is allowed to compile finds out about a tiny model, as JSON.

Tests run Triton in its interpreter; this runs beside them, without it, and compiles three of the
quickest kernels.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from planner import Planner, Sequence
from triton import knobs
from triton.compiler.compiler import CompiledKernel

from headrace.ahead import rehearsal
from headrace.ahead.compile import compile_variants
from headrace.ahead.stamp import Wanted
from headrace.comm import Place
from headrace.device.absent import AbsentDevice
from headrace.engine import Preparation
from headrace.models import HfConfig
from headrace.prepare import prepare_engine
from headrace.runner import Runner
from headrace.warm import VARIANTS
from headrace.wire import Plan, Result, Sampling

HOPPER = (9, 0)
CODED: dict[str, dict[str, Any]] = {
    "nf4": {"quantize": "bitsandbytes-nf4"},
    "int8": {"quantize": "eetq"},
    "fp8": {"quantize": "fp8"},
    "gptq": {
        "model": {
            "quantization_config": {"quant_method": "gptq", "group_size": 32, "desc_act": True}
        },
    },
    "awq": {"model": {"quantization_config": {"quant_method": "awq", "group_size": 32}}},
}
QUICK = ("rms_norm_kernel", "silu_mul_kernel", "decode_inputs_kernel")
TINY = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "max_position_embeddings": 512,
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "torch_dtype": "bfloat16",
    "vocab_size": 320,
}


def recorded(**differences: Any) -> list[str]:
    wanted = Wanted(TINY, HOPPER, running_max=80, step_tokens_max=256)
    model = TINY | differences.pop("model", {})
    variants = rehearsal.variants_wanted(
        Wanted(**(vars(wanted) | differences | {"model": model})),
    )
    return sorted(f"{variant.name} {variant.data}" for variant in variants)


def draws(variants: list[str]) -> list[str]:
    """Those that draw tokens of every step by any feature."""
    return [line for line in variants if line.startswith(("draw_whole", "draw_filtered", "edit_"))]


def hits_of_launches(wanted: Wanted) -> dict[str, int]:
    """Launches the quick kernels as a start does; returns whether they were found in the cache."""
    found: Counter[str] = Counter()

    def skip(*, fn: Any, **_: Any) -> bool:
        return fn.jit_function.__name__ not in QUICK

    def listen(*, cache_hit: bool, **_: Any) -> None:
        found["hits" if cache_hit else "misses"] += 1

    knobs.runtime.jit_cache_hook = skip
    knobs.compilation.listener = listen
    # There is nobody to launch on.
    CompiledKernel.run = property(lambda self: lambda *_: None)
    CompiledKernel.launch_metadata = lambda *_: None
    rehearsal.recording = lambda: nullcontext([])
    rehearsal.variants_wanted(wanted)
    return dict(found)


def launched_late(ranks: int, vocab: int) -> list[str]:
    """Kernels that steps of all kinds launch, and the start before them did not."""
    hf, device = HfConfig(TINY | {"vocab_size": vocab}), AbsentDevice(HOPPER, 132)
    prepared = Preparation(
        first_step=0,
        block_tokens=16,
        slots_max=80,
        state_slots_max=80,
        step_tokens_max=256,
        step_rows_max=80,
        prompt_logprob_tokens_max=64,
    )
    late: list[str] = []
    with (
        rehearsal.untraced(),
        rehearsal.standing_in(HOPPER),
        rehearsal.recording() as found,
        torch.inference_mode(),
    ):
        for rank in range(ranks):
            place = Place(rank, ranks)
            made = rehearsal._engine(hf, device, (torch.bfloat16, None), place)
            runner, _ = prepare_engine(made, prepared)
            before = len(found)
            for asked in requests():
                runner._next_step = 0
                runner.slots.bound_Z[:] = False

                def execute(plan: Plan, runner: Runner = runner) -> Result:
                    result = runner.execute(plan)
                    # Nothing was computed, and other ranks than the first tell nothing.
                    zeros = np.zeros(int((plan.row_flags_S & 1).sum()), np.int32)
                    columns = ("token_id", "row_flags", "top_count", "logprob")
                    for column in columns:
                        setattr(result, column, zeros)
                    return result

                Planner(blocks=512, block_tokens=16, running_max=40, chunk=200).run(execute, asked)
            late += [variant.name for variant in found[before:]]
    return late


def requests() -> Iterator[list[Sequence]]:
    """Loads: all kinds of draws together, then each alone, in batches of several sizes."""
    kinds = [*VARIANTS, Sampling(temperature=0.9)]
    yield [Sequence([1] * (3 + 9 * i), 3 + i, kind) for i, kind in enumerate(kinds * 3)]
    for kind in kinds:
        for length, count in ((3, 1), (40, 3), (17, 24)):
            yield [Sequence([1] * length, 4, kind) for _ in range(count)]


def main() -> None:
    wanted = Wanted(TINY, HOPPER, running_max=80, step_tokens_max=256)
    variants = rehearsal.variants_wanted(wanted)
    told: dict[str, Any] = {
        "names": dict(Counter(variant.name for variant in variants)),
        "dynamo": "torch._dynamo" in sys.modules,
        "again": recorded() == recorded(),
        "group draws": draws(recorded(ranks=2)) == draws(recorded()),
        "group": sorted(
            {line.split()[0] for line in recorded(ranks=2)} - {v.name for v in variants}
        ),
        "coded": {
            name: sorted({line.split()[0] for line in recorded(**how)} - {v.name for v in variants})
            for name, how in CODED.items()
        },
        "more layers": recorded(model={"num_hidden_layers": 40}) == recorded(),
        "ampere": [line for line in recorded(capability=(8, 0)) if '"launch_pdl": true' in line],
    }
    multiprocessors, rehearsal.MULTIPROCESSORS = rehearsal.MULTIPROCESSORS, 78
    told["other multiprocessors"] = recorded() == sorted(
        f"{variant.name} {variant.data}" for variant in variants
    )
    rehearsal.MULTIPROCESSORS = multiprocessors
    told["late"] = {
        f"{ranks} of {vocab}": launched_late(ranks, vocab)
        for ranks, vocab in ((1, 320), (1, 509), (2, 509))
    }
    quick = [variant for variant in variants if variant.name in QUICK]
    compiled = compile_variants(quick, HOPPER, workers=2)
    told |= {"quick": len(quick), "compiled": compiled.kernels, "missing": compiled.missing}
    told["launches"] = hits_of_launches(wanted)
    print(json.dumps(told))


if __name__ == "__main__":
    main()
