"""Which rows of a step take which path through the sampler."""

# S sampled rows · R rows of a group

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from torch import Tensor

from headrace.ops.sampling.base import Feature, SampleRows

# What makes a draw go through the tokens best first.
SORTS = Feature.FILTERED | Feature.TYPICAL

# What changes logits.
EDITS = Feature.WATERMARK | Feature.PENALTY | Feature.BIAS | Feature.TOKENS_MIN | Feature.MASKED


class Groups:
    """Which rows take which path, decided on the host; and where these indices are on the device.

    All of them are sent in one copy, which a step whose rows are alike does not need.
    """

    def __init__(self, rows: SampleRows) -> None:
        feature_S = rows.features_S
        self.features = Feature(int(np.bitwise_or.reduce(feature_S)))
        sampled_S = _has(feature_S, Feature.SAMPLED)
        sorted_S = sampled_S & _has(feature_S, SORTS)
        raw_S = _has(feature_S, Feature.LOGPROB_RAW)
        top_S = _has(feature_S, Feature.TOP_N)
        self.best_R = np.flatnonzero(~sampled_S)
        self.whole_R = np.flatnonzero(sampled_S & ~sorted_S)
        self.sorted_R = np.flatnonzero(sorted_S)
        self.raw_R = np.flatnonzero(raw_S)
        self.top_R = np.flatnonzero(top_S & ~raw_S)
        self.raw_top_R = np.flatnonzero(top_S & raw_S)
        top_n_S = np.zeros_like(feature_S) if rows.top_n_S is None else rows.top_n_S
        self.top_n_R = top_n_S[self.top_R]
        self.raw_top_n_R = top_n_S[self.raw_top_R]
        # Indices of rows, and what goes with them.
        self._index_R = {
            "best": self.best_R,
            "whole": self.whole_R,
            "sorted": self.sorted_R,
            "top": self.top_R,
            "raw": self.raw_R,
            "raw_top": self.raw_top_R,
        }
        self._values = {"top_n": self.top_n_R, "raw_top_n": self.raw_top_n_R}
        if self.features & EDITS:
            self._values["features"] = feature_S
        self._rows = feature_S.size
        self._sent: dict[str, Tensor] = {}

    def send(self, to_device: Callable[[np.ndarray], Tensor], every_S: Tensor) -> None:
        """Copies columns to the device.

        Args:
            every_S: int64, on the device: the indices of all rows.
        """
        all_rows = {name for name, index in self._index_R.items() if index.size == self._rows}
        self._sent = dict.fromkeys(all_rows, every_S)
        columns = self._values | self._index_R
        named = {n: c for n, c in columns.items() if c.size and n not in all_rows}
        if not named:
            return
        # Each begins at a multiple of 16 bytes: kernels are compiled once.
        padded = [np.pad(column, (0, column.size % 2)) for column in named.values()]
        sent = to_device(np.concatenate(padded).astype(np.int64))
        parts = sent.split([column.size for column in padded])
        self._sent |= dict(zip(named, parts, strict=True))

    def __getitem__(self, name: str) -> Tensor:
        """A column on the device, int64; it may be longer than its group."""
        return self._sent[name]


def _has(feature_S: np.ndarray, bits: Feature) -> np.ndarray:
    return (feature_S & int(bits)) != 0
