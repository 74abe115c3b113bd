"""Every format of quantized checkpoints: loaded, divided over ranks, multiplied, and refused."""

# T tokens · Y outputs · X inputs

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from decoders import PROMPT, load, runner
from safetensors.torch import load_file, save_file
from torch import Tensor

from headrace import native, quant
from headrace.comm import SingleComm
from headrace.device.cpu import CpuDevice
from headrace.errors import CheckpointError, ConfigError
from headrace.layers.linear import Linear
from headrace.models import Decoder, load_model, read_scheme
from headrace.ops.quant_matmul import Kind
from headrace.ops.quant_matmul.reference import ReferenceRows8Matmul
from headrace.ops.rows8 import Rows8
from headrace.ops.rows8.reference import quantize_rows
from headrace.quant.detect import ON_LOAD
from headrace.testing.oracle import Oracle
from headrace.testing.paged import PagedRunner, PagedSequence
from headrace.testing.quantized import FORMATS, TINY, write
from headrace.testing.threads import ThreadComm, run_ranks
from headrace.testing.tiny import Tiny

# Nothing here is large enough for two threads, which wait for each other on a busy machine.
pytestmark = pytest.mark.usefixtures("one_thread")
TOKENS = 12
PROMPTS = [[1, 44, 100, 7], PROMPT]


def layers(model: Decoder) -> dict[str, Linear]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, Linear)}


def weights(model: Decoder) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, layer in layers(model).items():
        assert layer.method is not None
        found[name] = layer.method.dequantize()
    return found


@pytest.mark.parametrize("name", FORMATS)
def test_layers_dequantize_to_what_was_stored(tmp_path: Path, name: str) -> None:
    quantized, plain = write(name, tmp_path)
    expected = weights(load(plain, reference=True)[0])
    for layer, weight_YX in weights(load(quantized, reference=True)[0]).items():
        torch.testing.assert_close(weight_YX, expected[layer], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("reference", [True, False], ids=["reference", "selected"])
@pytest.mark.parametrize("name", FORMATS)
def test_layers_multiply_by_what_they_dequantize_to(
    tmp_path: Path, name: str, reference: bool
) -> None:
    quantized, _ = write(name, tmp_path)
    model, _ = load(quantized, reference=reference)
    for layer in layers(model).values():
        assert layer.method is not None
        weight_YX = layer.method.dequantize()
        for rows in (1, 3, 40):
            x_TX = torch.randn(rows, weight_YX.shape[1], generator=torch.Generator().manual_seed(1))
            actual_TY = layer.method.apply(x_TX)
            torch.testing.assert_close(actual_TY, x_TX @ weight_YX.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_written_is_what_the_dequantized_model_writes(tmp_path: Path, name: str) -> None:
    quantized, plain = write(name, tmp_path)
    oracle = Oracle(plain)
    expected = [oracle.greedy(prompt, TOKENS) for prompt in PROMPTS]
    for reference in (True, False):
        assert runner(quantized, reference=reference).greedy(PROMPTS, TOKENS) == expected


def test_the_native_step_multiplies_codes(tmp_path: Path) -> None:
    if isinstance(native.load(), str):
        pytest.skip("the kernel library is not built")
    quantized, _ = write("awq", tmp_path)
    model, table = load(quantized)
    if "int4_matmul" not in {c.op for c in table.choices if c.name == "native"}:
        pytest.skip("the kernel library has nothing for this CPU")
    assert model.whole_step is not None
    ordered, _ = write("gptq-ordered", tmp_path)
    assert load(ordered)[0].whole_step is None


def share(whole_YX: Tensor, layer: str, rank: int, ranks: int) -> Tensor:
    """A rank's rows or columns of a layer of `TINY`."""
    if layer.endswith(("out", "down")):
        return whole_YX.chunk(ranks, dim=1)[rank]
    if layer.endswith("qkv"):
        parts = whole_YX.split([128, 64, 64])
        return torch.cat([part.chunk(ranks)[rank] for part in parts])
    if layer.endswith("gate_up"):
        return torch.cat([part.chunk(ranks)[rank] for part in whole_YX.chunk(2)])
    padded_YX = torch.nn.functional.pad(whole_YX[:509], (0, 0, 0, 512 - 509))
    return padded_YX.chunk(ranks)[rank]


@pytest.mark.parametrize("name", FORMATS)
def test_a_slice_dequantizes_to_the_slice_of_what_is_dequantized(tmp_path: Path, name: str) -> None:
    quantized, _ = write(name, tmp_path)
    whole = weights(load(quantized, reference=True)[0])

    def rank(comm: ThreadComm) -> dict[str, Tensor]:
        return weights(load(quantized, comm=comm, reference=True)[0])

    for number, of_rank in enumerate(run_ranks(2, rank)):
        for layer, weight_YX in of_rank.items():
            expected_YX = share(whole[layer], layer, number, 2)
            torch.testing.assert_close(weight_YX, expected_YX, rtol=0, atol=0)


@pytest.mark.parametrize("name", FORMATS)
def test_two_shards_write_what_one_does(tmp_path: Path, name: str) -> None:
    quantized, _ = write(name, tmp_path)
    expected = runner(quantized, reference=True).greedy(PROMPTS, TOKENS)

    def rank(comm: ThreadComm) -> list[list[int]]:
        return runner(quantized, comm=comm, reference=True).greedy(PROMPTS, TOKENS)

    assert run_ranks(2, rank) == [expected] * 2


def test_projections_of_other_orders_are_multiplied_one_by_one(tmp_path: Path) -> None:
    quantized, _ = write("gptq-ordered", tmp_path)
    path = quantized / "model.safetensors"
    tensors = load_file(path)
    key = "model.layers.0.self_attn.k_proj.g_idx"
    tensors[key] = tensors[key].flip(0).contiguous()
    save_file(tensors, path, metadata={"format": "pt"})
    attention: Any = load(quantized, reference=True)[0].blocks[0].attention
    first = write("gptq-ordered", tmp_path)[0]
    whole: Any = load(first, reference=True)[0].blocks[0].attention
    actual_YX, before_YX = attention.qkv.method.dequantize(), whole.qkv.method.dequantize()
    assert torch.equal(actual_YX[:128], before_YX[:128])
    assert torch.equal(actual_YX[192:], before_YX[192:])
    assert not torch.equal(actual_YX[128:192], before_YX[128:192])
    x_TX = torch.randn(3, 64)
    torch.testing.assert_close(attention.qkv(x_TX), x_TX @ actual_YX.T)


@pytest.mark.parametrize("architecture", ["Qwen2ForCausalLM", "Qwen3ForCausalLM"])
def test_other_families_load_with_their_biases(tmp_path: Path, architecture: str) -> None:
    quantized, plain = write("gptq", tmp_path, replace(TINY, architecture=architecture))
    expected = [Oracle(plain).greedy(prompt, TOKENS) for prompt in PROMPTS]
    assert runner(quantized).greedy(PROMPTS, TOKENS) == expected


def test_settings_of_other_files_are_read(tmp_path: Path) -> None:
    quantized, _ = write("gptq", tmp_path)
    path = quantized / "config.json"
    config = json.loads(path.read_text())
    settings = config.pop("quantization_config")
    path.write_text(json.dumps(config))
    assert read_scheme(quantized).name == "none"
    del settings["quant_method"]
    (quantized / "quantize_config.json").write_text(json.dumps(settings))
    assert read_scheme(quantized).name == "gptq"
    (quantized / "quantize_config.json").unlink()
    awq = {"w_bit": 4, "q_group_size": 32, "version": "GEMM", "zero_point": True}
    (quantized / "quant_config.json").write_text(json.dumps(awq))
    assert read_scheme(quantized).name == "awq"
    path.write_text(json.dumps({**config, "compression_config": FORMATS["w8a8"].settings}))
    assert read_scheme(quantized).name == "compressed-tensors"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"quant_method": "exl2"}, "quant_method is 'exl2'; gptq, awq, compressed-tensors, fp8"),
        ({"bits": 3}, "bits is 3; served are 4, 8"),
        ({"group_size": 48}, "group_size is 48; served are -1, 32, 64, 128"),
        ({"desc_act": 1}, "desc_act is 1; served are True, False"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'; served are gptq"),
        ({"dynamic": {"-:a": {}}}, "only checkpoints whose layers are stored alike"),
        ({"quant_method": "awq", "version": "gemv"}, "only the layout gemm is served"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, "expected two multiples of 32"),
        ({"quant_method": "compressed-tensors"}, "config_groups is None"),
    ],
)
def test_settings_that_are_not_served_are_named(changes: dict[str, Any], sentence: str) -> None:
    settings = {"quant_method": "gptq", "bits": 4, "group_size": 32, **changes}
    with pytest.raises(ConfigError, match="quantization_config") as caught:
        quant.detect({"quantization_config": settings})
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("stored", "asked", "sentence"),
    [
        ("gptq", "awq", "--quantize awq: the checkpoint is quantized already, as gptq"),
        ("gptq", "eetq", "--quantize eetq: the checkpoint is quantized already, as gptq"),
        (None, "gptq", "--quantize gptq: the checkpoint is not quantized; take one that is"),
        (None, "exl2", "--quantize exl2 is not served; take a checkpoint in the format of gptq"),
        (None, "marlin", "on load with --quantize fp8, eetq, bitsandbytes"),
    ],
)
def test_flags_that_do_not_fit_the_checkpoint_are_refused(
    stored: str | None, asked: str, sentence: str
) -> None:
    config = {} if stored is None else {"quantization_config": FORMATS[stored].settings}
    with pytest.raises(ConfigError) as caught:
        quant.detect(config, asked)
    assert sentence in str(caught.value)


def test_the_flag_may_name_what_the_checkpoint_is() -> None:
    for name, asked in [("gptq-8", "gptq"), ("awq", "awq"), ("fp8-block", "fp8")]:
        assert quant.detect({"quantization_config": FORMATS[name].settings}, asked).name == asked


@pytest.mark.parametrize("name", ["gptq", "awq", "w4a16", "fp8-block"])
def test_a_group_that_the_split_cuts_is_refused_with_the_layer(tmp_path: Path, name: str) -> None:
    quantized, _ = write(name, tmp_path, replace(TINY, mlp_width=160))

    def rank(comm: ThreadComm) -> str:
        with pytest.raises(ConfigError) as caught:
            load(quantized, comm=comm, reference=True)
        return str(caught.value)

    sentence = run_ranks(2, rank)[0]
    assert "model.layers.0.mlp." in sentence
    assert "are stored in groups of 32, and 80 of 160 a shard cut one at 80" in sentence
    assert "--num-shard" in sentence


def test_a_tensor_of_another_shape_is_named_with_what_was_expected(tmp_path: Path) -> None:
    quantized, _ = write("gptq", tmp_path)
    path = quantized / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["group_size"] = 64
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError) as caught:
        load(quantized)
    name = "model.layers.0.self_attn.q_proj.scales has shape [2, 128], expected [1, 128]"
    assert name in str(caught.value)


def test_fused_layers_that_are_stored_in_two_ways_are_refused(tmp_path: Path) -> None:
    quantized, _ = write("awq", tmp_path)
    path = quantized / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["modules_to_not_convert"] = ["k_proj"]
    path.write_text(json.dumps(config))
    with pytest.raises(ConfigError) as caught:
        load(quantized)
    assert "model.layers.0.self_attn.k_proj as 16 bits" in str(caught.value)


# How far a weight may be from what it was, in units of its largest number.
ERRORS = {"fp8": 0.04, "eetq": 0.005, "bitsandbytes": 0.005}
ERRORS |= {"bitsandbytes-nf4": 0.16, "bitsandbytes-fp4": 0.18}


@pytest.mark.parametrize("asked", ON_LOAD)
def test_sixteen_bits_are_quantized_on_load_close_to_what_they_were(
    tmp_path: Path, asked: str
) -> None:
    folder = Tiny().write(tmp_path)
    before = weights(load(folder, reference=True)[0])
    model, _ = load(folder, reference=True, quantize=asked)
    for layer, weight_YX in weights(model).items():
        error = float((weight_YX - before[layer]).abs().max() / before[layer].abs().max())
        assert error <= (0 if layer == "head" else ERRORS[asked])
        assert layer == "head" or error > 0
    assert model.weight_bytes < load(folder, reference=True)[0].weight_bytes


@pytest.mark.parametrize("asked", ON_LOAD)
def test_each_shard_quantizes_its_own_slice(tmp_path: Path, asked: str) -> None:
    folder = replace(TINY, dtype=torch.bfloat16).write(tmp_path)
    whole = weights(load(folder, reference=True)[0])

    def rank(comm: ThreadComm) -> dict[str, Tensor]:
        return weights(load(folder, comm=comm, reference=True, quantize=asked)[0])

    for number, of_rank in enumerate(run_ranks(2, rank)):
        for layer, weight_YX in of_rank.items():
            expected_YX = share(whole[layer], layer, number, 2)
            error = float((weight_YX - expected_YX).abs().max() / expected_YX.abs().max())
            assert error <= ERRORS[asked], layer


@pytest.mark.parametrize("asked", ON_LOAD)
def test_what_is_quantized_on_load_writes_the_references_tokens(tmp_path: Path, asked: str) -> None:
    folder = Tiny().write(tmp_path)
    slow = runner(folder, reference=True, quantize=asked).greedy(PROMPTS, TOKENS)
    assert runner(folder, quantize=asked).greedy(PROMPTS, TOKENS) == slow


def test_rows_of_eight_bits_are_made_before_every_layer_that_takes_them(tmp_path: Path) -> None:
    """By norms, activation and behind attention alike, as if each layer had rounded its inputs."""
    folder = Tiny().write(tmp_path)
    model, ops = load(folder, reference=True, quantize="fp8")
    coded = {**ops.coded_matmul, Kind.FP8: ReferenceRows8Matmul(torch.float32)}
    ops = replace(ops, coded_matmul=coded)
    device = CpuDevice(threads=1)
    made = load_model(
        folder,
        device=device,
        dtype=torch.float32,
        comm=SingleComm(),
        ops=ops,
        load_format="auto",
        quantize="fp8",
    )
    taken: list[bool] = []
    for layer in made.modules():
        if isinstance(layer, Linear) and layer.takes_rows8:
            layer.register_forward_pre_hook(lambda _, x: taken.append(isinstance(x[0], Rows8)))
    for layer in model.modules():
        if isinstance(layer, Linear) and layer is not model.head:
            layer.register_forward_pre_hook(lambda _, x: quantize_rows(x[0]).widened())
    logits = [
        PagedRunner(of, ops, dtype=torch.float32, blocks=8).step(
            [(PagedSequence(), PROMPT)], every=True
        )
        for of in (model, made)
    ]
    assert torch.equal(*logits)
    # Of a layer's four products, only what attention returns is rounded by the product itself.
    assert taken == [True, False, True, True] * len(made.blocks)


@pytest.mark.parametrize("name", ["gptq", "gptq-ordered", "w8a8", "fp8-block"])
def test_dummy_weights_have_the_shapes_of_the_format(tmp_path: Path, name: str) -> None:
    quantized, _ = write(name, tmp_path)
    (quantized / "model.safetensors").unlink()
    for layer, weight_YX in weights(load(quantized, load_format="dummy")[0]).items():
        assert weight_YX.isfinite().all() and float(weight_YX.abs().max()) > 0, layer
