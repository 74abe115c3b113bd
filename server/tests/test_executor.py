"""The thread: order, errors in one sentence, and a second Prepare."""

import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
import torch
from fake_model import FakeModel, fake_engine, logits_after, preparation
from planner import Planner, Sequence
from test_batch import bind, first_plan, i32, plan
from test_sampler import packed

from headrace.batch import Step
from headrace.device.base import Download
from headrace.device.cpu import CpuDevice
from headrace.engine import Engine, Preparation
from headrace.errors import PlanError
from headrace.executor import INBOX_MAX, POLL_S, Executor
from headrace.ops.sampling import SampleRows, Samples
from headrace.runner import Runner
from headrace.telemetry import NoTracer, TraceContext, trace_contexts
from headrace.testing.threads import ThreadComm, run_ranks
from headrace.warm import CROWD, warm_plans
from headrace.wire import (
    Mask,
    Plan,
    Result,
    ResultFlag,
    RowFlag,
    Sampling,
    decode,
    decode_result,
    encode_plan,
    messages,
)

WAIT_S = 10.0


class Harness:
    """An executor with its results and errors caught."""

    def __init__(
        self, engine: Engine | None = None, tracer: object | None = None, mask_s: float = 0.02
    ) -> None:
        self.results: list[Result] = []
        self.errors: list[str] = []
        self.threads: set[str] = set()
        self._changed = threading.Condition()
        self.executor = Executor(
            lambda: engine or fake_engine(),
            tracer or NoTracer(),  # type: ignore[arg-type]
            self._on_result,
            self._on_error,
            mask_s,
        )
        self.executor.start().result(WAIT_S)

    def _on_result(self, data: bytes) -> None:
        with self._changed:
            self.threads.add(threading.current_thread().name)
            self.results.append(decode_result(data))
            self._changed.notify_all()

    def _on_error(self, sentence: str) -> None:
        with self._changed:
            self.errors.append(sentence)
            self._changed.notify_all()

    def prepare(self, **changes: int) -> int:
        return self.executor.prepare(preparation(blocks_max=64, **changes)).result(WAIT_S).blocks

    def submit(self, *plans: Plan) -> None:
        for one in plans:
            self.executor.submit(encode_plan(one))

    def wait(self, done: Callable[[], bool]) -> None:
        with self._changed:
            assert self._changed.wait_for(done, WAIT_S), (self.results, self.errors)


@pytest.fixture
def harness():
    made = Harness()
    yield made
    made.executor.stop()


def second_plan(step: int = 1) -> Plan:
    flags = int(RowFlag.SAMPLE | RowFlag.FROM_SLOT)
    return plan(
        step,
        row_slot_S=i32(2, 5),
        row_start_S=i32(5, 2),
        row_len_S=i32(1, 1),
        row_flags_S=i32(flags, flags),
    )


def test_results_come_in_order_from_one_thread(harness: Harness):
    assert harness.prepare() == 64
    harness.submit(first_plan(), second_plan())
    harness.wait(lambda: len(harness.results) == 2)
    assert [result.step for result in harness.results] == [0, 1]
    assert harness.threads == {"executor"}
    first, second = harness.results
    assert first.row_index.tolist() == [0, 1] and first.token_id.size == 2
    known = [20, 21, 22, 23, 24, int(first.token_id[1])]
    assert int(second.token_id[0]) == int(logits_after(known).argmax())
    assert first.digest != second.digest and first.logprob.max() < 0


def test_numbering_starts_where_prepare_says(harness: Harness):
    harness.prepare(first_step=7)
    harness.submit(first_plan())
    harness.wait(lambda: bool(harness.errors))
    assert harness.errors == ["step 0 came where step 7 was due"]


def test_a_gap_stops_everything_until_the_next_prepare(harness: Harness):
    harness.prepare()
    harness.submit(first_plan(), second_plan(step=2), second_plan(step=1))
    harness.wait(lambda: bool(harness.errors))
    assert harness.errors == ["step 2 came where step 1 was due"]
    harness.prepare(first_step=0)  # Waits its turn: what was sent before it is dropped.
    harness.submit(first_plan())
    harness.wait(lambda: len(harness.results) == 2)
    assert [result.step for result in harness.results] == [0, 0] and len(harness.errors) == 1


def test_a_second_prepare_forgets_the_first(harness: Harness):
    harness.prepare()
    harness.submit(first_plan())
    harness.wait(lambda: len(harness.results) == 1)
    harness.prepare(first_step=1)
    harness.submit(second_plan())
    harness.wait(lambda: bool(harness.errors))
    assert "not bound" in harness.errors[0]


def test_an_unexpected_error_is_one_sentence():
    class Broken(FakeModel):
        broken = False

        def __call__(self, tokens_T: torch.Tensor, step: Step) -> torch.Tensor:  # type: ignore[override]
            if self.broken:
                raise RuntimeError("the wheel came off\nand more")
            return super().__call__(tokens_T, step)  # type: ignore[arg-type]

    model = Broken()
    harness = Harness(fake_engine(model))
    harness.prepare()
    model.broken = True
    harness.submit(first_plan())
    harness.wait(lambda: bool(harness.errors))
    assert harness.errors == ["RuntimeError: the wheel came off"]
    harness.executor.stop()


def test_a_failure_to_load_is_told():
    def load() -> Engine:
        raise PlanError("there is nothing to load")

    executor = Executor(load, NoTracer(), lambda data: None, lambda sentence: None)
    with pytest.raises(PlanError, match="nothing to load"):
        executor.start().result(WAIT_S)


def test_the_inbox_is_bounded():
    begin = threading.Event()

    def load() -> Engine:
        begin.wait(WAIT_S)
        return fake_engine()

    executor = Executor(load, NoTracer(), lambda data: None, lambda sentence: None)
    executor.start()
    with pytest.raises(PlanError, match=f"more than {INBOX_MAX} messages"):
        for _ in range(INBOX_MAX + 1):
            executor.submit(b"")
    begin.set()
    executor.stop()


def mask_of(step: int, row: list[int], allowed: list[list[int]]) -> bytes:
    """The message with the masks of some rows."""
    kinds = messages()
    bits = b"".join(packed(tokens).tobytes() for tokens in allowed)
    mask = kinds.StepMask(step=step, row_i32le=i32(*row).tobytes(), bits=bits)
    return kinds.ToShard(mask=mask).SerializeToString()


def masked_plan(step: int = 1, rows: int = 2) -> Plan:
    """A plan whose first rows wait for masks, of slots that were bound."""
    made = second_plan(step) if step else first_plan()
    flags = made.row_flags_S.copy()
    flags[:rows] |= int(RowFlag.MASKED)
    object.__setattr__(made, "row_flags_S", flags)
    return made


def test_a_mask_that_is_there_is_kept_to(harness: Harness):
    harness.prepare()
    harness.submit(first_plan(), masked_plan(rows=1))
    harness.executor.submit(mask_of(1, [0], [[7, 90]]))
    harness.wait(lambda: len(harness.results) == 2)
    first, second = harness.results
    known = [20, 21, 22, 23, 24, int(first.token_id[1])]
    logits_V = logits_after(known)
    assert int(second.token_id[0]) == max((7, 90), key=lambda token: logits_V[token])
    assert second.row_flags.tolist() == [0, 0]
    # The row beside it is as it would be alone.
    plain = Harness()
    plain.prepare()
    plain.submit(first_plan(), second_plan())
    plain.wait(lambda: len(plain.results) == 2)
    assert int(second.token_id[1]) == int(plain.results[1].token_id[1])
    assert float(second.logprob[1]) == float(plain.results[1].logprob[1])
    plain.executor.stop()


def test_a_mask_may_come_while_it_is_waited_for():
    harness = Harness(mask_s=WAIT_S)
    harness.prepare()
    harness.submit(first_plan(), masked_plan(rows=1))
    harness.wait(lambda: len(harness.results) == 1)  # The first result does not wait for it.
    harness.executor.submit(mask_of(1, [0], [[3]]))
    harness.wait(lambda: len(harness.results) == 2)
    assert int(harness.results[1].token_id[0]) == 3
    assert harness.results[1].row_flags.tolist() == [0, 0]
    harness.executor.stop()


def test_masks_that_do_not_come_are_missed(harness: Harness):
    harness.prepare()
    harness.submit(first_plan(), masked_plan(rows=1))
    harness.wait(lambda: len(harness.results) == 2)
    missed = int(ResultFlag.MASK_MISSED)
    assert harness.results[1].row_flags.tolist() == [missed, 0]
    # Those that come later are nobody's.
    harness.executor.submit(mask_of(1, [0], [[3]]))
    harness.submit(second_plan(step=2))
    harness.wait(lambda: bool(harness.errors) or len(harness.results) == 3)
    assert not harness.errors or "step 2" in harness.errors[0]


def test_a_row_that_is_left_out_misses_its_mask_and_a_plan_says_that_none_will_come():
    harness = Harness(mask_s=WAIT_S)
    harness.prepare()
    harness.submit(masked_plan(step=0))
    harness.executor.submit(mask_of(0, [1], [[5]]))
    harness.wait(lambda: len(harness.results) == 1)
    missed = int(ResultFlag.MASK_MISSED)
    assert harness.results[0].row_flags.tolist() == [missed, 0]
    assert int(harness.results[0].token_id[1]) == 5
    begin = time.monotonic()
    harness.submit(masked_plan(), second_plan(step=2))
    harness.wait(lambda: len(harness.results) >= 2)
    assert harness.results[1].row_flags.tolist() == [missed, missed]
    assert time.monotonic() - begin < WAIT_S
    harness.executor.stop()


def test_masks_of_other_rows_or_of_a_plan_to_come_are_refused():
    for data, sentence in [
        (mask_of(1, [1], [[5]]), "step 1 got masks of rows that wait for none"),
        (mask_of(1, [0, 0], [[5], [5]]), "step 1 got masks of rows that wait for none"),
        (mask_of(1, [9], [[5]]), "step 1 got masks of rows that wait for none"),
        (mask_of(1, [0], []), "step 1 got 0 bytes of masks for 1 rows; a row has 16"),
    ]:
        harness = Harness(mask_s=WAIT_S)
        harness.prepare()
        harness.submit(first_plan(), masked_plan(rows=1))
        harness.executor.submit(data)
        harness.wait(lambda: bool(harness.errors))  # noqa: B023
        assert harness.errors == [sentence]
        harness.executor.stop()
    harness = Harness()
    harness.prepare()
    harness.executor.submit(mask_of(3, [0], [[5]]))
    harness.wait(lambda: bool(harness.errors))
    assert harness.errors == ["step 3 got masks before its plan"]
    harness.executor.stop()


def test_ranks_take_the_masked_token_of_the_first():
    mask = decode(mask_of(1, [0], [[7]]))
    assert isinstance(mask, Mask)

    def rank(comm: ThreadComm) -> tuple[list[int], list[int]]:
        runner = Runner(fake_engine(comm=comm), preparation(), blocks=64)
        runner.execute(first_plan())
        made = masked_plan(rows=2)
        # Only the first rank is told, of one row of two.
        result = runner.execute(made, mask if comm.rank == 0 else None)
        last = runner.slots.last_tokens(torch.tensor([2, 5])).tolist()
        return [*last, result.digest], result.row_flags.tolist()

    (first, flags), (second, none) = run_ranks(2, rank)
    assert first == second and first[0] == 7
    assert (flags, none) == ([0, int(ResultFlag.MASK_MISSED)], [])


def test_a_step_without_a_mask_has_none_of_its_work(monkeypatch: pytest.MonkeyPatch):
    runner = Runner(fake_engine(), preparation(), blocks=64)
    seen: list[int] = []
    sample = type(runner._engine.sampling).sample

    def spy(self: object, logits_SV: torch.Tensor, rows: SampleRows) -> Samples:
        seen.append(int(np.bitwise_or.reduce(rows.features_S)))
        assert rows.masks is None
        return sample(self, logits_SV, rows)  # type: ignore[arg-type]

    monkeypatch.setattr(type(runner._engine.sampling), "sample", spy)
    runner.execute(first_plan())
    runner.execute(masked_plan())  # All of them are missed: nothing is masked either.
    assert seen == [0, 0]


def test_nan_is_flagged_and_stays_in_its_row():
    model = FakeModel()
    runner = Runner(fake_engine(model), preparation(), blocks=64)
    good = Sequence([1, 2, 3], 4)
    bad = Sequence([1, 2, 90], 4)
    alone = Sequence([1, 2, 3], 4)
    Planner().run(Runner(fake_engine(), preparation(), blocks=64).execute, [alone])
    model.poison = {90}
    Planner().run(runner.execute, [good, bad])
    assert good.tokens == alone.tokens and good.flags == [0, 0, 0, 0]
    assert bad.flags[0] == int(ResultFlag.NAN)


class LateDownload:
    """Arrays that are only looked at when the copy is waited for."""

    def __init__(
        self, tensors: list[torch.Tensor], events: list[str], complete: threading.Event
    ) -> None:
        self._tensors, self._events, self._complete = tensors, events, complete

    def done(self) -> bool:
        return self._complete.is_set()

    def wait(self) -> list[np.ndarray]:
        self._events.append("wait")
        return [tensor.numpy() for tensor in self._tensors]


class LateDevice(CpuDevice):
    """A CPU that pretends that launches return early."""

    asynchronous = True
    events: list[str]

    def __init__(self) -> None:
        super().__init__(threads=1)
        self.events = []
        self.complete = threading.Event()
        self.complete.set()

    def download(self, tensors: list[torch.Tensor]) -> Download:
        self.events.append("sampler")
        return LateDownload(tensors, self.events, self.complete)


def test_the_next_forward_is_launched_before_a_result_is_waited_for():
    device = LateDevice()

    class Watched(FakeModel):
        hold = threading.Event()

        def __call__(self, tokens_T, step):  # type: ignore[no-untyped-def]
            device.events.append("forward")
            self.hold.wait(WAIT_S)
            return super().__call__(tokens_T, step)

    model = Watched()
    model.hold.set()
    engine = fake_engine(model)
    object.__setattr__(engine, "device", device)
    harness = Harness(engine)
    harness.prepare()
    device.events.clear()
    model.hold.clear()
    harness.submit(first_plan(), second_plan())
    model.hold.set()
    harness.wait(lambda: len(harness.results) == 2)
    # Reaping reads a download twice: once to wait, once for the arrays.
    assert [e for e in device.events if e != "wait"] == ["forward", "sampler"] * 2
    assert device.events.index("wait") > device.events.index("forward", 1)
    harness.executor.stop()


def test_a_plan_that_comes_while_a_step_runs_is_launched_behind_it():
    device = LateDevice()
    engine = fake_engine()
    object.__setattr__(engine, "device", device)
    harness = Harness(engine)
    harness.prepare()
    device.complete.clear()
    device.events.clear()
    harness.submit(first_plan())
    while "sampler" not in device.events:
        time.sleep(0.001)
    time.sleep(20 * POLL_S)
    assert "wait" not in device.events and not harness.results
    harness.submit(second_plan())  # Its launch has the first result waited for, and sent.
    harness.wait(lambda: len(harness.results) == 1)
    device.complete.set()
    harness.wait(lambda: len(harness.results) == 2)
    harness.executor.stop()


def test_trace_contexts_reach_the_tracer():
    told: list[tuple[int, list[TraceContext]]] = []

    class Tracer:
        def step(self, plan: Plan, begin_ns: int, end_ns: int):
            assert begin_ns <= end_ns <= time.perf_counter_ns() + 10**9
            told.append((plan.step, trace_contexts(plan)))

    harness = Harness(tracer=Tracer())
    harness.prepare()
    context = bytes(range(25))
    traced = first_plan()
    object.__setattr__(traced, "trace_row", i32(1))
    object.__setattr__(traced, "trace_context", context)
    harness.submit(traced, second_plan())
    harness.wait(lambda: len(harness.results) == 2)
    assert told == [(0, [TraceContext(1, context[:16], context[16:24], 24)])]
    harness.executor.stop()


@pytest.mark.parametrize("told", [0, 1, 40])
@pytest.mark.parametrize("state_slots", [0, 4])
@pytest.mark.parametrize("crowd", [0, CROWD])
@pytest.mark.parametrize("context", [2, 6, 256])
@pytest.mark.parametrize(
    ("tokens", "slots", "rows"),
    [(64, 8, 8), (1, 1, 1), (5, 3, 8), (16, 2, 2), (2048, 9, 9), (2048, 100, 100)],
)
def test_warm_plans_are_valid(
    tokens: int, slots: int, rows: int, context: int, crowd: int, state_slots: int, told: int
):
    wanted = preparation(
        step_tokens_max=tokens,
        slots_max=slots,
        step_rows_max=rows,
        state_slots_max=state_slots,
        prompt_logprob_tokens_max=told,
    )
    plans, blocks = warm_plans(wanted, context, crowd)
    if crowd and rows == 100 and context == 256:
        assert [one.row_slot_S.size for one in plans] == [CROWD, CROWD, CROWD, 2]
        assert plans[2].row_len_S[-1] > 1 and not (plans[2].row_len_S[:-1] > 1).any()
    runner = Runner(fake_engine(), wanted, blocks)
    results = [runner.execute(one) for one in plans]
    assert all(result.token_id.size for result in results)
    # As many as may be, with room for the other rows and the tokens of other steps.
    expected = min(told, tokens - (min(rows, slots, tokens, crowd or 8) - 1), context - 5)
    assert sum(result.prompt_logprob.size for result in results) == max(expected, 0)


def test_a_binding_needs_its_state_slot(harness: Harness):
    harness.prepare(state_slots_max=0)
    binding = bind(2)
    object.__setattr__(binding, "sampling", Sampling(presence_penalty=1.0))
    harness.submit(plan(bindings=[binding]))
    harness.wait(lambda: bool(harness.errors))
    assert "only 0 were prepared" in harness.errors[0]
    assert isinstance(preparation(), Preparation)
