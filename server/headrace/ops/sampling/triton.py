"""Sampling in Triton: as `reference.py` says, without the host ever waiting for the device."""

# S sampled rows · V vocabulary · C pieces of a row · Z slots

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from headrace.ops.sampling.base import SampleRows, Samples, SamplingBackend
from headrace.ops.sampling.scan import CHUNK, PIECE, best_kernel, scan_kernel
from headrace.ops.triton import Gpu

# Pieces that are enough to keep a device busy when each is a program of its own.
PIECES_ALONE = 2048


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
        return Settings(group=1 if pieces <= PIECES_ALONE else 4, warps=4)


@dataclass(frozen=True)
class Scan:
    """What one pass over some rows' logits leaves; see `scan_kernel`."""

    best_SC: Tensor
    mass_SC: Tensor
    where_SC: Tensor

    @property
    def pieces(self) -> int:
        """C."""
        return self.best_SC.shape[1]


class TritonSampling:
    """The sampler of CUDA devices."""

    takes_half = True

    def __init__(self, gpu: Gpu, others: SamplingBackend, piece: int = PIECE) -> None:
        """
        Args:
            others: draws the rows of steps that want more than the best tokens.
            piece: tokens of a piece, a power of two; smaller where kernels are interpreted.
        """
        self._gpu = gpu
        self._others = others
        self._piece = piece

    def sample(self, logits_SV: Tensor, rows: SampleRows) -> Samples:
        if rows.features_S.any():
            return self._others.sample(logits_SV.float(), rows)
        return self.greedy(logits_SV)

    def greedy(self, logits_SV: Tensor) -> Samples:
        """The best token of each row, and its log-probability: two launches, which can be captured.

        Args:
            logits_SV: of a dtype with 16 or 32 bits; rows may lie further apart than V.
        """
        samples = empty_samples(logits_SV)
        self._best(logits_SV, samples, None)
        return samples

    def greedy_accept(
        self, logits_SV: Tensor, slot_S: Tensor, last_token_Z: Tensor, out: Samples
    ) -> None:
        """Like `greedy`, into given tensors; makes the tokens their slots' last ones as well.

        Args:
            slot_S: int64.
            last_token_Z: int64.
        """
        self._best(logits_SV, out, (slot_S, last_token_Z))

    def bad_rows(self, logits_SV: Tensor) -> Tensor:
        return self.greedy(logits_SV).bad_S

    def _best(self, logits_SV: Tensor, out: Samples, accept: tuple[Tensor, Tensor] | None) -> None:
        rows, vocab = logits_SV.shape
        scan = self.scan(logits_SV)
        slot_S, last_token_Z = accept or (out.token_S, out.token_S)
        self._gpu.run(
            best_kernel,
            (rows,),
            scan.best_SC,
            scan.mass_SC,
            scan.where_SC,
            scan.where_SC,
            slot_S,
            last_token_Z,
            out.token_S,
            out.logprob_S,
            out.bad_S,
            scan.best_SC,
            vocab,
            scan.pieces,
            PIECES=triton.next_power_of_2(scan.pieces),
            CHOSEN=False,
            ACCEPT=accept is not None,
            FRAME=False,
            warps=1,
        )

    def scan(self, logits_SV: Tensor, settings: Settings | None = None) -> Scan:
        """One pass over the logits."""
        rows, vocab = logits_SV.shape
        assert logits_SV.stride(1) == 1
        pieces = triton.cdiv(vocab, self._piece)
        settings = settings or Settings.best(rows * pieces)
        best_SC = torch.empty((rows, pieces), dtype=torch.float32, device=logits_SV.device)
        made = Scan(
            best_SC, torch.empty_like(best_SC), torch.empty_like(best_SC, dtype=torch.int32)
        )
        self._gpu.run(
            scan_kernel,
            (triton.cdiv(pieces, settings.group), rows),
            logits_SV,
            logits_SV.stride(0),
            vocab,
            made.where_SC,
            made.best_SC,
            made.best_SC,
            made.mass_SC,
            made.where_SC,
            made.best_SC,
            pieces,
            GROUP=settings.group,
            PIECE=self._piece,
            CHUNK=CHUNK,
            CHOSEN=False,
            TEMPERED=False,
            MAXIMA=False,
            warps=settings.warps,
        )
        return made


def empty_samples(logits_SV: Tensor) -> Samples:
    """Room for what is drawn from some rows."""
    rows, where = logits_SV.shape[0], logits_SV.device
    return Samples(
        torch.empty(rows, dtype=torch.int64, device=where),
        torch.empty(rows, dtype=torch.float32, device=where),
        torch.empty(rows, dtype=torch.bool, device=where),
    )
