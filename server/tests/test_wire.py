"""The contract's bytes: golden vectors that both sides read, and columns that are torn."""

import json
from pathlib import Path

import numpy as np
import pytest

from headrace.errors import PlanError
from headrace.wire import (
    Binding,
    Plan,
    Result,
    decode,
    decode_result,
    encode_plan,
    encode_result,
    messages,
)

TESTDATA = Path(__file__).parents[2] / "proto" / "testdata"
PLANS = sorted(path.stem for path in TESTDATA.glob("plan_*.json"))
RESULTS = sorted(path.stem for path in TESTDATA.glob("result_*.json"))

# What the contract calls a field, and what `Plan` and `Binding` call it.
RENAMED = {
    "row_slot": "row_slot_S",
    "row_start": "row_start_S",
    "row_len": "row_len_S",
    "row_flags": "row_flags_S",
    "history_token": "history",
}


def read(name: str) -> tuple[dict, bytes]:
    value = json.loads((TESTDATA / f"{name}.json").read_text())
    return value, (TESTDATA / f"{name}.binpb").read_bytes()


def listed(column: np.ndarray | tuple) -> list:
    values = column.tolist() if isinstance(column, np.ndarray) else list(column)
    return [None if np.isnan(value) else value for value in values]


def compare(value: dict, made: Plan | Result | Binding) -> None:
    for name, expected in value.items():
        if name == "sampling":
            compare(expected, made.sampling)
            continue
        short = name.removesuffix("_i32le").removesuffix("_f32le")
        if isinstance(made, Plan | Binding):
            short = RENAMED.get(short, short)
        found = getattr(made, short)
        if name == "bindings":
            assert len(found) == len(expected)
            for binding, binding_value in zip(found, expected, strict=True):
                compare(binding_value, binding)
        elif name == "trace_context":
            assert found.hex() == expected
        elif isinstance(expected, list):
            assert listed(found) == expected, name
        else:
            assert found == expected, name


def test_there_are_golden_vectors():
    assert PLANS and RESULTS


@pytest.mark.parametrize("name", PLANS)
def test_golden_plans_are_read_and_written_alike(name: str):
    value, data = read(name)
    plan = decode(data)
    assert isinstance(plan, Plan) and plan.data == data
    compare(value["plan"], plan)
    again = decode(encode_plan(plan))
    assert isinstance(again, Plan)
    compare(value["plan"], again)


@pytest.mark.parametrize("name", RESULTS)
def test_golden_results_are_read_and_written_alike(name: str):
    value, data = read(name)
    result = decode_result(data)
    compare(value, result)
    compare(value, decode_result(encode_result(result)))


def test_columns_are_views():
    _, data = read(PLANS[0])
    plan = decode(data)
    assert isinstance(plan, Plan)
    assert not plan.row_slot_S.flags.owndata and not plan.row_slot_S.flags.writeable


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"row_slot_i32le": b"\0\0\0"}, "torn"),
        ({"row_slot_i32le": b"\0\0\0\0"}, "row columns have different lengths"),
        ({"append_at_i32le": b"\0\0\0\0"}, "append columns have different lengths"),
        ({"trace_context": b"\0"}, "trace columns have different lengths"),
    ],
)
def test_torn_columns_are_refused(fields: dict, sentence: str):
    kinds = messages()
    data = kinds.ToShard(plan=kinds.StepPlan(step=4, **fields)).SerializeToString()
    with pytest.raises(PlanError, match=sentence):
        decode(data)


@pytest.mark.parametrize("data", [b"", b"\xff\xff\xff"])
def test_what_is_no_message_is_refused(data: bytes):
    with pytest.raises(PlanError, match="ToShard"):
        decode(data)
