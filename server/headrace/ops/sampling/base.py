"""What a sampling implementation takes and gives, and where its randomness comes from."""

# S sampled rows · V vocabulary · Q entries of the side pool of penalty state

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from enum import IntFlag
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from headrace.ops.sampling.watermark import Watermark

# An entry of the penalty state counts the generated tokens in its low bits; this bit says that
# the prompt holds the token.
IN_PROMPT = 1 << 30


# Of each byte, least bit first: 0 for a bit that is set, else -inf.
_BANNED_BY_BYTE = torch.tensor(
    [[0.0 if byte >> bit & 1 else -torch.inf for bit in range(8)] for byte in range(256)]
)


class Feature(IntFlag):
    """What a row's sampling needs, known on the host. No bit: the best token, and its logprob."""

    SAMPLED = 1  # temperature above 0
    FILTERED = 2  # top_k or top_p
    TYPICAL = 4
    MIN_P = 8
    PENALTY = 16
    BIAS = 32
    TOKENS_MIN = 64
    LOGPROB_RAW = 128
    TOP_N = 256
    MASKED = 512  # only some tokens may be drawn
    WATERMARK = 1024


@dataclass(frozen=True)
class Knobs:
    """Device columns, one entry a sampled row; float32 but for `top_k_S` (int64)."""

    temperature_S: Tensor
    top_k_S: Tensor  # 0 is off
    top_p_S: Tensor
    typical_p_S: Tensor
    min_p_S: Tensor
    repetition_S: Tensor
    frequency_S: Tensor
    presence_S: Tensor


@dataclass(frozen=True)
class Edits:
    """Single logits to change, flat."""

    row: Tensor  # int64, index in S
    token: Tensor  # int64
    value: Tensor  # float32, added; -inf bans


@dataclass(frozen=True)
class Masks:
    """The tokens that some rows may draw: bit j of word i is token 32 i + j."""

    row_M: Tensor  # int64, indices in S
    bits_MW: Tensor  # int32

    def banned(self, vocab: int) -> Tensor:
        """What is to be added to logits: 0 where a bit is set, else -inf; float32, [M, V]."""
        byte_X = self.bits_MW.contiguous().view(torch.uint8).flatten().int()
        # Eight tokens at a time: half the time of anything that looks at single bits.
        row_MV = _BANNED_BY_BYTE.to(byte_X.device).index_select(0, byte_X)
        return row_MV.view(self.bits_MW.shape[0], -1)[:, :vocab]


@dataclass(frozen=True)
class SampleRows:
    """How each row of a step's logits is to be drawn from.

    Only `features_S` is always there; the rest exists where a row's feature needs it.
    """

    features_S: np.ndarray  # int64, host: Feature bits
    top_n_S: np.ndarray | None = None  # int64, host
    knobs: Knobs | None = None
    uniform_S: Tensor | None = None  # float64, device: the row's draw
    state_QV: Tensor | None = None  # int32: counts of generated tokens, and IN_PROMPT
    state_slot_S: Tensor | None = None  # int64: which entry of the pool is the row's
    bias: Edits | None = None
    banned: Edits | None = None
    masks: Masks | None = None  # of the rows with MASKED, all of them
    previous_S: Tensor | None = None  # int64: the tokens that those to draw follow
    watermark: Watermark = field(default_factory=Watermark)


@dataclass(frozen=True)
class Alternatives:
    """The best tokens of some rows. Entries beyond a row's count mean nothing."""

    row_R: np.ndarray  # int64, host: indices in S
    count_R: Tensor
    token_RK: Tensor  # best first; equal ones by id
    logprob_RK: Tensor


@dataclass(frozen=True)
class Samples:
    """What was drawn. A bad row's token is some token and its logprob 0."""

    token_S: Tensor  # int64
    logprob_S: Tensor  # float32
    bad_S: Tensor  # bool: the row's logits hold a NaN or +inf, or nothing but -inf (R10)
    alternatives: tuple[Alternatives, ...] = ()


def empty_samples(logits_SV: Tensor) -> Samples:
    """Room for what is drawn from some rows."""
    rows, where = logits_SV.shape[0], logits_SV.device
    return Samples(
        torch.empty(rows, dtype=torch.int64, device=where),
        torch.empty(rows, dtype=torch.float32, device=where),
        torch.empty(rows, dtype=torch.bool, device=where),
    )


class SamplingBackend(Protocol):
    """Draws one token a row.

    Attributes:
        takes_half: logits may be of a 16-bit dtype; else they are float32.
    """

    takes_half: bool

    def sample(self, logits_SV: Tensor, rows: SampleRows) -> Samples:
        """Order: watermark, penalties, bias, bans, masks, temperature, top-k, top-p, typical-p,
        min-p, draw.

        Args:
            logits_SV: float32, or what `takes_half` allows; may be overwritten.
        """
        ...

    def greedy_accept(
        self, logits_SV: Tensor, slot_S: Tensor, last_token_Z: Tensor, out: Samples
    ) -> None:
        """Takes every row's best token; launches the same work whatever the logits hold.

        Args:
            slot_S: int64; whose `last_token_Z` the token becomes.
            out: overwritten; without alternatives.
        """
        ...

    def bad_rows(self, logits_SV: Tensor) -> Tensor:
        """What `Samples.bad_S` would say: for ranks that do not draw."""
        ...

    def prepare(self, vocab: int, dtype: torch.dtype, where: torch.device, stride: int = 0) -> None:
        """Loads or compiles now whatever any step's sampling may need.

        Args:
            stride: numbers from one row of logits to the next, where rows are not gathered; 0:
                as many as there are tokens.
        """
        ...


class SharedSampling(Protocol):
    """Finds tokens of rows whose vocabulary several ranks share, without gathering it.

    All ranks make the same calls, for the same rows, and find the same.

    Attributes:
        rows_max: rows of a call at most.
    """

    rows_max: int

    def accept(self, logits_SC: Tensor, slot_S: Tensor, last_token_Z: Tensor, out: Samples) -> None:
        """As `SamplingBackend.greedy_accept`, of this rank's columns.

        Args:
            logits_SC: columns of padding behind this rank's own are left alone.
        """
        ...

    def draw(
        self,
        logits_SC: Tensor,
        temperature_S: Tensor,
        uniform_S: Tensor,
        slot_S: Tensor,
        last_token_Z: Tensor,
        out: Samples,
    ) -> None:
        """Draws from whole vocabularies; makes the tokens their slots' last ones.

        Args:
            logits_SC: as for `accept`.
            temperature_S: float32; 0 takes the best token.
            uniform_S: float64.
        """
        ...

    def prepare(self, dtype: torch.dtype, columns: int, where: torch.device) -> None:
        """Compiles now whatever any step may need."""
        ...


class Plain(ABC):
    """What backends made of PyTorch's operations share."""

    takes_half = False

    @abstractmethod
    def sample(self, logits_SV: Tensor, rows: SampleRows) -> Samples: ...

    def greedy_accept(
        self, logits_SV: Tensor, slot_S: Tensor, last_token_Z: Tensor, out: Samples
    ) -> None:
        no_features = np.zeros(logits_SV.shape[0], np.int64)
        samples = self.sample(logits_SV.float(), SampleRows(no_features))
        last_token_Z.index_copy_(0, slot_S, samples.token_S)
        out.token_S.copy_(samples.token_S)
        out.logprob_S.copy_(samples.logprob_S)
        out.bad_S.copy_(samples.bad_S)

    def prepare(self, vocab: int, dtype: torch.dtype, where: torch.device, stride: int = 0) -> None:
        """Nothing: torch is loaded."""
        del vocab, dtype, where, stride


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def uniform(seed_S: np.ndarray, position_S: np.ndarray) -> np.ndarray:
    """Numbers in [0, 1): a pure function of seed and position (splitmix64 over both).

    Args:
        seed_S: uint64.
        position_S: position in the sequence of the token to draw.

    Returns: float64, multiples of 2^-53.
    """
    counter = _mix(seed_S.astype(np.uint64)) + _GOLDEN * position_S.astype(np.uint64)
    return (_mix(counter) >> np.uint64(11)) * 2.0**-53


def _mix(x: np.ndarray) -> np.ndarray:
    x = x + _GOLDEN
    x = (x ^ (x >> np.uint64(30))) * _MIX_1
    x = (x ^ (x >> np.uint64(27))) * _MIX_2
    return x ^ (x >> np.uint64(31))
