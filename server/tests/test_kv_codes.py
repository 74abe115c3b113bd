"""A model whose KV cache keeps codes of eight bits: the same tokens however its steps are made."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from decoders import PROMPT, load, runner
from safetensors.torch import load_file, save_file
from test_invariance import WAYS, tokens_of
from test_load import serve

from headrace.device.absent import AbsentDevice
from headrace.errors import CheckpointError, ConfigError
from headrace.load import _choose_kv_dtype, describe, load_engine
from headrace.ops.kv_write import CODES, UNIT, KvScales
from headrace.testing.oracle import Oracle
from headrace.testing.paged import PagedSequence
from headrace.testing.tiny import Tiny

# Root mean squares, of the error over the logits: about what a code is off its number.
TOLERANCE = {torch.float8_e4m3fn: 0.04, torch.float8_e5m2: 0.08}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Tiny().write(tmp_path_factory.mktemp("tiny"))


def scaled(folder: Path, tmp_path: Path, scales: dict[str, torch.Tensor]) -> Path:
    """The same checkpoint with more tensors."""
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "model.safetensors"
    save_file(load_file(weights) | scales, weights)
    return tmp_path


@cache
def expected(folder: Path, stored: torch.dtype) -> list[list[int]]:
    return tokens_of(folder, replace(WAYS["alone"], alone=False, kv_dtype=stored))


@pytest.mark.parametrize(
    ("way", "stored"),
    [
        ("alone", CODES[0]),
        ("chunks of 5", CODES[1]),
        ("cache hits in chunks", CODES[0]),
        ("preemption, depth 3, cache hits", CODES[1]),
        ("two ranks", CODES[0]),
        ("reference operations", CODES[1]),
    ],
)
def test_tokens_are_the_same_however_steps_are_made(
    folder: Path, way: str, stored: torch.dtype
) -> None:
    assert tokens_of(folder, replace(WAYS[way], kv_dtype=stored)) == expected(folder, stored)


@pytest.mark.parametrize("stored", CODES, ids=str)
@pytest.mark.parametrize("reference", [False, True], ids=["chosen", "reference"])
def test_logits_are_near_those_of_the_whole_numbers(
    folder: Path, stored: torch.dtype, reference: bool
) -> None:
    paged = runner(folder, kv_dtype=stored, reference=reference)
    logits = paged.step([(PagedSequence(), PROMPT)], every=True)
    expected = Oracle(folder).logits(PROMPT)
    off = float((logits - expected).norm() / expected.norm())
    assert 0 < off < TOLERANCE[stored], "codes are not the numbers, and near them"


@pytest.mark.parametrize(
    "names",
    [
        ("self_attn.k_scale", "self_attn.v_scale"),
        ("self_attn.k_proj.k_scale", "self_attn.v_proj.v_scale"),
        ("self_attn.k_proj.output_scale", "self_attn.v_proj.output_scale"),
    ],
    ids=" ".join,
)
def test_scales_of_the_checkpoint_are_taken(
    folder: Path, tmp_path: Path, names: tuple[str, str]
) -> None:
    values = {
        f"model.layers.{layer}.{name}": torch.tensor([0.25 * (layer + 1) + kind])
        for layer in range(2)  # Of three.
        for kind, name in enumerate(names)
    }
    made = scaled(folder, tmp_path, values)
    model, _ = load(made, kv_dtype=CODES[0])
    found = [block.attention.kv_scales for block in model.blocks]
    assert found == [KvScales(0.25, 1.25), KvScales(0.5, 1.5), UNIT]
    assert model.scaled_caches == 2
    plain, _ = load(made)
    assert all(block.attention.kv_scales == UNIT for block in plain.blocks), "no codes, no scales"


def test_one_scale_may_be_of_both(folder: Path, tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.kv_scale"
    model, _ = load(scaled(folder, tmp_path, {name: torch.tensor(0.5)}), kv_dtype=CODES[1])
    assert model.blocks[0].attention.kv_scales == KvScales(0.5, 0.5)


@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan, math.inf])
def test_a_scale_that_is_none_is_refused_with_its_name(
    folder: Path, tmp_path: Path, scale: float
) -> None:
    values = {f"model.layers.0.self_attn.{kind}_scale": torch.tensor(scale) for kind in "kv"}
    made = scaled(folder, tmp_path, values)
    with pytest.raises(CheckpointError, match=r"self_attn\.k_scale is .*is positive"):
        load(made, kv_dtype=CODES[0])


def test_scales_move_what_codes_can_say(folder: Path, tmp_path: Path) -> None:
    """With far too small a scale everything saturates; one of a power of two says the same."""
    names = [f"model.layers.{layer}.self_attn.{kind}_scale" for layer in range(3) for kind in "kv"]
    logits: list[torch.Tensor] = []
    for number, scale in enumerate((1.0, 0.5, 1e-6)):
        (tmp_path / str(number)).mkdir()
        values = {name: torch.tensor(scale) for name in names}
        made = scaled(folder, tmp_path / str(number), values)
        paged = runner(made, kv_dtype=CODES[1])
        logits.append(paged.step([(PagedSequence(), PROMPT)]))
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=1e-3)
    assert (logits[0] - logits[2]).abs().max() > 0.01
    assert all(each.isfinite().all() for each in logits)


def test_the_start_says_what_the_cache_is_and_warns_without_scales(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    made = load_engine(serve(folder, kv_dtype="float8_e4m3fn"), 0)
    assert made.kv_dtype == CODES[0]
    assert "kv cache float8_e4m3fn, scales of the checkpoint in 0 of 3 layers" in caplog.text
    assert "1.0 is taken, and keys and values beyond 448 become that" in caplog.text
    assert "float8_e4m3fn widened as it is gathered" in caplog.text
    plain, coded = (describe(serve(folder, kv_dtype=name)) for name in ("", "float8_e5m2"))
    assert (plain["kv_dtype"], coded["kv_dtype"]) == ("float32", "float8_e5m2")
    assert plain["kv_bytes_per_token"] == 4 * int(coded["kv_bytes_per_token"])


def test_what_cannot_work_is_refused_with_the_alternative(folder: Path) -> None:
    old, new = AbsentDevice((8, 0), 108), AbsentDevice((8, 9), 108)
    with pytest.raises(
        ConfigError, match=r"needs compute capability 8\.9.* has 8\.0: take fp8_e5m2"
    ):
        _choose_kv_dtype(serve(folder, kv_dtype="float8_e4m3fn"), old)
    assert _choose_kv_dtype(serve(folder, kv_dtype="float8_e4m3fn"), new) == CODES[0]
    assert _choose_kv_dtype(serve(folder, kv_dtype="float8_e5m2"), old) == CODES[1]
    with pytest.raises(ConfigError, match="float8_e4m3fn, float8_e5m2 exist"):
        _choose_kv_dtype(serve(folder, kv_dtype="float8_e4m3fnuz"), new)
