"""From a step's logits to tokens: the second launch of a step (R7)."""

# L wanted logits · R sampled rows · O those that this rank draws · V vocabulary
# C this rank's columns of it

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from headrace.batch import PromptRow, Step
from headrace.device import Download
from headrace.engine import Engine
from headrace.layers.embedding import whole_rows, whole_vocabulary
from headrace.masks import MaskBuffer, missed
from headrace.ops.sampling import Feature, Masks, SampleRows, Samples, empty_samples, uniform
from headrace.slots import SlotRows
from headrace.wire import Mask, ResultFlag

# Prompt tokens whose log-probabilities are computed at one time.
PROMPT_CHUNK = 64


@dataclass
class Outputs:
    """What a launched step will leave on the host."""

    row_R: np.ndarray
    download: Download
    alternative_rows: list[np.ndarray]
    prompt_rows: tuple[PromptRow, ...]
    missed_R: np.ndarray | None = None  # bool: rows without the mask that they waited for

    def wait(self) -> Drawn:
        """Waits for the device."""
        arrays = iter(self.download.wait())
        token_R, logprob_R, bad_R = next(arrays), next(arrays), next(arrays)
        groups = [
            (rows, next(arrays), next(arrays), next(arrays)) for rows in self.alternative_rows
        ]
        told = [[next(arrays) for _ in range(3)] for _ in self.prompt_rows]
        prompt_logprob, best_token, best_logprob = zip(*told, strict=True) if told else ((),) * 3
        count_R, token, logprob = _ragged(self.row_R.size, groups)
        flags_R = bad_R.astype(np.int32) * int(ResultFlag.NAN)
        if self.missed_R is not None:
            flags_R |= self.missed_R.astype(np.int32) * int(ResultFlag.MASK_MISSED)
        return Drawn(
            row_R=self.row_R.astype(np.int32),
            token_R=token_R.astype(np.int32),
            flags_R=flags_R,
            logprob_R=logprob_R,
            top_count_R=count_R,
            top_token=token,
            top_logprob=logprob,
            prompt_logprob=_concatenate(prompt_logprob, np.float32),
            prompt_best_token=_concatenate(best_token, np.int32),
            prompt_best_logprob=_concatenate(best_logprob, np.float32),
        )


@dataclass(frozen=True)
class Drawn:
    """A step's tokens on the host; `top_*` flat over rows, `prompt_*` over prompt rows."""

    row_R: np.ndarray
    token_R: np.ndarray
    flags_R: np.ndarray
    logprob_R: np.ndarray
    top_count_R: np.ndarray
    top_token: np.ndarray
    top_logprob: np.ndarray
    prompt_logprob: np.ndarray
    prompt_best_token: np.ndarray
    prompt_best_logprob: np.ndarray


def divided(is_first_R: np.ndarray, ranks: int) -> list[np.ndarray]:
    """Divides rows evenly over ranks; returns those of each, ascending, int64.

    Args:
        is_first_R: rows that only rank 0 can draw.
        ranks: at least two.
    """
    first_X, other_X = np.flatnonzero(is_first_R), np.flatnonzero(~is_first_R)
    share = -(-is_first_R.size // ranks)
    more = max(0, share - first_X.size)
    first_X = np.sort(np.concatenate((first_X, other_X[:more])))
    return [first_X, *np.array_split(other_X[more:], ranks - 1)]


class Sampler:
    """Finds the tokens of a step's rows, the same on all ranks.

    Where ranks can agree on best tokens, and on draws from whole vocabularies, by a few words, they
    do. Else each draws some of the rows, of which it gets the others' columns, and all are told, on
    the device, before their next step. Only of steps that tell prompts' log-probabilities are all
    logits gathered; rank 0 draws their rows.
    """

    def __init__(self, engine: Engine, slots: SlotRows, rows_max: int) -> None:
        """
        Args:
            rows_max: rows of a step at most.
        """
        self._device = engine.device
        self._slots = slots
        self._backend = engine.sampling
        self._comm = engine.comm
        self._vocab_size = engine.vocab_size
        self._shared = engine.shared_sampling
        self._watermark = engine.watermark
        self._masks = MaskBuffer(engine.device, rows_max, engine.vocab_size)

    def launch(self, step: Step, logits_LC: Tensor, mask: Mask | None = None) -> Outputs:
        """Draws, and makes the tokens their slots' last ones.

        Args:
            logits_LC: of this rank's share of the vocabulary, in any dtype; may be overwritten.
            mask: what constrained rows may draw, on rank 0; those without draw anything (R7).
        """
        feature_R = self.features(step)
        if self._is_shared(step, feature_R):
            return self._launch_shared(step, logits_LC, feature_R)
        if self._comm.size > 1 and step.row_R.size and not step.prompts:
            return self._launch_divided(step, logits_LC, feature_R, mask)
        logits_LV = whole_vocabulary(logits_LC, self._comm, self._vocab_size)
        prompts = [told for row in step.prompts for told in self._prompt(row, step, logits_LV)]
        logits_RV = logits_LV if step.logits_R is None else logits_LV.index_select(0, step.logits_R)
        samples = self._draw(step, self._wide(logits_RV), feature_R, mask)
        token_R = samples.token_S
        if step.row_R.size:
            self._comm.broadcast(token_R)
            self._slots.accept(step.device_slot_R, token_R)
            self._slots.count(step.slot_R, feature_R, token_R)
        tensors = [token_R, samples.logprob_S, samples.bad_S]
        for group in samples.alternatives:
            tensors += [group.count_R, group.token_RK, group.logprob_RK]
        return Outputs(
            row_R=step.row_R,
            download=self._device.download([*tensors, *prompts]),
            alternative_rows=[group.row_R for group in samples.alternatives],
            prompt_rows=step.prompts,
            missed_R=missed(step, mask) if step.masked_R.any() else None,
        )

    def _launch_divided(
        self, step: Step, logits_LC: Tensor, feature_R: np.ndarray, mask: Mask | None
    ) -> Outputs:
        """Draws the rows that are this rank's own, and exchanges tokens for the others'."""
        comm, to_device = self._comm, self._device.to_device
        # Masks come to rank 0, which is also the one that tells alternatives.
        is_first_R = (feature_R & int(Feature.MASKED | Feature.TOP_N)) != 0
        rows_of = divided(is_first_R, comm.size)
        counts, own_O = [rows.size for rows in rows_of], rows_of[comm.rank]
        logits_R = to_device(np.concatenate(rows_of))
        if step.logits_R is not None:
            logits_R = step.logits_R.index_select(0, logits_R)
        logits_RC = logits_LC.index_select(0, logits_R)
        logits_OV = self._wide(whole_rows(logits_RC, counts, comm, self._vocab_size))
        samples = self._sampled(self._part(step, own_O), logits_OV, feature_R[own_O], mask)
        # A float64 holds each of them exactly.
        most = max(counts)
        told_M3 = torch.zeros((most, 3), dtype=torch.float64, device=logits_LC.device)
        for column, x_O in enumerate((samples.token_S, samples.logprob_S, samples.bad_S)):
            told_M3[: own_O.size, column] = x_O
        place_R = np.empty(step.row_R.size, np.int64)
        for rank, rows in enumerate(rows_of):
            place_R[rows] = rank * most + np.arange(rows.size)
        told_R3 = comm.all_gather(told_M3, 0).index_select(0, to_device(place_R))
        token_R = told_R3[:, 0].long()
        self._slots.accept(step.device_slot_R, token_R)
        self._slots.count(step.slot_R, feature_R, token_R)
        tensors = [token_R, told_R3[:, 1].float(), told_R3[:, 2] != 0]
        for group in samples.alternatives:
            tensors += [group.count_R, group.token_RK, group.logprob_RK]
        return Outputs(
            row_R=step.row_R,
            download=self._device.download(tensors),
            alternative_rows=[own_O[group.row_R] for group in samples.alternatives],
            prompt_rows=(),
            missed_R=missed(step, mask) if step.masked_R.any() else None,
        )

    def _part(self, step: Step, rows_O: np.ndarray) -> Step:
        """The step as if only some of its rows were sampled, in their order."""
        index_O = self._device.to_device(rows_O)
        logits_R = step.logits_R
        return replace(
            step,
            row_R=step.row_R[rows_O],
            masked_R=step.masked_R[rows_O],
            slot_R=step.slot_R[rows_O],
            device_slot_R=step.device_slot_R.index_select(0, index_O),
            position_R=step.position_R[rows_O],
            logits_R=index_O if logits_R is None else logits_R.index_select(0, index_O),
        )

    def features(self, step: Step) -> np.ndarray:
        """What the sampling of each row needs, masks included, on every rank the same."""
        feature_R = self._slots.features(step.slot_R, step.position_R)
        return np.where(step.masked_R, feature_R | int(Feature.MASKED), feature_R)

    def _is_shared(self, step: Step, feature_R: np.ndarray) -> bool:
        """Whether ranks can agree on all that is asked for: best tokens, and draws from all."""
        rows = step.row_R.size
        if self._shared is None or step.prompts or not 0 < rows <= self._shared.rows_max:
            return False
        return not (feature_R & ~int(Feature.SAMPLED)).any()

    def _launch_shared(self, step: Step, logits_LC: Tensor, feature_R: np.ndarray) -> Outputs:
        logits_RC = logits_LC if step.logits_R is None else logits_LC.index_select(0, step.logits_R)
        assert self._shared is not None
        samples = empty_samples(logits_RC)
        slots, slot_R = self._slots, step.device_slot_R
        if feature_R.any():
            drawn_R = self._device.to_device(uniform(slots.seeds(step.slot_R), step.position_R))
            temperature_R = slots.knobs(slot_R).temperature_S
            self._shared.draw(
                logits_RC, temperature_R, drawn_R, slot_R, slots.last_token_Z, samples
            )
        else:
            self._shared.accept(logits_RC, slot_R, slots.last_token_Z, samples)
        tensors = [samples.token_S, samples.logprob_S, samples.bad_S]
        return Outputs(step.row_R, self._device.download(tensors), [], ())

    def _wide(self, logits_RV: Tensor) -> Tensor:
        """The logits in a dtype that the backend takes."""
        return logits_RV if self._backend.takes_half else logits_RV.float()

    def _draw(
        self, step: Step, logits_RV: Tensor, feature_R: np.ndarray, mask: Mask | None
    ) -> Samples:
        if self._comm.rank != 0:
            return self._undrawn(logits_RV)
        return self._sampled(step, logits_RV, feature_R, mask)

    def _sampled(
        self, step: Step, logits_RV: Tensor, feature_R: np.ndarray, mask: Mask | None
    ) -> Samples:
        if not step.row_R.size:
            return empty_samples(logits_RV)
        masks = None if mask is None else self._masks.send(step, mask)
        feature_R = np.where(missed(step, mask), feature_R & ~int(Feature.MASKED), feature_R)
        return self._backend.sample(logits_RV, self._rows(step, feature_R, masks))

    def _undrawn(self, logits_RV: Tensor) -> Samples:
        """What a rank knows before it is told what rank 0 drew."""
        samples = empty_samples(logits_RV)
        if logits_RV.shape[0]:
            samples = replace(samples, bad_S=self._backend.bad_rows(logits_RV))
        return samples

    def _rows(self, step: Step, feature_R: np.ndarray, masks: Masks | None) -> SampleRows:
        """Gathers what the rows' features need, and nothing else."""
        features = Feature(int(np.bitwise_or.reduce(feature_R)))
        if not features:
            return SampleRows(feature_R)
        slots, slot_R = self._slots, step.device_slot_R
        uniform_R = None
        if features & Feature.SAMPLED:
            drawn_R = uniform(slots.seeds(step.slot_R), step.position_R)
            uniform_R = self._device.to_device(drawn_R)
        state_QV, state_slot_R = (
            slots.penalties(slot_R) if features & Feature.PENALTY else (None, None)
        )
        needs_knobs = features & (Feature.SAMPLED | Feature.PENALTY)
        return SampleRows(
            features_S=feature_R,
            top_n_S=slots.top_n(step.slot_R) if features & Feature.TOP_N else None,
            knobs=slots.knobs(slot_R) if needs_knobs else None,
            uniform_S=uniform_R,
            state_QV=state_QV,
            state_slot_S=state_slot_R,
            bias=slots.bias(step.slot_R, feature_R),
            banned=slots.banned(step.slot_R, feature_R),
            masks=masks,
            previous_S=self._previous(step) if features & Feature.WATERMARK else None,
            watermark=self._watermark,
        )

    def _previous(self, step: Step) -> Tensor:
        """The last token of each sampled row; the host may not know it yet."""
        if step.inputs is None:  # A graph took it from the slots, as nobody has drawn since.
            return self._slots.last_tokens(step.device_slot_R)
        token_L, sampled_L = step.inputs.tokens_T, step.inputs.context.sampled_S
        if sampled_L is not None:
            token_L = token_L.index_select(0, sampled_L)
        return token_L if step.logits_R is None else token_L.index_select(0, step.logits_R)

    def _prompt(self, row: PromptRow, step: Step, logits_LV: Tensor) -> tuple[Tensor, ...]:
        """What is told of each token of a row, given those before it.

        Returns: its log-probability, NaN for the first of a prompt; the most probable token in its
        place; that one's log-probability.
        """
        assert step.inputs is not None, "a graph computes no prompts"
        token_T = step.inputs.tokens_T[row.first : row.first + row.length]
        found = torch.full((row.length,), torch.nan, device=logits_LV.device)
        best_logprob = found.clone()
        best = torch.zeros(row.length, dtype=torch.int64, device=logits_LV.device)
        carry_V = None
        for at in range(0, row.length, PROMPT_CHUNK):
            end = min(at + PROMPT_CHUNK, row.length)
            logprob_TV = logits_LV[row.logits + at : row.logits + end].float().log_softmax(1)
            told = min(end, row.length - 1) - at  # the row's last token predicts beyond it
            after = slice(at + 1, at + 1 + told)
            found[after] = logprob_TV[:told].gather(1, token_T[after, None])[:, 0]
            best_logprob[after], best[after] = logprob_TV[:told].max(1)
            carry_V = logprob_TV[-1]
        before_V = self._slots.carry_logprobs(row.slot, None if row.ends else carry_V)
        if before_V is not None and row.start > 0:
            found[:1] = before_V.index_select(0, token_T[:1])
            best_logprob[:1], best[:1] = before_V.max(0)
        return found, best, best_logprob


def _ragged(
    rows: int, groups: list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Merges groups of padded alternatives: counts a row, tokens and logprobs flat in row order."""
    count_R = np.zeros(rows, np.int32)
    found: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    for row_G, count_G, token_GK, logprob_GK in groups:
        count_R[row_G] = count_G
        for i, (row, count) in enumerate(zip(row_G.tolist(), count_G.tolist(), strict=True)):
            found[row] = token_GK[i, :count], logprob_GK[i, :count]
    tokens = [found[row][0] for row in sorted(found)]
    logprobs = [found[row][1] for row in sorted(found)]
    return count_R, _concatenate(tokens, np.int32), _concatenate(logprobs, np.float32)


def _concatenate(parts: Sequence[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate(parts).astype(dtype) if parts else np.zeros(0, dtype)
