"""A small planner for tests: what the router does, without its care for speed."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from headrace.wire import Binding, Plan, Result, RowFlag, Sampling


@dataclass
class Sequence:
    """One request on its way."""

    prompt: list[int]
    tokens_max: int
    sampling: Sampling = field(default_factory=Sampling)
    tokens: list[int] = field(default_factory=list)  # drawn and committed
    flags: list[int] = field(default_factory=list)
    prompt_logprobs: bool = False
    results: list[tuple[float, list[tuple[int, float]]]] = field(default_factory=list)
    slot: int | None = None
    generation: int = 0
    state_slot: int = 0
    blocks: list[int] = field(default_factory=list)
    computed: int = 0
    ahead: int = 0  # drawn in plans that are in flight
    has_last: bool = False  # the slot knows the last token: it was drawn in this binding

    @property
    def known(self) -> list[int]:
        return self.prompt + self.tokens

    @property
    def is_done(self) -> bool:
        return len(self.tokens) >= self.tokens_max


@dataclass
class Planner:
    """Knobs that must not change a single token."""

    block_tokens: int = 4
    blocks: int = 512
    chunk: int = 1 << 20
    running_max: int = 8
    depth: int = 2
    share: bool = False
    preempt_every: int = 0
    from_slot: bool = True  # decode rows take the token from the device; else they bring it
    reverse: bool = False  # rows in another order

    def run(self, execute: Callable[[Plan], Result], sequences: list[Sequence]) -> list[Result]:
        """Executes everything; the drawn tokens are in the sequences."""
        self._free_blocks = deque(range(1, self.blocks))
        self._free_slots = deque(range(self.running_max * 2))
        self._shared: dict[tuple[int, ...], int] = {}
        self._pinned: set[int] = set()
        self._release: list[int] = []
        self._step = 0
        waiting = deque(sequences)
        running: list[Sequence] = []
        flying: deque[tuple[Plan, list[tuple[Sequence, int]]]] = deque()
        results: list[Result] = []
        preempted = 0
        while waiting or running or flying:
            while len(flying) < self.depth:
                due = self.preempt_every and self._step >= (preempted + 1) * self.preempt_every
                if due and len(running) > 1:
                    preempted += 1
                    waiting.appendleft(self._stop(running.pop()))
                planned = self._plan(waiting, running)
                if planned is None:
                    break
                flying.append(planned)
            plan, drawn = flying.popleft()
            result = execute(plan)
            results.append(result)
            self._commit(result, plan, drawn, running)
        return results

    def _plan(
        self, waiting: deque[Sequence], running: list[Sequence]
    ) -> tuple[Plan, list[tuple[Sequence, int]]] | None:
        columns: dict[str, list[int]] = {name: [] for name in _COLUMNS}
        bindings: list[Binding] = []
        drawn: list[tuple[Sequence, int]] = []
        while waiting and len(running) < self.running_max and not waiting[0].ahead:
            running.append(self._bind(waiting.popleft(), bindings, columns))
        budget = self.chunk
        for sequence in reversed(running) if self.reverse else running:
            budget -= self._row(sequence, budget, columns, drawn)
        if not columns["row_slot_S"] and not bindings:
            return None
        columns["release_slot"], self._release = self._release, []
        plan = Plan(
            step=self._step,
            data=b"",
            bindings=bindings,
            trace_context=b"",
            **{name: np.array(column, np.int32) for name, column in columns.items()},
        )
        self._step += 1
        return plan, drawn

    def _bind(
        self, sequence: Sequence, bindings: list[Binding], columns: dict[str, list[int]]
    ) -> Sequence:
        slot = self._free_slots.popleft()
        sequence.slot, sequence.generation = slot, sequence.generation + 1
        sequence.state_slot = slot
        history = sequence.known if sequence.sampling.needs_history() else []
        bindings.append(
            Binding(
                slot,
                sequence.generation,
                sequence.sampling,
                np.array(history, np.int32),
                len(sequence.prompt),
                slot,
            )
        )
        sequence.blocks, sequence.computed, sequence.has_last = [], 0, False
        if self.share and not sequence.prompt_logprobs:
            sequence.blocks = self._match(sequence.known)
            sequence.computed = len(sequence.blocks) * self.block_tokens
        self._append(sequence, 0, sequence.blocks, columns)
        return sequence

    def _match(self, known: list[int]) -> list[int]:
        found: list[int] = []
        for end in range(self.block_tokens, len(known), self.block_tokens):
            block = self._shared.get(tuple(known[:end]))
            if block is None:
                break
            found.append(block)
        return found

    def _row(
        self,
        sequence: Sequence,
        budget: int,
        columns: dict[str, list[int]],
        drawn: list[tuple[Sequence, int]],
    ) -> int:
        known = sequence.known
        if len(sequence.tokens) + sequence.ahead >= sequence.tokens_max or budget < 1:
            return 0
        is_decode = sequence.ahead > 0 or sequence.computed == len(known) - 1
        flags = 0
        if is_decode:
            length = 1
            if sequence.ahead > 0 or (self.from_slot and sequence.has_last):
                flags |= RowFlag.FROM_SLOT
        else:
            length = min(budget, len(known) - sequence.computed)
        start, end = sequence.computed, sequence.computed + length
        ids = [] if flags & RowFlag.FROM_SLOT else known[start:end]
        if end >= len(known) + sequence.ahead:
            flags |= RowFlag.SAMPLE
            drawn.append((sequence, sequence.generation))
        if sequence.prompt_logprobs and end <= len(sequence.prompt):
            flags |= RowFlag.PROMPT_LOGPROBS
        missing = -(-end // self.block_tokens) - len(sequence.blocks)
        fresh = [self._free_blocks.popleft() for _ in range(missing)]
        self._append(sequence, len(sequence.blocks), fresh, columns)
        sequence.blocks += fresh
        sequence.computed = end
        if flags & RowFlag.SAMPLE:
            sequence.ahead += 1
            sequence.has_last = True
        self._adopt(sequence)
        columns["row_slot_S"].append(sequence.slot or 0)
        columns["row_start_S"].append(start)
        columns["row_len_S"].append(length)
        columns["row_flags_S"].append(int(flags))
        columns["token_id"] += ids
        return length

    def _adopt(self, sequence: Sequence) -> None:
        if not self.share:
            return
        for i, block in enumerate(sequence.blocks):
            end = (i + 1) * self.block_tokens
            if end <= min(sequence.computed, len(sequence.prompt)):
                self._shared.setdefault(tuple(sequence.prompt[:end]), block)
                self._pinned.add(block)

    def _append(
        self, sequence: Sequence, at: int, blocks: list[int], columns: dict[str, list[int]]
    ) -> None:
        if blocks:
            columns["append_slot"].append(sequence.slot or 0)
            columns["append_at"].append(at)
            columns["append_len"].append(len(blocks))
            columns["append_block"] += blocks

    def _commit(
        self,
        result: Result,
        plan: Plan,
        drawn: list[tuple[Sequence, int]],
        running: list[Sequence],
    ) -> None:
        assert result.step == plan.step
        tops = np.cumsum(result.top_count) - result.top_count
        for i, (sequence, generation) in enumerate(drawn):
            sequence.ahead -= 1
            if generation != sequence.generation or sequence.slot is None or sequence.is_done:
                continue
            sequence.tokens.append(int(result.token_id[i]))
            sequence.flags.append(int(result.row_flags[i]))
            count = int(result.top_count[i])
            pairs = slice(int(tops[i]), int(tops[i]) + count)
            top = zip(result.top_token_id[pairs], result.top_logprob[pairs], strict=True)
            sequence.results.append(
                (float(result.logprob[i]), [(int(t), float(p)) for t, p in top])
            )
        for sequence in [s for s in running if s.is_done]:
            running.remove(sequence)
            self._stop(sequence)

    def _stop(self, sequence: Sequence) -> Sequence:
        """Takes slot and blocks away; its tokens stay."""
        assert sequence.slot is not None
        self._release.append(sequence.slot)
        self._free_slots.append(sequence.slot)
        self._free_blocks.extend(b for b in sequence.blocks if b not in self._pinned)
        sequence.slot = None
        return sequence


_COLUMNS = (
    "release_slot zero_block append_slot append_at append_len append_block "
    "row_slot_S row_start_S row_len_S row_flags_S token_id trace_row"
).split()
