"""RMS normalisation, whole on every rank."""

# T tokens · D width

from __future__ import annotations

from torch import Tensor

from headrace.layers.build import Build
from headrace.layers.linear import Linear
from headrace.ops.rows8 import Rows8
from headrace.quant import Declares, Part, Split


class RmsNorm(Declares):
    """The norm of a residual stream, to which the layer before it has something to add.

    Here, and nowhere else, ranks sum what they have computed of a layer.
    """

    weight: Tensor

    def __init__(self, build: Build, width: int, eps: float, feeds: Linear | None = None) -> None:
        """
        Args:
            feeds: the layer that takes the norm; None: one that takes it in the model's dtype.
        """
        super().__init__()
        self._feeds = (feeds,)  # not a module of this one
        comm, ops = build.comm, build.ops
        # What layers add to the stream is each rank's share of a sum.
        self._all_reduce = comm.all_reduce if comm.size > 1 else None
        self._reduce_norm = ops.reduce_norm(comm.share, comm.size, width) if comm.size > 1 else None
        self._eps = eps
        self._rms_norm = build.ops.rms_norm
        self._add_rms_norm = build.ops.add_rms_norm
        self._rows8 = build.ops.rows8
        self.declare("weight", Split(0, (Part.whole(width),)), None, build.dtype)

    def forward(self, x_TD: Tensor, residual_TD: Tensor | None) -> tuple[Tensor | Rows8, Tensor]:
        """Returns the norm of the sum, as `feeds` takes it, and the sum, equal on every rank.

        Args:
            x_TD: what this rank adds; the sum takes that of all ranks. May be overwritten.
            residual_TD: may be overwritten; None where the stream begins, with what ranks add.
        """
        (feeds,) = self._feeds
        rows8 = self._rows8 if feeds is not None and feeds.takes_rows8 else None
        fused = self._reduce_norm
        if fused is not None and x_TD.shape[0] <= fused.rows_max:
            normed_TD, residual_TD = fused(x_TD, residual_TD, self.weight, self._eps)
            return normed_TD if rows8 is None else rows8.quantize(normed_TD), residual_TD
        if self._all_reduce is not None:
            summed_TD = self._all_reduce(x_TD)
            # The stream may not begin in memory that the next sum overwrites.
            x_TD = x_TD.copy_(summed_TD) if residual_TD is None else summed_TD
        if residual_TD is None:
            norm = self._rms_norm if rows8 is None else rows8.rms_norm
            return norm(x_TD, self.weight, self._eps), x_TD
        add_norm = self._add_rms_norm if rows8 is None else rows8.add_rms_norm
        return add_norm(x_TD, residual_TD, self.weight, self._eps)
