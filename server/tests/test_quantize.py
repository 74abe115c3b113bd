"""`headrace quantize`: GPTQ, the checkpoint that it writes, and runs that are cut short."""

# Y outputs · X inputs · T tokens

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from decoders import PROMPT, load, runner
from safetensors.torch import load_file
from torch import Tensor

from headrace.__main__ import main
from headrace.models import read_scheme
from headrace.quantize import command
from headrace.quantize.checkpoint import PROGRESS, packed, unpacked
from headrace.quantize.dense import DenseBlock
from headrace.quantize.gptq import Options, corrected, quantize
from headrace.testing.oracle import Oracle
from headrace.testing.tiny import Tiny

# Nothing here is large enough for two threads, which wait for each other on a busy machine.
pytestmark = pytest.mark.usefixtures("one_thread")
TINY = Tiny(mlp_width=128, layers=2)
PLAIN = Options(group=32, act_order=False, symmetric=False, damp=0.01)
TEXT = "the quick brown fox jumps over the lazy dog and runs on into the night; " * 60


def correlated(tokens: int, inputs: int) -> Tensor:
    """Inputs that tell of each other, as those of real layers do."""
    random = torch.Generator().manual_seed(1)
    mixed = torch.randn(inputs // 4, inputs, generator=random)
    x_TX = torch.randn(tokens, inputs // 4, generator=random) @ mixed
    return x_TX + 0.3 * torch.randn(tokens, inputs, generator=random)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("group", [32, 64, -1])
def test_outputs_are_nearer_than_by_rounding_to_nearest(
    group: int, act_order: bool, symmetric: bool
) -> None:
    weight_YX = torch.randn(48, 256, generator=torch.Generator().manual_seed(2))
    x_TX = correlated(1000, 256)
    options = Options(group, act_order, symmetric, 0.01)
    made = quantize(weight_YX, x_TX.T @ x_TX, options)
    # Without a word of the inputs every column is rounded for itself.
    nearest = quantize(weight_YX, torch.eye(256), replace(options, act_order=False))

    def error(rounded_YX: Tensor) -> float:
        return float((x_TX @ (rounded_YX - weight_YX).T).square().mean())

    assert error(made.dequantize()) < 0.6 * error(nearest.dequantize())
    assert int(made.codes_YX.max()) <= 15 and int(made.zeros_YG.min()) >= 1
    if not act_order:
        size = 256 if group == -1 else group
        assert torch.equal(made.group_of_X, torch.arange(256) // size)


def test_tokens_with_large_streams_do_not_outweigh_all_others() -> None:
    random = torch.Generator().manual_seed(3)
    weight_YX = torch.randn(48, 256, generator=random)
    x_TX, stream_TD = correlated(1000, 256), torch.randn(1000, 64, generator=random)
    # Two are as the first tokens of real texts: inputs and streams some hundred times as large.
    x_TX[:2] = 500 * torch.randn(2, 256, generator=random)
    stream_TD[:2] *= 500
    counted_TX = command.as_it_counts(x_TX, stream_TD)
    for token in (0, 7):
        rms = float(stream_TD[token].square().mean().sqrt())
        torch.testing.assert_close(counted_TX[token], x_TX[token] / rms)

    def error(inputs_TX: Tensor) -> float:
        moments_XX = command.added(None, inputs_TX[:400], inputs_TX[:400])
        moments_XX = command.added(moments_XX, inputs_TX[400:], inputs_TX[400:])
        made = quantize(weight_YX, moments_XX, PLAIN)
        return float((counted_TX @ (made.dequantize() - weight_YX).T).square().mean())

    assert error(counted_TX) < 0.8 * error(x_TX)


def test_a_weight_makes_up_for_inputs_that_changed() -> None:
    random = torch.Generator().manual_seed(4)
    weight_YX = torch.randn(48, 256, generator=random)
    had_TX = correlated(1000, 256)
    # What layers before did wrong is alike for all tokens, as it is where they were rounded.
    given_TX = had_TX @ (torch.eye(256) + 0.02 * torch.randn(256, 256, generator=random))
    moments_XX, crossed_XX = given_TX.T @ given_TX, had_TX.T @ given_TX

    def error(made_YX: Tensor) -> float:
        return float((given_TX @ made_YX.T - had_TX @ weight_YX.T).square().mean())

    as_it_was = error(weight_YX)
    errors = [error(corrected(weight_YX, moments_XX, crossed_XX, r)) for r in (1e-4, 1.0, 1e6)]
    assert errors[0] < 0.05 * as_it_was
    assert errors[0] < errors[1] < 0.9 * as_it_was
    assert errors[2] == pytest.approx(as_it_was, rel=1e-3)
    # Inputs that did not change leave it as it is, and so do inputs that are zero.
    same_YX = corrected(weight_YX, moments_XX, moments_XX, 1.0)
    torch.testing.assert_close(same_YX, weight_YX)
    zeros_XX = torch.zeros(256, 256)
    assert torch.equal(corrected(weight_YX, zeros_XX, zeros_XX, 1.0), weight_YX)


def test_what_is_packed_is_what_is_unpacked() -> None:
    x_TX = correlated(100, 64)
    made = quantize(torch.randn(16, 64), x_TX.T @ x_TX, replace(PLAIN, act_order=True))
    again = unpacked(packed(made))
    for field in ("codes_YX", "scales_YG", "zeros_YG", "group_of_X"):
        assert torch.equal(getattr(made, field), getattr(again, field)), field


@pytest.mark.parametrize(
    "architecture", ["LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"]
)
def test_blocks_compute_what_the_oracle_does(tmp_path: Path, architecture: str) -> None:
    folder = Tiny(architecture, layers=1, tied=True).write(tmp_path)
    tensors = {k: v.float() for k, v in load_file(folder / "model.safetensors").items()}
    oracle = Oracle(folder, torch.float32)
    prefix = "model.layers.0."
    own = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    block = DenseBlock(oracle.spec, 0, own)
    x_TD = tensors["model.embed_tokens.weight"][PROMPT]
    x_TD = x_TD + block.linear(block.inputs(1, x_TD), "self_attn.o_proj")
    x_TD = x_TD + block.linear(block.inputs(3, x_TD), "mlp.down_proj")
    norm = x_TD * torch.rsqrt(x_TD.pow(2).mean(-1, keepdim=True) + oracle.spec.norm_eps)
    logits_TV = norm * tensors["model.norm.weight"] @ tensors["model.embed_tokens.weight"].T
    torch.testing.assert_close(logits_TV, oracle.logits(PROMPT), rtol=1e-4, atol=1e-4)


def quantized(model: Path, out: Path, *flags: str) -> int:
    dataset = model.parent / "text.txt"
    dataset.write_text(TEXT)
    sizes = ("--samples", "4", "--length", "64", "--device", "cpu")
    dataset_flags = ("--dataset", str(dataset), "--groupsize", "32")
    return main(["quantize", str(model), str(out), *dataset_flags, *sizes, *flags])


@pytest.mark.parametrize("flags", [(), ("--act-order", "--sym")], ids=["", "ordered"])
@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen2ForCausalLM"])
def test_what_it_writes_is_served(tmp_path: Path, architecture: str, flags: tuple[str]) -> None:
    model = replace(TINY, architecture=architecture).write(tmp_path / "model")
    out = tmp_path / "out"
    assert quantized(model, out, *flags) == 0
    assert read_scheme(out).name == "gptq"
    assert not (out / PROGRESS).exists()
    assert json.loads((out / "quantize_config.json").read_text())["desc_act"] == bool(flags)
    assert (out / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()
    before, after = load(model, reference=True)[0], load(out, reference=True)[0]
    for left, right in zip(before.blocks, after.blocks, strict=True):
        weight_YX = left.mlp.down.method.dequantize()  # type: ignore[union-attr]
        error = right.mlp.down.method.dequantize() - weight_YX  # type: ignore[union-attr]
        assert 0 < float(error.norm() / weight_YX.norm()) < 0.25
    slow = runner(out, reference=True).greedy([PROMPT], 12)
    assert runner(out).greedy([PROMPT], 12) == slow


def test_a_run_that_was_cut_short_goes_on_to_the_same_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = TINY.write(tmp_path / "model")
    assert quantized(model, tmp_path / "whole") == 0
    once = command.quantize
    calls = 0

    def stops(weight_YX: Tensor, moments_XX: Tensor, options: Options) -> object:
        nonlocal calls
        calls += 1
        if calls > 9:  # Seven layers a block.
            raise OSError("the disk is full")
        return once(weight_YX, moments_XX, options)

    monkeypatch.setattr(command, "quantize", stops)
    cut = tmp_path / "cut"
    assert quantized(model, cut) == 1
    assert "the disk is full" in capsys.readouterr().err
    monkeypatch.setattr(command, "quantize", once)
    assert quantized(model, cut, "--sym") == 1
    assert "another run, with another sym" in capsys.readouterr().err
    assert quantized(model, cut) == 0
    assert "layer 1 of 2: read, as an earlier run left it" in capsys.readouterr().err
    for path in (tmp_path / "whole").glob("*.safetensors"):
        one, other = load_file(path), load_file(cut / path.name)
        assert one.keys() == other.keys()
        assert all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--groupsize", "48"), "--groupsize must be one of (-1, 32, 64, 128), it is 48"),
        (("--groupsize", "128"), "64 inputs of a layer do not divide by it; take 32 or 64 or -1"),
        (("--percdamp", "0"), "--percdamp must lie between 0 and 1, it is 0.0"),
        (("--samples", "0"), "--samples must be at least 1, it is 0"),
        (("--upload-to-model-id", "a/b"), "nothing is uploaded"),
    ],
)
def test_what_cannot_be_done_is_said(
    tmp_path: Path, flags: tuple[str, ...], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert quantized(TINY.write(tmp_path / "model"), tmp_path / "out", *flags) == 1
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_tgis_program_has_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, out = TINY.write(tmp_path / "model"), tmp_path / "out"
    assert main(["tgi-server", "quantize", str(model), str(out)]) == 1
    assert "--dataset FILE is needed" in capsys.readouterr().err
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    flags = ["--dataset", str(text), "--groupsize", "64", "--samples", "2", "--length", "32"]
    assert main(["tgi-server", "quantize", str(model), str(out), *flags]) == 0
    out.joinpath("config.json").unlink()
    assert main(["quantize", str(model), str(out), *flags]) == 1
    assert "is not empty" in capsys.readouterr().err
