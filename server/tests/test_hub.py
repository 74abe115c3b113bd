"""Hub ids, folders, pickles and the default model, each in a process and a cache of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import gguf
import pytest
import torch
from hub_stand_in import COMMIT, StandIn
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, pre_tokenizers

from headrace.hub import convert, default_model
from headrace.hub.download import resolve
from headrace.hub.errors import HubError

SERVER = Path(__file__).parents[1]
REPO = "tests/small"


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    folder = tmp_path / "repository"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "tokenizer.json").write_text("{}")
    (folder / "README.md").write_text("not needed")
    save_file({"w": torch.arange(4.0)}, folder / "model.safetensors")
    return folder


def download(tmp_path: Path, *argv: str, **environment: str) -> tuple[int, dict[str, str], str]:
    """Runs `headrace download`: exit code, its JSON line, its stderr."""
    code = "import sys; from headrace.hub import main; sys.exit(main(sys.argv[1:]))"
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    env |= {"HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(SERVER), **environment}
    done = subprocess.run(
        [sys.executable, "-c", code, *argv], env=env, capture_output=True, text=True, check=False
    )
    assert done.stdout.count("\n") == 1, done.stdout + done.stderr
    return done.returncode, json.loads(done.stdout), done.stderr


def test_hub_model_is_fetched_without_files_nobody_reads(tmp_path: Path, repository: Path) -> None:
    with StandIn(REPO, repository) as hub:
        code, line, _ = download(tmp_path, "--model-id", REPO, HF_ENDPOINT=hub.url)
    assert code == 0
    folder = Path(line["path"])
    assert line["sha"] == COMMIT
    assert sorted(p.name for p in folder.iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]


def test_cached_model_is_served_offline_and_without_a_network(
    tmp_path: Path, repository: Path
) -> None:
    with StandIn(REPO, repository) as hub:
        url = hub.url
        download(tmp_path, "--model-id", REPO, HF_ENDPOINT=url)
    for environment in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": url}):
        code, line, _ = download(tmp_path, "--model-id", REPO, **environment)
        assert (code, line["sha"]) == (0, COMMIT)


def test_both_folders_of_tgi_s_images_are_read(tmp_path: Path, repository: Path) -> None:
    """`HF_HOME=/data`, as now, and `HUGGINGFACE_HUB_CACHE=/data`, as in older images."""
    name = "models--" + REPO.replace("/", "--")
    data = tmp_path / "data"
    for variable, folder in (("HF_HOME", data / "hub"), ("HUGGINGFACE_HUB_CACHE", data)):
        with StandIn(REPO, repository) as hub:
            environment = {"HF_ENDPOINT": hub.url, variable: str(data)}
            code, line, _ = download(tmp_path, "--model-id", REPO, **environment)
        assert (code, Path(line["path"]).parents[1]) == (0, folder / name)
        environment = {"HF_HUB_OFFLINE": "1", variable: str(data)}
        assert download(tmp_path, "--model-id", REPO, **environment)[0] == 0


def test_broken_connection_resumes_where_it_stopped(tmp_path: Path, repository: Path) -> None:
    # The Hub's client goes on at whole chunks of 10 MiB.
    save_file({"w": torch.arange(5 << 20).float()}, repository / "model.safetensors")
    with StandIn(REPO, repository) as hub:
        hub.break_after = 15 << 20
        code, line, _ = download(tmp_path, "--model-id", REPO, HF_ENDPOINT=hub.url)
    assert code == 0
    data = (repository / "model.safetensors").read_bytes()
    assert (Path(line["path"]) / "model.safetensors").read_bytes() == data
    assert hub.ranges("model.safetensors") == [None, f"bytes={10 << 20}-"]


def test_stopped_download_goes_on_with_the_files_it_lacks(tmp_path: Path, repository: Path) -> None:
    with StandIn(REPO, repository) as hub:
        _, line, _ = download(tmp_path, "--model-id", REPO, HF_ENDPOINT=hub.url)
        lost = Path(line["path"]) / "model.safetensors"
        lost.resolve().unlink()
        lost.unlink()
        hub.requests.clear()
        code, _, _ = download(tmp_path, "--model-id", REPO, HF_ENDPOINT=hub.url)
    assert code == 0
    assert lost.exists()
    assert len(hub.ranges("model.safetensors")) == 1
    assert hub.ranges("tokenizer.json") == []


@pytest.mark.parametrize(
    ("status", "error_code", "expected"),
    [
        (403, "GatedRepo", f"`{REPO}` is gated: accept its terms on the Hub, then set HF_TOKEN"),
        (404, "RepoNotFound", f"`{REPO}` was not found on the Hub"),
        (404, "RevisionNotFound", f"`{REPO}` has no revision `v9`"),
    ],
)
def test_refusals_are_one_clear_line(
    tmp_path: Path, repository: Path, status: int, error_code: str, expected: str
) -> None:
    with StandIn(REPO, repository) as hub:
        hub.status, hub.error_code = status, error_code
        argv = ["--model-id", REPO, "--revision", "v9"]
        code, line, stderr = download(tmp_path, *argv, HF_ENDPOINT=hub.url)
    assert (code, line["event"]) == (1, "fatal")
    assert line["message"].startswith(expected)
    assert "Traceback" not in stderr


@pytest.mark.parametrize(
    ("model_id", "expected"),
    [
        ("./nowhere", "The folder `./nowhere` does not exist."),
        ("a/b/c", "`a/b/c` is neither a folder on this machine nor a Hub id"),
        ("owner/name", "`owner/name` is not in the local Hub cache"),
    ],
)
def test_missing_models_are_one_clear_line(tmp_path: Path, model_id: str, expected: str) -> None:
    code, line, _ = download(tmp_path, "--model-id", model_id, HF_HUB_OFFLINE="1")
    assert code == 1
    assert line["message"].startswith(expected)


def test_folder_without_config_or_weights_is_refused(tmp_path: Path, repository: Path) -> None:
    (repository / "model.safetensors").unlink()
    _, line, _ = download(tmp_path, "--model-id", str(repository))
    assert line["message"].endswith("has neither safetensors nor .bin weights.")
    (repository / "config.json").unlink()
    _, line, _ = download(tmp_path, "--model-id", str(repository))
    assert "has no config.json" in line["message"]


def test_half_copied_checkpoint_is_refused(tmp_path: Path, repository: Path) -> None:
    index = {"weight_map": {"w": "model-00001-of-00002.safetensors"}}
    (repository / "model.safetensors.index.json").write_text(json.dumps(index))
    _, line, _ = download(tmp_path, "--model-id", str(repository))
    assert "lacks 1 of 1 weight files" in line["message"]


def test_pickled_weights_become_safetensors_and_shared_ones_stay_whole(tmp_path: Path) -> None:
    shared = torch.arange(6.0).view(2, 3)
    torch.save({"a": shared, "b": shared, "c": shared.T}, tmp_path / "pytorch_model.bin")
    convert.pickles_to_safetensors(tmp_path)
    made = load_file(tmp_path / "model.safetensors")
    assert torch.equal(made["b"], shared)
    assert torch.equal(made["c"], shared.T)


def test_code_in_a_pickle_never_runs(tmp_path: Path) -> None:
    torch.save({"a": _Explosive(tmp_path / "ran")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(HubError, match="code in it is never run"):
        convert.pickles_to_safetensors(tmp_path)
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "model.safetensors").exists()


class _Explosive:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (os.mkdir, (str(self.path),))


def test_folder_that_cannot_be_written_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    home = str(tmp_path / "file" / "home")
    code, line, stderr = download(tmp_path, HF_HUB_OFFLINE="1", HF_HOME=home)
    assert (code, line["event"]) == (1, "fatal")
    assert home in line["message"]
    assert "Traceback" not in stderr


def test_full_disk_is_refused_with_both_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(default_model, "folder", lambda: tmp_path / "model")
    monkeypatch.setattr(default_model, "SPACE_MB_MIN", 1 << 40)
    with pytest.raises(HubError, match=r"^\d+ MB are free in .*; 1099511627776 MB are needed"):
        default_model.from_package()


def test_gguf_becomes_the_checkpoint_that_it_was_made_of(tmp_path: Path) -> None:
    made = {
        "model.embed_tokens.weight": (260, 8),
        "model.norm.weight": (8,),
        "model.layers.0.input_layernorm.weight": (8,),
        "model.layers.0.post_attention_layernorm.weight": (8,),
        "model.layers.0.self_attn.q_proj.weight": (8, 8),
        "model.layers.0.self_attn.k_proj.weight": (4, 8),
        "model.layers.0.self_attn.v_proj.weight": (4, 8),
        "model.layers.0.self_attn.o_proj.weight": (8, 8),
        "model.layers.0.mlp.gate_proj.weight": (12, 8),
        "model.layers.0.mlp.up_proj.weight": (12, 8),
        "model.layers.0.mlp.down_proj.weight": (8, 12),
    }
    checkpoint = {name: torch.randn(shape).bfloat16() for name, shape in made.items()}
    target = tmp_path / "model"
    target.mkdir()
    default_model.convert_gguf(write_gguf(tmp_path / "tiny.gguf", checkpoint), target)
    found = load_file(target / "model.safetensors")
    assert found.keys() == checkpoint.keys()
    for name, weight in checkpoint.items():
        assert torch.equal(found[name], weight), name
    config = json.loads((target / "config.json").read_text())
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (2, 1)
    assert (config["vocab_size"], config["rope_theta"]) == (260, 5000.0)
    tokenizer = Tokenizer.from_file(str(target / "tokenizer.json"))
    ids = tokenizer.encode("<|im_end|>12 héllo").ids
    assert ids[0] == 1, "special tokens are one token"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<|im_end|>12 héllo"
    template = json.loads((target / "tokenizer_config.json").read_text())["chat_template"]
    assert template == "{{ messages }}"


def write_gguf(path: Path, checkpoint: dict[str, torch.Tensor]) -> Path:
    """A Llama in float32 as llama.cpp stores one: rows of q and k are in its own rope order."""
    heads = {"attn_q": 2, "attn_k": 1}
    ours = {f"model.layers.0.{name}": part for part, name in default_model.BLOCK_NAMES.items()}
    others = {name: part for part, name in default_model.OTHER_NAMES.items()}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_embedding_length(8)
    writer.add_feed_forward_length(12)
    writer.add_block_count(1)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(5000.0)
    writer.add_context_length(64)
    letters = pre_tokenizers.ByteLevel.alphabet()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(["<|im_start|>", "<|im_end|>", "<unk>", *sorted(letters), "he"])
    writer.add_token_types([3, 3, 3, *[1] * (len(letters) + 1)])
    writer.add_token_merges(["h e"])
    for name, token in {"bos": 0, "eos": 1, "unk": 2, "pad": 1}.items():
        getattr(writer, f"add_{name}_token_id")(token)
    writer.add_chat_template("{{ messages }}")
    for name, weight in checkpoint.items():
        stem = name.removesuffix(".weight")
        part = ours.get(stem)
        theirs = f"blk.0.{part}" if part else others[stem]
        stored = weight
        if part in heads:
            halves = weight.view(heads[part], 2, -1, weight.shape[-1])
            stored = halves.transpose(1, 2).reshape(weight.shape)
        writer.add_tensor(f"{theirs}.weight", stored.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_folder_without_weights_serves_who_wants_none(repository: Path) -> None:
    (repository / "model.safetensors").unlink()
    assert resolve(str(repository), weights=False).path == repository
    with pytest.raises(HubError, match="neither safetensors nor"):
        resolve(str(repository))
