"""Reading checkpoints: all of it, nothing else, and only this rank's part."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from decoders import PROMPT, load, runner
from safetensors.torch import load_file, save_file
from torch import Tensor

from headrace.errors import CheckpointError, ConfigError
from headrace.models import ARCHITECTURES, read_spec
from headrace.testing.paged import PagedSequence
from headrace.testing.threads import run_ranks
from headrace.testing.tiny import Tiny
from headrace.weights import DummyReader, SafetensorsReader


def change(folder: Path, **changes: Tensor | None) -> None:
    """Rewrites the weights with tensors replaced, added, or (None) left out."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for name, value in changes.items():
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value
    save_file(tensors, file)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_missing_and_unused_tensors_are_named(tmp_path: Path, architecture: str) -> None:
    folder = Tiny(architecture).write(tmp_path)
    missing = "model.layers.1.self_attn.k_proj.weight"
    change(folder, **{missing: None, "model.layers.0.extra.weight": torch.zeros(3)})
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    assert str(caught.value) == (
        "the checkpoint does not fit its config: 1 tensors are missing "
        f"({missing}) and 1 tensors are not used (model.layers.0.extra.weight)"
    )


def test_many_missing_tensors_are_counted(tmp_path: Path) -> None:
    folder = Tiny().write(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["num_hidden_layers"] += 1
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"9 tensors are missing \(.*, and 4 more\)"):
        load(folder)


def test_biases_that_the_config_denies_are_not_dropped(tmp_path: Path) -> None:
    folder = Tiny().write(tmp_path)
    change(folder, **{"model.layers.2.mlp.up_proj.bias": torch.zeros(96)})
    with pytest.raises(CheckpointError, match=r"not used \(model.layers.2.mlp.up_proj.bias\)"):
        load(folder)


def test_a_wrong_shape_is_named_with_what_was_expected(tmp_path: Path) -> None:
    folder = Tiny().write(tmp_path)
    change(folder, **{"model.layers.0.mlp.down_proj.weight": torch.zeros(64, 95)})
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    assert str(caught.value).endswith(
        "model.layers.0.mlp.down_proj.weight has shape [64, 95], expected [64, 96]"
    )


def test_angles_and_the_copy_of_a_tied_head_may_be_there(tmp_path: Path) -> None:
    folder = Tiny(tied=True).write(tmp_path)
    expected = runner(folder).step([(PagedSequence(), PROMPT)])
    change(
        folder,
        **{
            "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8),
            "lm_head.weight": torch.full((509, 64), torch.nan),
        },
    )
    assert torch.equal(runner(folder).step([(PagedSequence(), PROMPT)]), expected)


def test_several_files_are_one_checkpoint(tmp_path: Path) -> None:
    one = runner(Tiny().write(tmp_path / "one"))
    three = runner(Tiny(shards=3).write(tmp_path / "three"))
    row = [(PagedSequence(), PROMPT)]
    assert torch.equal(one.step(row), three.step([(PagedSequence(), PROMPT)]))


def test_a_file_that_the_index_names_and_is_not_there(tmp_path: Path) -> None:
    folder = Tiny(shards=2).write(tmp_path)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002.safetensors is missing"):
        load(folder)


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    folder = Tiny().write(tmp_path)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"model.safetensors cannot be read"):
        load(folder)


def test_a_folder_without_weights_is_named(tmp_path: Path) -> None:
    folder = Tiny().write(tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"holds no \*.safetensors file"):
        load(folder)


def test_a_second_copy_of_the_weights_is_left_alone(tmp_path: Path) -> None:
    folder = Tiny().write(tmp_path)
    save_file({"tok_embeddings.weight": torch.zeros(2)}, folder / "consolidated.safetensors")
    load(folder)


class CountingReader(SafetensorsReader):
    """Counts the numbers that are read."""

    numbers = 0

    def read(self, name: str, shape: tuple[int, ...], dim: int, start: int, stop: int) -> Tensor:
        value = super().read(name, shape, dim, start, stop)
        self.numbers += value.numel()
        return value


def test_a_rank_reads_its_part_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Tiny(kv_heads=8, vocab_size=512).write(tmp_path)
    readers: list[CountingReader] = []

    def reader(path: Path) -> CountingReader:
        readers.append(CountingReader(path))
        return readers[-1]

    monkeypatch.setattr("headrace.models.SafetensorsReader", reader)
    run_ranks(4, lambda comm: load(folder, comm=comm, reference=True))
    tensors = load_file(folder / "model.safetensors")
    divided = sum(value.numel() for value in tensors.values() if value.dim() == 2)
    whole = sum(value.numel() for value in tensors.values() if value.dim() == 1)
    assert [reader.numbers for reader in readers] == [divided // 4 + whole] * 4


def test_dummy_weights_are_the_same_every_time_and_on_every_rank(tmp_path: Path) -> None:
    folder = Tiny().write(tmp_path)
    (folder / "model.safetensors").unlink()
    one = runner(folder, load_format="dummy", reference=True)
    expected = one.step([(PagedSequence(), PROMPT)])
    assert expected.isfinite().all()
    again = runner(folder, load_format="dummy", reference=True)
    assert torch.equal(again.step([(PagedSequence(), PROMPT)]), expected)

    def rank(comm: Any) -> Tensor:
        paged = runner(folder, load_format="dummy", comm=comm, reference=True)
        return paged.step([(PagedSequence(), PROMPT)])

    for logits in run_ranks(2, rank):
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


def test_dummy_tensors_differ_by_name() -> None:
    reader = DummyReader()
    a = reader.read("a.weight", (40, 30), 0, 0, 40)
    assert not torch.equal(a, reader.read("b.weight", (40, 30), 0, 0, 40))
    assert torch.equal(a[10:20], reader.read("a.weight", (40, 30), 0, 10, 20))
    assert torch.equal(a[:, 3:5], reader.read("a.weight", (40, 30), 1, 3, 5))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "architecture": (
        {"architectures": ["GPT2LMHeadModel"]},
        "architectures is 'GPT2LMHeadModel'; served are LlamaForCausalLM, MistralForCausalLM, "
        "Qwen2ForCausalLM, Qwen3ForCausalLM",
    ),
    "no architecture": ({"architectures": None}, "architectures is missing or empty"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; only 'silu' can be served"),
    "missing": ({"num_hidden_layers": None}, "num_hidden_layers is missing"),
    "text": ({"hidden_size": "64"}, "hidden_size is '64'; expected a number"),
    "zero": ({"num_attention_heads": 0}, "num_attention_heads is 0; expected a number above zero"),
    "fraction": ({"vocab_size": 10.5}, "vocab_size is 10.5; expected an integer"),
    "infinite": ({"rms_norm_eps": float("inf")}, "rms_norm_eps is inf; expected a number above"),
    "flag": ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'; expected true or"),
    "heads": ({"num_key_value_heads": 3}, "num_key_value_heads is 3; 8 heads do not divide by it"),
    "odd head": ({"head_dim": 15}, "head_dim is 15; expected an even number"),
    "rope": (
        {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}},
        "rope_parameters: rope_type is 'longrope'; default, linear, llama3 and yarn can be served",
    ),
    "old rope": (
        {"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
        "rope_scaling: rope_type is 'dynamic'; default, linear",
    ),
    "rope factor": (
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}},
        "rope_parameters: factor is missing",
    ),
    "partial rope": (
        {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        "rope_parameters.partial_rotary_factor is 0.5; only 1 can be served",
    ),
    "dtype": ({"dtype": "int8"}, "dtype is 'int8'; expected one of float32, float16, bfloat16"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_configs_that_cannot_be_served_are_refused_with_the_key(tmp_path: Path, case: str) -> None:
    config, sentence = REFUSED[case]
    folder = Tiny(config=config).write(tmp_path)
    with pytest.raises(ConfigError) as caught:
        read_spec(folder)
    assert sentence in str(caught.value)
    assert str(caught.value).startswith(str(folder / "config.json"))


def test_a_folder_without_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no config.json: is it a model\?"):
        read_spec(tmp_path)


def test_a_broken_config_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config.json cannot be read: Expecting"):
        read_spec(tmp_path)
