"""Sampling in Triton: as `reference.py` says, without the host ever waiting for the device.

Features are known on the host, so it decides which kernels a step launches, and for which rows;
what they find there stays on the device.

Where tokens could differ from the reference's: what a token weighs is a float32, so a draw within
about 1e-6 of the boundary between two tokens may fall on either side, and a nucleus that ends
within 1e-6 of top-p may hold one token more or less. A row whose every token is banned is bad.
"""

# S sampled rows · V vocabulary · C pieces of a row · X chunks · Z slots
# R rows of a launch · K alternatives

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton
from torch import Tensor

from headrace.ops.sampling.base import (
    Alternatives,
    Feature,
    Knobs,
    Masks,
    SampleRows,
    Samples,
    empty_samples,
)
from headrace.ops.sampling.draw import (
    draw_filtered_kernel,
    draw_whole_kernel,
    edit_kernel,
    mask_kernel,
)
from headrace.ops.sampling.groups import EDITS, Groups
from headrace.ops.sampling.lists import CANDIDATES, LIST, alternatives_kernel
from headrace.ops.sampling.scan import CHUNK, PIECE, best_kernel, raw_kernel, scan_kernel
from headrace.ops.triton import Gpu

# Up to so many pieces, that many of them are a program's; the last for any number beyond.
GROUPS = ((512, 1), (4096, 4))
GROUP_MAX = 8

# Alternatives that are told because they tie with the last one wanted; more are left out.
TIES_MAX = 32

# Rows whose indices are kept on the device from the first step on; more make them anew.
ROWS_KEPT = 512

# Low bits of `key_of` that are zero for every logit of a dtype.
ZERO_BITS = {torch.bfloat16: 16, torch.float16: 13, torch.float32: 0}


@dataclass(frozen=True)
class Settings:
    """How the scan is divided; results do not depend on it."""

    group: int  # pieces of a program
    warps: int

    @staticmethod
    def best(pieces: int) -> Settings:
        """
        Args:
            pieces: of all rows.
        """
        group = next((group for most, group in GROUPS if pieces <= most), GROUP_MAX)
        return Settings(group, warps=4)


@dataclass(frozen=True)
class Sizes:
    """Powers of two that kernels are compiled for; smaller where they are interpreted."""

    piece: int = PIECE
    listed: int = LIST
    candidates: int = CANDIDATES


@dataclass(frozen=True)
class Scan:
    """Some rows' logits, and what one pass over them leaves; see `scan_kernel`."""

    x_SV: Tensor
    best_SC: Tensor
    mass_SC: Tensor
    where_SC: Tensor
    maxima_SX: Tensor | None

    @property
    def pieces(self) -> int:
        """C."""
        return self.best_SC.shape[1]


@dataclass(frozen=True)
class Drawn:
    """What a step's kernels fill, a row each."""

    samples: Samples
    frame_SF: Tensor  # see `store_frame`

    @property
    def outputs(self) -> tuple[Tensor, ...]:
        """In the order in which kernels take them."""
        made = self.samples
        return made.token_S, made.logprob_S, made.bad_S, self.frame_SF


class TritonSampling:
    """The sampler of CUDA devices."""

    takes_half = True

    def __init__(
        self, gpu: Gpu, to_device: Callable[[np.ndarray], Tensor], sizes: Sizes | None = None
    ) -> None:
        """
        Args:
            to_device: starts a copy of an array to the device, and does not wait for it.
        """
        self._gpu = gpu
        self._to_device = to_device
        self._sizes = sizes or Sizes()
        self._every_S: Tensor | None = None

    @property
    def piece(self) -> int:
        """Tokens of a piece of `scan`."""
        return self._sizes.piece

    def greedy(self, logits_SV: Tensor) -> Samples:
        """The best token of each row, and its log-probability: two launches, which can be captured.

        Args:
            logits_SV: of a dtype with 16 or 32 bits; rows may lie further apart than V.
        """
        samples = empty_samples(logits_SV)
        self._best(self.scan(logits_SV), samples)
        return samples

    def greedy_accept(
        self, logits_SV: Tensor, slot_S: Tensor, last_token_Z: Tensor, out: Samples
    ) -> None:
        """Like `greedy`, into given tensors; makes the tokens their slots' last ones as well.

        Args:
            slot_S: int64.
            last_token_Z: int64.
        """
        self._best(self.scan(logits_SV), out, (slot_S, last_token_Z))

    def bad_rows(self, logits_SV: Tensor) -> Tensor:
        return self.greedy(logits_SV).bad_S

    def sample(self, logits_SV: Tensor, rows: SampleRows) -> Samples:
        if not rows.features_S.any():
            return self.greedy(logits_SV)
        groups = Groups(rows)
        groups.send(self._to_device, self._every(logits_SV))
        x_SV = self._edit(logits_SV, rows, groups)
        temperature_S = None
        if groups.features & Feature.SAMPLED:
            assert rows.knobs is not None
            temperature_S = rows.knobs.temperature_S
        lists = groups.sorted_R.size + groups.top_R.size > 0
        scan = self.scan(x_SV, temperature_S=temperature_S, maxima=lists)
        drawn = _empty_drawn(logits_SV)
        if groups.best_R.size:
            self._best(scan, drawn.samples, chosen=(groups["best"], groups.best_R.size, drawn))
        if groups.whole_R.size:
            self._draw_whole(scan, rows, groups, drawn)
        if groups.sorted_R.size:
            self._draw_filtered(scan, rows, groups, drawn)
        alternatives: list[Alternatives] = []
        if groups.top_R.size:
            columns = groups["top"], groups["top_n"]
            alternatives.append(
                self._alternatives(scan, drawn, groups.top_R, groups.top_n_R, columns)
            )
        if groups.raw_R.size:
            alternatives += self._raw(logits_SV, groups, drawn)
        made = drawn.samples
        return Samples(made.token_S, made.logprob_S, made.bad_S, tuple(alternatives))

    def prepare(self, vocab: int, dtype: torch.dtype, where: torch.device, stride: int = 0) -> None:
        """Compiles every kernel that logits of this dtype can ask for, by made-up steps.

        Logits come as the model leaves them and, of chosen rows, gathered: what the distance of
        their rows is a multiple of decides how kernels are compiled.
        """
        for distance in sorted({vocab, stride or vocab}):
            logits_SV = torch.zeros((1, distance), dtype=dtype, device=where)[:, :vocab]
            self._prepare(logits_SV)

    def _prepare(self, logits_SV: Tensor) -> None:
        vocab, where = logits_SV.shape[1], logits_SV.device
        draws = Feature.SAMPLED, Feature.SAMPLED | Feature.FILTERED
        wants = Feature(0), Feature.TOP_N, Feature.LOGPROB_RAW, Feature.LOGPROB_RAW | Feature.TOP_N
        mark, penalty = Feature.WATERMARK, Feature.PENALTY
        edits = Feature(0), Feature.BIAS, penalty, mark, mark | penalty, Feature.MASKED
        for draw in (Feature(0), *draws):
            for want in wants:
                for edit in edits:
                    self.sample(logits_SV, _made_up(draw | want | edit, vocab, where))
        slot_S, last_token_Z = (torch.zeros(2, dtype=torch.int64, device=where) for _ in range(2))
        self.greedy_accept(logits_SV, slot_S, last_token_Z, empty_samples(logits_SV))

    def scan(
        self,
        x_SV: Tensor,
        settings: Settings | None = None,
        temperature_S: Tensor | None = None,
        maxima: bool = False,
        chosen: tuple[Tensor, int] | None = None,
    ) -> Scan:
        """One pass over logits.

        Args:
            temperature_S: float32; without it all are 1.
            maxima: whether to leave the maxima of chunks, too.
            chosen: the rows to look at and their number; without it all.
        """
        rows, vocab = x_SV.shape
        assert x_SV.stride(1) == 1
        row_R, count = chosen or (x_SV, rows)
        pieces = triton.cdiv(vocab, self._sizes.piece)
        settings = settings or Settings.best(count * pieces)
        best_SC = torch.empty((rows, pieces), dtype=torch.float32, device=x_SV.device)
        width = pieces * (self._sizes.piece // CHUNK)
        scan = Scan(
            x_SV,
            best_SC,
            torch.empty_like(best_SC),
            torch.empty_like(best_SC, dtype=torch.int32),
            best_SC.new_empty((rows, width)) if maxima else None,
        )
        self._gpu.run(
            scan_kernel,
            (triton.cdiv(pieces, settings.group), count),
            *_logits(x_SV),
            row_R,
            best_SC if temperature_S is None else temperature_S,
            0 if temperature_S is None else temperature_S.stride(0),
            best_SC,
            scan.mass_SC,
            scan.where_SC,
            best_SC if scan.maxima_SX is None else scan.maxima_SX,
            pieces,
            settings.group,
            PIECE=self._sizes.piece,
            CHUNK=CHUNK,
            CHOSEN=chosen is not None,
            TEMPERED=temperature_S is not None,
            MAXIMA=maxima,
            warps=settings.warps,
        )
        return scan

    def _best(
        self,
        scan: Scan,
        out: Samples,
        accept: tuple[Tensor, Tensor] | None = None,
        chosen: tuple[Tensor, int, Drawn] | None = None,
    ) -> None:
        rows, vocab = scan.x_SV.shape
        slot_S, last_token_Z = accept or (scan.where_SC, scan.where_SC)
        row_R, count = (scan.where_SC, rows) if chosen is None else chosen[:2]
        self._gpu.run(
            best_kernel,
            (count,),
            scan.best_SC,
            scan.mass_SC,
            scan.where_SC,
            row_R,
            slot_S,
            last_token_Z,
            out.token_S,
            out.logprob_S,
            out.bad_S,
            scan.best_SC if chosen is None else chosen[2].frame_SF,
            vocab,
            scan.pieces,
            PIECES=triton.next_power_of_2(scan.pieces),
            CHOSEN=chosen is not None,
            ACCEPT=accept is not None,
            warps=1,
        )

    def _edit(self, logits_SV: Tensor, rows: SampleRows, groups: Groups) -> Tensor:
        """The logits with all edits, a copy in float32; themselves where there are none."""
        if not groups.features & EDITS:
            return logits_SV
        penalty = bool(groups.features & Feature.PENALTY)
        marked = bool(groups.features & Feature.WATERMARK)
        features_S = groups["features"]
        state: list[Any] = [features_S] * 5 + [0]  # unused
        if penalty:
            assert rows.knobs is not None and rows.state_QV is not None
            knobs = rows.knobs
            state = [rows.state_QV, rows.state_slot_S]
            state += _columns(knobs.repetition_S, knobs.frequency_S, knobs.presence_S)
        previous_S = features_S  # unused
        if marked:
            assert rows.previous_S is not None
            previous_S = rows.previous_S
        x_SV = torch.empty(logits_SV.shape, dtype=torch.float32, device=logits_SV.device)
        count, vocab = logits_SV.shape
        self._gpu.run(
            edit_kernel,
            (triton.cdiv(vocab, self._sizes.piece), count),
            logits_SV,
            logits_SV.stride(0),
            x_SV,
            vocab,
            features_S,
            *state,
            previous_S,
            rows.watermark.threshold,
            rows.watermark.delta,
            BLOCK=self._sizes.piece,
            PENALTY=penalty,
            WATERMARK=marked,
            warps=4,
        )
        for edit in (rows.bias, rows.banned):
            if edit is not None:
                x_SV.index_put_((edit.row, edit.token), edit.value, accumulate=True)
        if rows.masks is not None and groups.features & Feature.MASKED:
            self._gpu.run(
                mask_kernel,
                (triton.cdiv(vocab, self._sizes.piece), rows.masks.row_M.shape[0]),
                x_SV,
                vocab,
                rows.masks.row_M,
                rows.masks.bits_MW,
                rows.masks.bits_MW.shape[1],
                BLOCK=self._sizes.piece,
                warps=4,
            )
        return x_SV

    def _draw_whole(self, scan: Scan, rows: SampleRows, groups: Groups, drawn: Drawn) -> None:
        assert rows.knobs is not None
        self._gpu.run(
            draw_whole_kernel,
            (groups.whole_R.size,),
            *_logits(scan.x_SV),
            scan.best_SC,
            scan.mass_SC,
            groups["whole"],
            *_columns(rows.knobs.temperature_S, rows.knobs.min_p_S),
            rows.uniform_S,
            *drawn.outputs,
            scan.pieces,
            PIECES=triton.next_power_of_2(scan.pieces),
            PIECE=self._sizes.piece,
            warps=8,
        )

    def _draw_filtered(self, scan: Scan, rows: SampleRows, groups: Groups, drawn: Drawn) -> None:
        assert rows.knobs is not None and scan.maxima_SX is not None
        knobs, count = rows.knobs, groups.sorted_R.size
        self._gpu.run(
            draw_filtered_kernel,
            (count,),
            *_logits(scan.x_SV),
            scan.best_SC,
            scan.mass_SC,
            scan.maxima_SX,
            scan.maxima_SX.stride(0),
            groups["sorted"],
            self._room(scan, count),
            knobs.top_k_S,
            *_columns(knobs.temperature_S, knobs.top_p_S, knobs.typical_p_S, knobs.min_p_S),
            rows.uniform_S,
            *drawn.outputs,
            scan.pieces,
            PIECES=triton.next_power_of_2(scan.pieces),
            CANDIDATES=self._sizes.candidates,
            **self._list_sizes(scan),
            warps=16,
            maxnreg=64,  # two programs a multiprocessor: their searches mostly wait
        )

    def _every(self, logits_SV: Tensor) -> Tensor:
        """The indices of all rows, kept from step to step."""
        rows = logits_SV.shape[0]
        if self._every_S is None or self._every_S.shape[0] < rows:
            self._every_S = torch.arange(max(rows, ROWS_KEPT), device=logits_SV.device)
        return self._every_S

    def _room(self, scan: Scan, rows: int) -> Tensor:
        """For two lists a row."""
        size = 2 * rows * self._sizes.listed
        return torch.empty(size, dtype=torch.int32, device=scan.x_SV.device)

    def _list_sizes(self, scan: Scan) -> dict[str, int]:
        """What kernels that list a row's best tokens are compiled for."""
        return {
            "CHUNK": CHUNK,
            "CHUNKS": triton.next_power_of_2(triton.cdiv(scan.x_SV.shape[1], CHUNK)),
            "LIST": self._sizes.listed,
            "SHIFT": ZERO_BITS[scan.x_SV.dtype],
        }

    def _raw(self, logits_SV: Tensor, groups: Groups, drawn: Drawn) -> list[Alternatives]:
        """Tells log-probabilities by the logits as they were given, to rows that want that."""
        count, lists = groups.raw_R.size, groups.raw_top_R.size > 0
        scan = self.scan(logits_SV, maxima=lists, chosen=(groups["raw"], count))
        self._gpu.run(
            raw_kernel,
            (count,),
            logits_SV,
            logits_SV.stride(0),
            scan.best_SC,
            scan.mass_SC,
            groups["raw"],
            drawn.samples.token_S,
            drawn.samples.logprob_S,
            drawn.frame_SF,
            scan.pieces,
            PIECES=triton.next_power_of_2(scan.pieces),
            warps=1,
        )
        if not lists:
            return []
        columns = groups["raw_top"], groups["raw_top_n"]
        return [self._alternatives(scan, drawn, groups.raw_top_R, groups.raw_top_n_R, columns)]

    def _alternatives(
        self,
        scan: Scan,
        drawn: Drawn,
        row_R: np.ndarray,
        top_n_R: np.ndarray,
        columns: tuple[Tensor, Tensor],
    ) -> Alternatives:
        """The alternatives of some rows.

        Args:
            columns: on the device, the rows, and how many each wants.
        """
        assert scan.maxima_SX is not None
        width = min(int(top_n_R.max()) + TIES_MAX, scan.x_SV.shape[1])
        token_RK = torch.zeros((row_R.size, width), dtype=torch.int64, device=scan.x_SV.device)
        logprob_RK = torch.zeros_like(token_RK, dtype=torch.float32)
        count_R = token_RK.new_empty(row_R.size)
        self._gpu.run(
            alternatives_kernel,
            (row_R.size,),
            *_logits(scan.x_SV),
            scan.maxima_SX,
            scan.maxima_SX.stride(0),
            *columns,
            self._room(scan, row_R.size),
            drawn.frame_SF,
            count_R,
            token_RK,
            logprob_RK,
            width,
            **self._list_sizes(scan),
            warps=8,
        )
        return Alternatives(row_R, count_R, token_RK, logprob_RK)


def _empty_drawn(logits_SV: Tensor) -> Drawn:
    samples = empty_samples(logits_SV)
    frame_SF = torch.empty((logits_SV.shape[0], 6), dtype=torch.float64, device=logits_SV.device)
    return Drawn(samples, frame_SF)


def _made_up(features: Feature, vocab: int, where: torch.device) -> SampleRows:
    """A row with some features, and with everything else that any feature reads."""
    # Seven knobs a row, as slots keep them; 0.5 is within the range of each.
    knobs_SC = torch.full((1, 7), 0.5, device=where)
    column = knobs_SC.unbind(1)
    return SampleRows(
        features_S=np.array([int(features)]),
        top_n_S=np.array([1]),
        knobs=Knobs(
            temperature_S=column[0],
            top_k_S=torch.ones(1, dtype=torch.int64, device=where),
            top_p_S=column[1],
            typical_p_S=column[2],
            min_p_S=column[3],
            repetition_S=column[4],
            frequency_S=column[5],
            presence_S=column[6],
        ),
        uniform_S=torch.zeros(1, dtype=torch.float64, device=where),
        state_QV=torch.zeros((1, vocab), dtype=torch.int32, device=where),
        state_slot_S=torch.zeros(1, dtype=torch.int64, device=where),
        masks=Masks(
            torch.zeros(1, dtype=torch.int64, device=where),
            torch.full((1, -(-vocab // 32)), -1, dtype=torch.int32, device=where),
        ),
        previous_S=torch.zeros(1, dtype=torch.int64, device=where),
    )


def _logits(x_SV: Tensor) -> tuple[Tensor, int, int]:
    """The logits, the distance of their rows, and V, as kernels take them."""
    return x_SV, x_SV.stride(0), x_SV.shape[1]


def _columns(*knobs: Tensor) -> tuple[Any, ...]:
    """Columns of one table of knobs, and how far apart their rows are."""
    (stride,) = {column.stride(0) for column in knobs}
    return *knobs, stride
