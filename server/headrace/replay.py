"""Executes recorded plans again and compares the tokens: a bug report is a file."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

import numpy as np
import torch

from headrace.config import Serve
from headrace.engine import Engine, Preparation
from headrace.errors import ConfigError
from headrace.load import load_engine
from headrace.record import PREPARE, RESULT, TO_SHARD, read_records
from headrace.runner import Runner
from headrace.wire import Mask, Plan, Result, RowFlag, decode, decode_result, messages

# Differences that are told one by one; more are only counted.
DIFFERENCES_TOLD = 10


@dataclass
class Summary:
    """What came out of a replay."""

    steps: int = 0
    unanswered: int = 0  # plans whose results the record lacks
    tokens: int = 0
    tokens_differ: int = 0
    digests_differ: int = 0
    logprob_error: float = 0.0  # the largest, over equal tokens
    seconds: float = 0.0
    differences: list[str] = field(default_factory=list)

    def compare(self, plan: Plan, made: Result, recorded: Result) -> None:
        """Counts what differs between two results of a step."""
        self.digests_differ += made.digest != recorded.digest
        if not np.array_equal(made.row_index, recorded.row_index):
            self.tokens_differ += max(made.row_index.size, recorded.row_index.size)
            self._tell(f"step {plan.step}: other rows were sampled")
            return
        self.tokens += made.token_id.size
        equal = made.token_id == recorded.token_id
        self.tokens_differ += int((~equal).sum())
        for i in np.flatnonzero(~equal).tolist():
            row = int(made.row_index[i])
            position = int(plan.row_start_S[row] + plan.row_len_S[row])
            self._tell(
                f"step {plan.step}, row {row}, slot {plan.row_slot_S[row]}, position {position}: "
                f"token {made.token_id[i]}, recorded {recorded.token_id[i]}"
            )
        errors = np.abs(made.logprob - recorded.logprob)[equal]
        self.logprob_error = max(self.logprob_error, float(errors.max(initial=0.0)))

    def _tell(self, difference: str) -> None:
        if len(self.differences) < DIFFERENCES_TOLD:
            self.differences.append(difference)

    def write(self, out: TextIO) -> None:
        """Prints it for people."""
        rate = self.steps / self.seconds if self.seconds else 0.0
        print(f"steps      {self.steps} in {self.seconds:.2f} s ({rate:.0f} a second)", file=out)
        if self.unanswered:
            print(f"unanswered {self.unanswered} (not compared)", file=out)
        print(f"tokens     {self.tokens}, {self.tokens_differ} of them differ", file=out)
        print(f"digests    {self.digests_differ} differ", file=out)
        print(f"logprobs   {self.logprob_error:.2e} apart at most", file=out)
        for difference in self.differences:
            print(f"  {difference}", file=out)


def run_replay(serve: Serve, path: Path) -> int:
    """Replays a file on one shard; returns 0 if every token is as it was recorded."""
    with torch.inference_mode():
        summary = replay(load_engine(serve, 0), list(read_records(path)))
    summary.write(sys.stdout)
    return 0 if summary.tokens_differ == 0 else 1


def replay(engine: Engine, records: list[tuple[int, bytes]]) -> Summary:
    """Executes the plans of a record.

    After each step its slots go on with the recorded tokens, so that one difference is told once
    and does not hide what follows.
    """
    summary = Summary()
    runner: Runner | None = None
    recorded: dict[int, Result] = {}
    begin = time.perf_counter()
    for index, (kind, data) in enumerate(records):
        if kind == PREPARE:
            # Numbering starts anew: answers are looked for until the next one.
            recorded = _results_until_prepare(records[index + 1 :])
            runner = _prepare(engine, data)
        elif kind == TO_SHARD:
            if runner is None:
                raise ConfigError("the record has a plan before its first Prepare")
            plan = decode(data)
            if not isinstance(plan, Plan):
                continue  # Executed with its plan.
            made = runner.execute(plan, _mask_of(plan, records[index + 1 :]))
            summary.steps += 1
            answer = recorded.get(plan.step)
            if answer is None:
                summary.unanswered += 1
                continue
            summary.compare(plan, made, answer)
            _follow(engine, runner, plan, answer)
    summary.seconds = time.perf_counter() - begin
    return summary


def _results_until_prepare(records: list[tuple[int, bytes]]) -> dict[int, Result]:
    found: dict[int, Result] = {}
    for kind, data in records:
        if kind == PREPARE:
            break
        if kind == RESULT:
            result = decode_result(data)
            found[result.step] = result
    return found


def _mask_of(plan: Plan, records: list[tuple[int, bytes]]) -> Mask | None:
    """The masks of a plan, which come before the next plan if it has any."""
    if not (plan.row_flags_S & RowFlag.MASKED).any():
        return None
    sent = (decode(data) for kind, data in records if kind == TO_SHARD)
    message = next(sent, None)
    return message if isinstance(message, Mask) else None


def _prepare(engine: Engine, data: bytes) -> Runner:
    request = messages().PrepareRequest.FromString(data)
    if not request.blocks_max:
        raise ConfigError("the record's Prepare does not say how many blocks there were")
    return Runner(engine, Preparation.of(request), request.blocks_max)


def _follow(engine: Engine, runner: Runner, plan: Plan, recorded: Result) -> None:
    rows = np.flatnonzero(plan.row_flags_S & RowFlag.SAMPLE)
    if rows.size != recorded.token_id.size or not rows.size:
        return
    where = engine.device.torch_device
    slots = torch.from_numpy(plan.row_slot_S[rows].astype(np.int64)).to(where)
    runner.slots.accept(slots, torch.from_numpy(recorded.token_id.astype(np.int64)).to(where))
