"""The thread that owns the device: it loads the model, sizes the pool and executes plans in order.

A step is two launches, forward and sampler; between them constrained rows get their masks (R7).
Where launches return before their work is done, the forward of step k+1 is launched before the
result of step k is waited for, so that the device never waits for the host; where they do not, a
result is sent as soon as it is there.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

import torch

from headrace.batch import Step
from headrace.device import Timer
from headrace.engine import Engine, Preparation, Prepared
from headrace.errors import HeadraceError, PlanError
from headrace.ops.triton import warn_of_kernels
from headrace.prepare import prepare_engine
from headrace.runner import Runner
from headrace.sampler import Outputs
from headrace.telemetry import Tracer
from headrace.wire import Mask, decode, encode_result

log = logging.getLogger(__name__)

# Messages that may wait for the device: the plans in flight, their masks, and a Prepare. A router
# that sends more does not keep to its pipeline.
INBOX_MAX = 16


# How often the thread looks whether a step is done while it waits for the next plan.
POLL_S = 100e-6


@dataclass
class _Running:
    """A step whose launches are made and whose result is not yet sent."""

    step: Step
    outputs: Outputs
    begin_ns: int
    timer: Timer


class Executor:
    """The thread. Everything it is given waits in one bounded queue, in order."""

    def __init__(
        self,
        load: Callable[[], Engine],
        tracer: Tracer,
        on_result: Callable[[bytes], None],
        on_error: Callable[[str], None],
        mask_s: float = 0.02,
    ) -> None:
        """
        Args:
            load: makes the engine; runs in the thread, which thereby owns the device.
            on_result: receives the bytes of each `StepResult`; called in the thread.
            on_error: receives one sentence when a step failed; nothing is executed after it until
                the next `prepare`.
            mask_s: how long a step's sampler waits for masks once its forward is launched (R7).
        """
        self._mask_s = mask_s
        self._load = load
        self._tracer = tracer
        self._on_result = on_result
        self._on_error = on_error
        self._inbox: queue.Queue[Callable[[], None] | bytes | None] = queue.Queue(INBOX_MAX)
        # What was taken out of turn, while masks were waited for; one item at most.
        self._held: list[Callable[[], None] | bytes | None] = []
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
                warn_of_kernels()
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
        if self._held:
            return self._held.pop()
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
        assert self._runner is not None and self._engine is not None
        if isinstance(message, Mask):
            if message.step >= self._runner.next_step:
                raise PlanError(f"step {message.step} got masks before its plan")
            return  # They came too late, and were not waited for.
        begin_ns = time.perf_counter_ns()
        timer = self._engine.device.timer()
        step = self._runner.stage(message)
        # Sending wakes the event loop, which would compete with staging for the interpreter; the
        # forward leaves the interpreter to it.
        self._send()
        logits_LV = self._runner.forward(step)
        self._reap()  # The device computes the forward meanwhile.
        self._send()
        outputs = self._runner.sample(step, logits_LV, self._masks(step))
        timer.stop()
        self._running = _Running(step, outputs, begin_ns, timer)
        if not self._engine.device.asynchronous:
            self._reap()

    def _masks(self, step: Step) -> Mask | None:
        """Waits for a step's masks, on the rank that draws, while the device computes; None when
        they do not come in time, or the router goes on without them (R7)."""
        assert self._engine is not None
        if self._engine.comm.rank != 0 or not step.masked_R.any():
            return None
        give_up = time.monotonic() + self._mask_s
        while True:
            try:
                item = self._inbox.get(timeout=max(0.0, give_up - time.monotonic()))
            except queue.Empty:
                return None
            message = decode(item) if isinstance(item, bytes) else None
            if isinstance(message, Mask) and message.step <= step.plan.step:
                if message.step == step.plan.step:
                    return message
                continue  # Too late for its own step.
            self._held.append(item)
            return None

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
            end_ns = running.begin_ns + 1000 * micros
            self._tracer.step(running.step.plan, running.begin_ns, end_ns)

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
