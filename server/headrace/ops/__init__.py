"""Operations: each a folder with a plain reference and what is faster somewhere.

Which implementation runs is decided once, at load, by `select`. A folder's `CANDIDATES` are its
implementations in order of preference; the last is the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from headrace.ops import (
    decode_inputs,
    kv_write,
    matmul,
    paged_attention,
    quant_matmul,
    reduce_norm,
    rms_norm,
    rope,
    rows8,
    silu_mul,
)
from headrace.ops.base import Choice, OpSpec, choose
from headrace.ops.decode_inputs import GatherDecodeInputs
from headrace.ops.matmul import MatmulBackend
from headrace.ops.paged_attention import AttentionBackend
from headrace.ops.quant_matmul import CodedMatmul, Kind
from headrace.ops.reduce_norm import MakeReduceNorm
from headrace.ops.rope import RopeAndKvWrite
from headrace.ops.rows8 import Rows8Ops

if TYPE_CHECKING:
    from headrace.device.base import Device

__all__ = ["Choice", "OpSpec", "OpTable", "select"]


@dataclass(frozen=True)
class OpTable:
    """The chosen implementations. What each does is said in its folder's `reference.py`."""

    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    add_rms_norm: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
    reduce_norm: MakeReduceNorm
    rope: Callable[[Tensor, Tensor], Tensor]
    rope_and_kv_write: RopeAndKvWrite
    silu_mul: Callable[[Tensor], Tensor]
    rows8: Rows8Ops
    kv_write: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], None]
    paged_attention: AttentionBackend
    matmul: MatmulBackend
    coded_matmul: Mapping[Kind, CodedMatmul]
    decode_inputs: GatherDecodeInputs
    choices: tuple[Choice, ...]  # the startup table

    def table(self) -> str:
        """The startup table, a line an operation: name, implementation, why it, why not others."""
        lines: list[str] = []
        for choice in self.choices:
            refused = "".join(f"; not {name}: {why}" for name, why in choice.refused)
            lines.append(f"{choice.op:<16} {choice.name:<10} {choice.why}{refused}")
        return "\n".join(lines)


_FOLDERS = {
    "rms_norm": rms_norm.CANDIDATES,
    "reduce_norm": reduce_norm.CANDIDATES,
    "rope": rope.CANDIDATES,
    "silu_mul": silu_mul.CANDIDATES,
    "rows8": rows8.CANDIDATES,
    "kv_write": kv_write.CANDIDATES,
    "paged_attention": paged_attention.CANDIDATES,
    "matmul": matmul.CANDIDATES,
    "decode_inputs": decode_inputs.CANDIDATES,
}


def select(spec: OpSpec, device: Device, reference: bool = False) -> OpTable:
    """Chooses an implementation of every operation.

    Args:
        spec: facts of the model as one rank sees them (`ModelSpec.op_spec`).
        reference: whether to take the references, whatever else there is.
    """
    made: dict[str, Any] = {}
    choices: list[Choice] = []
    for op, candidates in _FOLDERS.items():
        made[op], choice = choose(op, candidates, spec, device, reference)
        if op != "rows8" or spec.rows8 or Kind.FP8.value in spec.coded:
            choices.append(choice)
    coded: dict[Kind, CodedMatmul] = {}
    for kind, candidates in quant_matmul.CANDIDATES.items():
        coded[kind], choice = choose(kind.value, candidates, spec, device, reference)
        if kind.value in spec.coded:
            choices.append(choice)
    return OpTable(
        rms_norm=made["rms_norm"].rms_norm,
        add_rms_norm=made["rms_norm"].add_rms_norm,
        reduce_norm=made["reduce_norm"],
        rope=made["rope"].rope,
        rope_and_kv_write=made["rope"].rope_and_kv_write,
        silu_mul=made["silu_mul"],
        rows8=made["rows8"],
        kv_write=made["kv_write"],
        paged_attention=made["paged_attention"],
        matmul=made["matmul"],
        coded_matmul=coded,
        decode_inputs=made["decode_inputs"],
        choices=tuple(choices),
    )
