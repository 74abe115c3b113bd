"""Plans executed one after another, by whoever owns the device."""

from __future__ import annotations

import time
import zlib

import numpy as np
import torch
from torch import Tensor

from headrace.batch import NO_GRAPHS, Batcher, GraphSizes, Step
from headrace.engine import Engine, Preparation, kv_layout
from headrace.errors import PlanError
from headrace.graphs import DecodeGraphs, PieceGraphs
from headrace.kv import KvPool
from headrace.sampler import Drawn, Outputs, Sampler
from headrace.slots import SlotRows
from headrace.wire import Mask, Plan, Result, ResultFlag


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
        self._sampler = Sampler(engine, self.slots, wanted.step_rows_max)

    def capture(self) -> None:
        """Records the graphs; before the first step."""
        if self._graphs is not None:
            self._graphs.capture()
        if self._pieces is not None:
            self._pieces.capture()

    @property
    def next_step(self) -> int:
        """The step that is due."""
        return self._next_step

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
            columns = self._engine.vocab_columns or self._engine.vocab_size
            return tokens_T.new_zeros((0, columns), dtype=torch.float32)
        return self._engine.model(tokens_T, step.inputs.context)

    def sample(self, step: Step, logits_LC: Tensor, mask: Mask | None = None) -> Outputs:
        """The second launch.

        Args:
            mask: what constrained rows may draw, on rank 0; those without draw anything (R7).
        """
        graphs = self._graphs if step.bucket else None
        # The graph is of rows that take their best token of all.
        if graphs is not None and not self._sampler.features(step).any():
            return graphs.greedy(step)
        return self._sampler.launch(step, logits_LC, mask)

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
            prompt_best_token=drawn.prompt_best_token,
            prompt_best_logprob=drawn.prompt_best_logprob,
            device_time_us=device_time_us,
            digest=digest,
        )

    def execute(self, plan: Plan, mask: Mask | None = None) -> Result:
        """All of a step at once, for warming, replay and tests."""
        begin_ns = time.perf_counter_ns()
        step = self.stage(plan)
        outputs = self.sample(step, self.forward(step), mask)
        outputs.download.wait()
        return self.result(step, outputs, (time.perf_counter_ns() - begin_ns) // 1000)


def _digest(step: Step, drawn: Drawn) -> int:
    """Of the plan's bytes, the slots' lengths and the NaN flags: equal on every rank."""
    bad_R = drawn.flags_R & int(ResultFlag.NAN)  # Only rank 0 knows of masks.
    own = zlib.crc32(bad_R.tobytes(), zlib.crc32(step.length_S.tobytes()))
    return zlib.crc32(step.plan.data) | own << 32


def _empty_result(step: int, device_time_us: int, digest: int) -> Result:
    no_ints, no_floats = np.zeros(0, np.int32), np.zeros(0, np.float32)
    return Result(
        step, no_ints, no_ints, no_ints, no_floats, no_ints, no_ints, no_floats,
        no_floats, no_ints, no_floats,  # of prompts
        device_time_us, digest,
    )  # fmt: skip
