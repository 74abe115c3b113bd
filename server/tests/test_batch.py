"""From plans to steps: cells, positions, tokens, tables, and plans that contradict themselves."""

import dataclasses

import numpy as np
import pytest
import torch
from fake_model import FakeModel, fake_engine, logits_after, preparation
from planner import Planner, Sequence

from headrace.batch import Step
from headrace.errors import PlanError
from headrace.runner import Runner
from headrace.wire import Binding, Plan, RowFlag, Sampling, decode, encode_plan

NO_INTS = np.zeros(0, np.int32)


def i32(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def plan(step: int = 0, **columns: np.ndarray | list[Binding]) -> Plan:
    names = [field.name for field in dataclasses.fields(Plan)]
    values = {name: NO_INTS for name in names}
    values |= {"step": step, "data": b"", "bindings": [], "trace_context": b""} | columns
    return Plan(**values)


def bind(slot: int, sampling: Sampling | None = None) -> Binding:
    return Binding(slot, 1, sampling or Sampling(), NO_INTS, 1, 0)


def runner(model: FakeModel | None = None, **changes: int) -> Runner:
    return Runner(fake_engine(model), preparation(**changes), blocks=16)


def stage(made: Runner, one: Plan) -> Step:
    """Stages a plan and computes its forward, which shows the model its shape."""
    step = made.stage(one)
    made.forward(step)
    return step


def greedy(prompt: list[int], count: int) -> list[int]:
    known = list(prompt)
    for _ in range(count):
        known.append(int(logits_after(known).argmax()))
    return known[len(prompt) :]


def first_plan() -> Plan:
    return plan(
        bindings=[bind(2), bind(5)],
        append_slot=i32(2, 5),
        append_at=i32(0, 0),
        append_len=i32(2, 1),
        append_block=i32(7, 3, 9),
        row_slot_S=i32(5, 2),
        row_start_S=i32(0, 0),
        row_len_S=i32(2, 5),
        row_flags_S=i32(1, 1),
        token_id=i32(50, 51, 20, 21, 22, 23, 24),
    )


def test_a_mixed_step_says_where_every_token_goes():
    model = FakeModel()
    step = stage(runner(model), first_plan())
    assert step.inputs.tokens_T.tolist() == [50, 51, 20, 21, 22, 23, 24]
    assert step.inputs.context.positions_T.tolist() == [0, 1, 0, 1, 2, 3, 4]
    assert step.inputs.context.cells_T.tolist() == [36, 37, 28, 29, 30, 31, 12]
    assert step.inputs.context.sampled_S.tolist() == [1, 6]
    assert step.position_R.tolist() == [2, 5]
    shape = model.shapes[0]
    assert shape.row_start_S.tolist() == [0, 0] and shape.row_len_S.tolist() == [2, 5]
    assert shape.table_SB.tolist() == [[9, 0], [7, 3]]
    assert shape.table_SB.dtype == torch.int32


def test_decode_rows_take_the_token_that_was_drawn():
    made = runner()
    first = made.execute(first_plan())
    drawn = dict(zip([5, 2], first.token_id.tolist(), strict=True))
    assert drawn == {5: greedy([50, 51], 1)[0], 2: greedy([20, 21, 22, 23, 24], 1)[0]}
    flags = int(RowFlag.SAMPLE | RowFlag.FROM_SLOT)
    step = stage(
        made,
        plan(
            1,
            row_slot_S=i32(2, 5),
            row_start_S=i32(5, 2),
            row_len_S=i32(1, 1),
            row_flags_S=i32(flags, flags),
        ),
    )
    assert step.inputs.tokens_T.tolist() == [drawn[2], drawn[5]]


def test_a_row_may_start_at_the_length_of_its_slot():
    made = runner()
    made.execute(first_plan())
    flags = int(RowFlag.SAMPLE | RowFlag.FROM_SLOT | RowFlag.START_AT_LENGTH)
    row = plan(1, row_slot_S=i32(2), row_start_S=i32(7), row_len_S=i32(1), row_flags_S=i32(flags))
    step = stage(made, row)
    assert step.inputs.context.positions_T.tolist() == [5]


def test_prefill_beside_decode_takes_some_tokens_from_slots():
    made = runner()
    first = made.execute(first_plan())
    step = stage(
        made,
        plan(
            1,
            bindings=[bind(0)],
            append_slot=i32(0),
            append_at=i32(0),
            append_len=i32(1),
            append_block=i32(4),
            row_slot_S=i32(5, 0, 2),
            row_start_S=i32(2, 0, 5),
            row_len_S=i32(1, 3, 1),
            row_flags_S=i32(3, 0, 3),
            token_id=i32(60, 61, 62),
        ),
    )
    five, two = first.token_id.tolist()
    assert step.inputs.tokens_T.tolist() == [five, 60, 61, 62, two]
    assert step.row_R.tolist() == [0, 2]


def test_prompt_logprobs_are_the_same_in_one_chunk_and_in_many():
    def told(chunk: int) -> list[list[float]]:
        sequence = Sequence([3, 1, 4, 1, 5, 9, 2, 6], tokens_max=2, prompt_logprobs=True)
        planner = Planner(chunk=chunk, share=False)
        results = planner.run(runner().execute, [sequence])
        columns = ("prompt_logprob", "prompt_best_token", "prompt_best_logprob")
        return [
            np.concatenate([getattr(result, column) for result in results]).tolist()
            for column in columns
        ]

    logprob, best, best_logprob = told(64)
    assert len(logprob) == len(best) == 8 and np.isnan(logprob[0]) and np.isnan(best_logprob[0])
    known = [3, 1, 4, 1, 5, 9, 2, 6]
    for at in range(1, 8):
        expected_V = torch.from_numpy(logits_after(known[:at])).log_softmax(0)
        assert logprob[at] == pytest.approx(float(expected_V[known[at]]), abs=1e-5)
        assert best[at] == int(expected_V.argmax())
        assert best_logprob[at] == pytest.approx(float(expected_V.max()), abs=1e-5)
    for chunk in (1, 3, 5):
        for column, whole in zip(told(chunk), (logprob, best, best_logprob), strict=True):
            assert column == pytest.approx(whole, nan_ok=True)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"row_slot_S": i32(5, 3)}, "not bound"),
        ({"row_slot_S": i32(5, 80)}, "outside the 8"),
        ({"append_block": i32(7, 0, 9)}, "outside the pool"),
        ({"append_block": i32(7, 16, 9)}, "outside the pool"),
        ({"append_len": i32(2, 2)}, "do not add up"),
        ({"append_at": i32(0, 1)}, "appends 1 blocks at 1"),
        ({"row_start_S": i32(0, 5)}, "beyond the blocks"),
        ({"row_start_S": i32(-1, 0)}, "before position 0"),
        ({"row_len_S": i32(0, 7)}, "without tokens"),
        ({"token_id": i32(1)}, "brings 1 tokens for 7"),
        ({"token_id": i32(50, 51, 20, 21, 22, 23, 97)}, "outside the vocabulary"),
        ({"row_flags_S": i32(1, 8)}, "waits for a mask and draws nothing"),
        ({"bindings": [bind(2), bind(2)]}, "bound again"),
        ({"bindings": [bind(8)]}, "only 8 were prepared"),
        ({"zero_block": i32(0)}, "zeroes a block outside"),
        ({"step": 1}, "step 1 came where step 0 was due"),
    ],
)
def test_a_contradiction_is_refused_in_one_sentence(change, sentence: str):
    with pytest.raises(PlanError, match=sentence):
        runner().stage(dataclasses.replace(first_plan(), **change))


def test_blocks_are_zeroed_before_they_are_written():
    made = runner()
    made.execute(first_plan())
    keys, _ = made.pool.layer(0)
    assert keys[7].flatten().tolist() == [20, 21, 22, 23]
    made.execute(plan(1, zero_block=i32(7)))
    assert keys[7].flatten().tolist() == [0, 0, 0, 0] and int(keys[3].flatten()[0]) == 24


def test_the_digest_tells_plans_and_lengths_apart():
    one = decode(encode_plan(first_plan()))
    other = decode(encode_plan(dataclasses.replace(first_plan(), token_id=i32(*[1] * 7))))
    assert isinstance(one, Plan) and isinstance(other, Plan)
    assert runner().execute(one).digest == runner().execute(one).digest
    assert runner().execute(one).digest != runner().execute(other).digest
