"""The thread that owns the device: it loads the model, sizes the pool and executes plans in order.

A step is two launches, forward and sampler. Where launches return before their work is done, the
forward of step k+1 is launched before the result of step k is waited for, so that the device never
waits for the host; where they do not, a result is sent as soon as it is there.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
import zlib
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from headrace.batch import NO_GRAPHS, Batcher, GraphSizes, Step
from headrace.comm import Comm
from headrace.device import Device, Timer
from headrace.errors import HeadraceError, PlanError
from headrace.graphs import DecodeGraphs, PieceGraphs, buckets, token_buckets
from headrace.kv import KvLayout, KvPool
from headrace.layers.step import StepContext
from headrace.memory import BLOCKS_MIN, Room, plan_memory
from headrace.ops.decode_inputs import GatherDecodeInputs
from headrace.ops.paged_attention import AttentionBackend
from headrace.ops.sampling import SamplingBackend
from headrace.sampler import Drawn, Outputs, Sampler
from headrace.slots import SlotRows
from headrace.startup import Phases
from headrace.telemetry import Tracer, trace_contexts
from headrace.warm import CROWD, warm_plans
from headrace.wire import Mask, Plan, Result, decode, encode_result

log = logging.getLogger(__name__)

# Messages that may wait for the device: the plans in flight, their masks, and a Prepare. A router
# that sends more does not keep to its pipeline.
INBOX_MAX = 16


# How often the thread looks whether a step is done while it waits for the next plan.
POLL_S = 100e-6


class Model(Protocol):
    """The model, as the executor sees it."""

    def __call__(self, tokens_T: Tensor, step: StepContext) -> Tensor:
        """Returns logits_LV of the tokens that `step.sampled_S` names."""
        ...


class PartedModel(Protocol):
    """A model whose blocks and head are called apart."""

    def hidden(self, tokens_T: Tensor, step: StepContext) -> tuple[Tensor, Tensor]:
        """Returns what the last block adds to the residual stream, and the stream until then."""
        ...

    def logits(
        self,
        x_TD: Tensor,
        residual_TD: Tensor,
        sampled_S: Tensor | None,
        out_SV: Tensor | None = None,
    ) -> Tensor:
        """Returns the logits of the tokens `sampled_S`, given what `hidden` returned."""
        ...


@dataclass(frozen=True)
class GraphInputs:
    """What graphs are made of: how they find a decode step's inputs, and the model's parts.

    Attributes:
        gather: from slots and positions to everything else.
        cos_sin_LE: the angles of all positions.
    """

    gather: GatherDecodeInputs
    cos_sin_LE: Tensor
    model: PartedModel


@dataclass(frozen=True)
class Engine:
    """Everything a plan is executed with, loaded."""

    device: Device
    comm: Comm
    model: Model
    attention: AttentionBackend
    sampling: SamplingBackend
    architecture: str
    vocab_size: int
    context_tokens_max: int
    layers: int
    kv_heads: int  # of this rank
    head_dim: int
    dtype: torch.dtype
    weight_bytes: int
    kv_bytes_max: int  # 0: the device's default
    logits_dtype: torch.dtype = torch.float32  # what the model returns
    graph_inputs: GraphInputs | None = None  # what the device's graphs need, where it has any
    phases: Phases = field(default_factory=Phases)  # where the seconds of the start go


@dataclass(frozen=True)
class Preparation:
    """What `Prepare` asks for; as in `PrepareRequest`."""

    first_step: int
    block_tokens: int
    slots_max: int
    state_slots_max: int
    step_tokens_max: int
    step_rows_max: int
    kv_dtype: str = ""
    memory_fraction: float = 0.0
    blocks_max: int = 0

    @staticmethod
    def of(request: Any) -> Preparation:
        """Reads a `PrepareRequest`."""
        return Preparation(
            first_step=request.first_step,
            block_tokens=request.block_tokens,
            slots_max=request.slots_max,
            state_slots_max=request.state_slots_max,
            step_tokens_max=request.step_tokens_max,
            step_rows_max=request.step_rows_max or request.slots_max,
            kv_dtype=request.kv_dtype,
            memory_fraction=request.memory_fraction,
            blocks_max=request.blocks_max,
        )


@dataclass(frozen=True)
class Prepared:
    """What `Prepare` answers."""

    blocks: int
    memory: tuple[tuple[str, int], ...]


@dataclass
class _Running:
    """A step whose launches are made and whose result is not yet sent."""

    step: Step
    outputs: Outputs
    begin_ns: int
    timer: Timer


class Runner:
    """Executes plans, one after another. Not a thread: its caller owns the device."""

    def __init__(
        self, engine: Engine, wanted: Preparation, blocks: int, sizes: GraphSizes = NO_GRAPHS
    ) -> None:
        """Makes slots and a zeroed pool of `blocks` blocks.

        Args:
            sizes: what `capture` records graphs for.
        """
        self._engine = engine
        self._next_step = wanted.first_step
        width = -(-engine.context_tokens_max // wanted.block_tokens)
        self.slots = SlotRows(
            engine.device,
            slots=wanted.slots_max,
            state_slots=wanted.state_slots_max,
            table_width=width,
            blocks=blocks,
            vocab_size=engine.vocab_size,
        )
        self.pool = KvPool(kv_layout(engine, wanted), blocks, engine.device.torch_device)
        self._batcher = Batcher(
            engine.device,
            self.slots,
            self.pool,
            engine.attention,
            step_tokens_max=wanted.step_tokens_max,
            step_rows_max=wanted.step_rows_max,
            vocab_size=engine.vocab_size,
            sizes=sizes,
        )
        inbox = self._batcher.staging.inbox()
        self._graphs = self._pieces = None
        if sizes.rows:
            self._graphs = DecodeGraphs(engine, self.slots, self.pool, inbox, sizes.rows)
        if sizes.tokens:
            self._pieces = PieceGraphs(engine, self.pool, inbox, sizes.tokens)
        self._sampler = Sampler(engine.device, self.slots, engine.sampling, engine.comm)

    def capture(self) -> None:
        """Records the graphs; before the first step."""
        if self._graphs is not None:
            self._graphs.capture()
        if self._pieces is not None:
            self._pieces.capture()

    def stage(self, plan: Plan) -> Step:
        """Applies a plan to the slots and copies what it needs to the device."""
        if plan.step != self._next_step:
            raise PlanError(f"step {plan.step} came where step {self._next_step} was due")
        self._next_step += 1
        return self._batcher.build(plan)

    def forward(self, step: Step) -> Tensor:
        """The first launch: computes the wanted logits."""
        if step.inputs is None:
            assert self._graphs is not None, "a step was staged for a graph that does not exist"
            return self._graphs.forward(step)
        if step.padded and self._pieces is not None:
            return self._pieces.forward(step)
        tokens_T = step.inputs.tokens_T
        if not tokens_T.numel():  # A plan may do no more than release and bind.
            return tokens_T.new_zeros((0, self._engine.vocab_size), dtype=torch.float32)
        return self._engine.model(tokens_T, step.inputs.context)

    def sample(self, step: Step, logits_LV: Tensor) -> Outputs:
        """The second launch."""
        graphs = self._graphs if step.bucket else None
        if graphs is not None and not self._features(step):
            return graphs.greedy(step)
        return self._sampler.launch(step, logits_LV)

    def _features(self, step: Step) -> bool:
        """Whether some row takes more than its best token."""
        return bool(self.slots.features(step.slot_R, step.position_R).any())

    def result(self, step: Step, outputs: Outputs, device_time_us: int) -> Result:
        """Waits for a step's end."""
        drawn = outputs.wait()
        digest = _digest(step, drawn)
        if self._engine.comm.rank != 0:
            return _empty_result(step.plan.step, device_time_us, digest)
        return Result(
            step=step.plan.step,
            row_index=drawn.row_R,
            token_id=drawn.token_R,
            row_flags=drawn.flags_R,
            logprob=drawn.logprob_R,
            top_count=drawn.top_count_R,
            top_token_id=drawn.top_token,
            top_logprob=drawn.top_logprob,
            prompt_logprob=drawn.prompt_logprob,
            device_time_us=device_time_us,
            digest=digest,
        )

    def execute(self, plan: Plan) -> Result:
        """All of a step at once, for warming, replay and tests."""
        begin_ns = time.perf_counter_ns()
        step = self.stage(plan)
        outputs = self.sample(step, self.forward(step))
        outputs.download.wait()
        return self.result(step, outputs, _micros_since(begin_ns))


class Executor:
    """The thread. Everything it is given waits in one bounded queue, in order."""

    def __init__(
        self,
        load: Callable[[], Engine],
        tracer: Tracer,
        on_result: Callable[[bytes], None],
        on_error: Callable[[str], None],
    ) -> None:
        """
        Args:
            load: makes the engine; runs in the thread, which thereby owns the device.
            on_result: receives the bytes of each `StepResult`; called in the thread.
            on_error: receives one sentence when a step failed; nothing is executed after it until
                the next `prepare`.
        """
        self._load = load
        self._tracer = tracer
        self._on_result = on_result
        self._on_error = on_error
        self._inbox: queue.Queue[Callable[[], None] | bytes | None] = queue.Queue(INBOX_MAX)
        self._loaded: Future[Engine] = Future()
        self._engine: Engine | None = None
        self._runner: Runner | None = None
        self._running: _Running | None = None
        self._unsent: bytes | None = None
        self._thread = threading.Thread(target=self._run, name="executor", daemon=True)

    def start(self) -> Future[Engine]:
        """Starts the thread; the future holds the engine, or why it could not be loaded."""
        self._thread.start()
        return self._loaded

    def prepare(self, wanted: Preparation) -> Future[Prepared]:
        """Warms up, sizes and zeroes the pool, and starts counting steps anew."""
        done: Future[Prepared] = Future()

        def work() -> None:
            self._running = self._runner = None  # The old pool makes room for the new one.
            assert self._engine is not None, "prepared before it was loaded"
            try:
                self._runner, prepared = prepare_engine(self._engine, wanted)
                done.set_result(prepared)
            except Exception as error:
                done.set_exception(error)

        self._put(work)
        return done

    def submit(self, data: bytes) -> None:
        """Queues the bytes of a `ToShard`; raises `PlanError` when too many wait."""
        self._put(data)

    def stop(self) -> None:
        """Ends the thread after what is queued."""
        self._inbox.put(None)
        self._thread.join()

    def _put(self, item: Callable[[], None] | bytes) -> None:
        try:
            self._inbox.put_nowait(item)
        except queue.Full:
            raise PlanError(f"more than {INBOX_MAX} messages wait for the device") from None

    @torch.inference_mode()
    def _run(self) -> None:
        try:
            self._engine = self._load()
        except BaseException as error:
            self._loaded.set_exception(error)
            return
        self._loaded.set_result(self._engine)
        while True:
            item = self._take()
            if item is None:
                break
            if not isinstance(item, bytes):
                self._guard(self._reap)
                self._send()
                item()
            elif self._runner is not None:
                self._guard(lambda data=item: self._execute(data))

    def _take(self) -> Callable[[], None] | bytes | None:
        """The next item. While there is none, what runs is reaped and sent as soon as it is done:
        a plan that comes before that is launched behind it."""
        with contextlib.suppress(queue.Empty):
            return self._inbox.get_nowait()
        self._send()
        while self._running is not None:
            try:
                return self._inbox.get(timeout=POLL_S)
            except queue.Empty:
                if self._running.outputs.download.done():
                    self._guard(self._reap)
        self._send()
        return self._inbox.get()

    def _execute(self, data: bytes) -> None:
        message = decode(data)
        if isinstance(message, Mask):
            raise PlanError(f"step {message.step} got a mask, which no row waits for")
        assert self._runner is not None and self._engine is not None
        begin_ns = time.perf_counter_ns()
        timer = self._engine.device.timer()
        step = self._runner.stage(message)
        # Sending wakes the event loop, which would compete with staging for the interpreter; the
        # forward leaves the interpreter to it.
        self._send()
        logits_LV = self._runner.forward(step)
        self._reap()  # The device computes the forward meanwhile.
        self._send()
        outputs = self._runner.sample(step, logits_LV)
        timer.stop()
        self._running = _Running(step, outputs, begin_ns, timer)
        if not self._engine.device.asynchronous:
            self._reap()

    def _reap(self) -> None:
        """Waits for the step that runs, if one does; its result is then ready to be sent."""
        if self._running is None or self._runner is None:
            return
        running, self._running = self._running, None
        running.outputs.download.wait()
        micros = running.timer.micros()
        result = self._runner.result(running.step, running.outputs, micros)
        self._send()
        self._unsent = encode_result(result)
        if running.step.plan.trace_row.size:
            contexts = trace_contexts(running.step.plan)
            end_ns = running.begin_ns + 1000 * micros
            self._tracer.step(running.step.plan, contexts, running.begin_ns, end_ns)

    def _send(self) -> None:
        """Sends the result that is ready, if one is."""
        if self._unsent is not None:
            data, self._unsent = self._unsent, None
            self._on_result(data)

    def _guard(self, work: Callable[[], None]) -> None:
        """Runs a part of a step; a failure stops execution and is told in one sentence."""
        try:
            work()
        except HeadraceError as error:
            self._fail(str(error))
        except Exception as error:
            log.exception("a step failed")
            lines = str(error).strip().splitlines()
            self._fail(f"{type(error).__name__}: {lines[0] if lines else 'no message'}")

    def _fail(self, sentence: str) -> None:
        self._send()
        self._running = self._runner = None
        self._on_error(sentence)


def kv_layout(engine: Engine, wanted: Preparation) -> KvLayout:
    """The layout of the pool that a preparation asks for."""
    dtype = getattr(torch, wanted.kv_dtype) if wanted.kv_dtype else engine.dtype
    if dtype != engine.dtype:
        raise PlanError(f"the KV pool's dtype is the model's, {engine.dtype}, not {dtype}")
    return KvLayout(engine.layers, engine.kv_heads, engine.head_dim, wanted.block_tokens, dtype)


def graph_sizes(engine: Engine, wanted: Preparation) -> GraphSizes:
    """What to record graphs for; nothing where nothing can be recorded.

    Ranks of a group exchange sums by calls that no graph has been recorded with yet.
    """
    if not (engine.device.graphs and engine.attention.graphs and engine.graph_inputs):
        return NO_GRAPHS
    if engine.comm.size > 1:
        return NO_GRAPHS
    rows = buckets(min(wanted.step_rows_max, wanted.step_tokens_max))
    return GraphSizes(rows, token_buckets(wanted.step_tokens_max))


def prepare_engine(engine: Engine, wanted: Preparation) -> tuple[Runner, Prepared]:
    """Warms up with pools of their own, then sizes the real one by what is free (R9).

    What is allocated later is measured here: graphs first, which are then thrown away; then the
    largest step, whose activations stay with torch's allocator.
    """
    device, phases = engine.device, engine.phases
    sizes = graph_sizes(engine, wanted)
    with phases("graphs measured"):
        graph_bytes = _measure_graphs(engine, wanted, sizes)
    before = device.room()
    with phases("warm up"):
        _warm(engine, wanted)
    after = device.room()
    layout = kv_layout(engine, wanted)
    own = max(0, before.free - after.free)
    coming = {"graphs": graph_bytes, "reserve": device.reserve_bytes} if sizes else {}
    budget = device.kv_budget(wanted.memory_fraction, engine.kv_bytes_max, engine.comm.size)
    state_bytes = 4 * wanted.state_slots_max * engine.vocab_size
    plan = plan_memory(
        Room(after.total, after.free),
        {"weights": engine.weight_bytes, "activations": own},
        coming | {"penalty state": state_bytes},
        block_bytes=layout.bytes_per_block(),
        pool_bytes_max=budget,
        blocks_max=wanted.blocks_max,
    )
    blocks = engine.comm.min_int(plan.blocks)
    with phases("kv pool"):
        runner = Runner(engine, wanted, blocks, sizes)
    with phases("graphs"):
        runner.capture()
    for line in plan.table().splitlines():
        log.info("%s", line)
    log.info(
        "%d blocks of %d tokens; graphs for %d sizes of decode batches and %d of other steps",
        *(blocks, wanted.block_tokens, len(sizes.rows), len(sizes.tokens)),
    )
    return runner, Prepared(blocks, plan.items)


def _measure_graphs(engine: Engine, wanted: Preparation, sizes: GraphSizes) -> int:
    """Device bytes that these graphs will take, by the two largest of each kind."""
    if not sizes:
        return 0
    device = engine.device
    device.trim()
    wanted = replace(wanted, state_slots_max=0)
    total = 0
    for kind, all_of_kind in (("rows", sizes.rows), ("tokens", sizes.tokens)):
        runners: list[Runner] = []
        taken: list[int] = []
        for size in reversed(all_of_kind[-2:]):
            runners.append(Runner(engine, wanted, BLOCKS_MIN, GraphSizes(**{kind: (size,)})))
            free = device.room().free
            runners[-1].capture()
            taken.append(max(0, free - device.room().free))
        total += sum(taken[:1]) + sum(taken[1:]) * (len(all_of_kind) - 1)
        runners.clear()
        device.trim()
    return total


def _warm(engine: Engine, wanted: Preparation) -> None:
    """Executes made-up plans of the largest size, so that what is loaded lazily is loaded."""
    where = engine.device.torch_device
    engine.sampling.prepare(engine.vocab_size, engine.logits_dtype, where)
    crowd = CROWD if engine.device.asynchronous else 0
    plans, blocks = warm_plans(wanted, engine.context_tokens_max, crowd)
    runner = Runner(engine, wanted, blocks)
    for plan in plans:
        runner.execute(plan)


def _digest(step: Step, drawn: Drawn) -> int:
    """Of the plan's bytes, the slots' lengths and the NaN flags: equal on every rank."""
    own = zlib.crc32(drawn.flags_R.tobytes(), zlib.crc32(step.length_S.tobytes()))
    return zlib.crc32(step.plan.data) | own << 32


def _empty_result(step: int, device_time_us: int, digest: int) -> Result:
    no_ints, no_floats = np.zeros(0, np.int32), np.zeros(0, np.float32)
    return Result(
        step, no_ints, no_ints, no_ints, no_floats, no_ints, no_ints, no_floats, no_floats,
        device_time_us, digest,
    )  # fmt: skip


def _micros_since(begin_ns: int) -> int:
    return (time.perf_counter_ns() - begin_ns) // 1000
