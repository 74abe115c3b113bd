#!/usr/bin/env python3
"""Writes a checkpoint of random weights in the shape of a published model, for speed tests.

    bench/random_checkpoint.py llama-3.1-8b OUT_DIR            16 GB, half a minute
    bench/random_checkpoint.py llama-3-70b OUT_DIR --no-weights  for --load-format dummy
    bench/random_checkpoint.py llama-3-70b OUT_DIR --no-weights --gptq   of four bits, for the same
    bench/random_checkpoint.py llama-3.1-8b OUT_DIR --layers 2

The folder is in the Hub's layout: config.json, safetensors in shards with their index, and a
tokenizer whose vocabulary has a text for every id, so that any server can load it and detokenize
whatever the model draws. Needs PyTorch and nothing else; weights are made on the GPU if there is
one. Weights are normal with a deviation of 0.02, norms are one: activations stay finite.
"""

import argparse
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import torch

LLAMA_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LLAMA_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": LLAMA_ROPE,
    "max_position_embeddings": 131072,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
}
SMOLLM2_135M = LLAMA_8B | {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "vocab_size": 49152,
    "rope_theta": 100000.0,
    "rope_scaling": None,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
GPTQ = {
    "quant_method": "gptq",
    "bits": 4,
    "group_size": 128,
    "sym": True,
    "desc_act": False,
    # vLLM asks the stored tensors what is quantized, unless this says it.
    "modules_in_block_to_quantize": [
        ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        ["self_attn.o_proj"],
        ["mlp.gate_proj", "mlp.up_proj"],
        ["mlp.down_proj"],
    ],
}
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": LLAMA_8B,
    "llama-3-70b": LLAMA_8B
    | {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
    },
    "llama-3.2-1b": LLAMA_8B
    | {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "head_dim": 64,
        "rope_scaling": LLAMA_ROPE | {"factor": 32.0},
        "tie_word_embeddings": True,
    },
    "smollm2-135m": SMOLLM2_135M,
    "tiny": SMOLLM2_135M
    | {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    | {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 2048},
}
DEVIATION = 0.02
# A shard is closed when it has this many bytes.
SHARD_BYTES = 1 << 30
DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
# Ids at the end of the vocabulary that are special; the first two begin and end a text.
SPECIALS = 256
BEGIN, END = "<|begin_of_text|>", "<|end_of_text|>"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def tensors(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a Llama checkpoint's tensors, layer by layer."""
    width, mlp, vocab = (config[k] for k in ("hidden_size", "intermediate_size", "vocab_size"))
    query = config["num_attention_heads"] * config["head_dim"]
    key = config["num_key_value_heads"] * config["head_dim"]
    yield "model.embed_tokens.weight", (vocab, width)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for name, shape in (
            ("self_attn.q_proj", (query, width)),
            ("self_attn.k_proj", (key, width)),
            ("self_attn.v_proj", (key, width)),
            ("self_attn.o_proj", (width, query)),
            ("mlp.gate_proj", (mlp, width)),
            ("mlp.up_proj", (mlp, width)),
            ("mlp.down_proj", (width, mlp)),
            ("input_layernorm", (width,)),
            ("post_attention_layernorm", (width,)),
        ):
            yield f"{prefix}{name}.weight", shape
    yield "model.norm.weight", (width,)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", (vocab, width)


def bytes_of(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return torch.Size(shape).numel() * dtype.itemsize


def shards(config: dict[str, Any], dtype: torch.dtype) -> list[list[tuple[str, tuple[int, ...]]]]:
    """The tensors in groups of about `SHARD_BYTES`."""
    groups: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    size = 0
    for name, shape in tensors(config):
        if size >= SHARD_BYTES:
            groups.append([])
            size = 0
        groups[-1].append((name, shape))
        size += bytes_of(shape, dtype)
    return groups


def write_shard(
    path: Path, group: list[tuple[str, tuple[int, ...]]], dtype: torch.dtype, seed: int
) -> None:
    """One safetensors file: the length of a JSON header in 8 bytes, the header, the data."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape in group:
        end = at + bytes_of(shape, dtype)
        kind = DTYPES[str(dtype).removeprefix("torch.")]
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device=device).manual_seed(seed)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in group:
            values = torch.empty(shape, dtype=dtype, device=device)
            if name.endswith("norm.weight"):
                values.fill_(1.0)
            else:
                values.normal_(0.0, DEVIATION, generator=generator)
            file.write(values.cpu().view(-1).view(torch.uint8).numpy().data)


def write_weights(folder: Path, config: dict[str, Any], seed: int, threads: int) -> int:
    """All shards, several at a time, and their index. Returns the bytes of the weights."""
    dtype = getattr(torch, config["torch_dtype"])
    groups = shards(config, dtype)
    names = [f"model-{n + 1:05}-of-{len(groups):05}.safetensors" for n in range(len(groups))]
    done, lock = 0, threading.Lock()

    def write(n: int) -> None:
        nonlocal done
        write_shard(folder / names[n], groups[n], dtype, seed * len(groups) + n)
        with lock:
            done += 1
            print(f"\r{done} of {len(groups)} shards", end="", file=sys.stderr, flush=True)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(write, range(len(groups))))
    print(file=sys.stderr)
    total = sum(bytes_of(shape, dtype) for group in groups for _, shape in group)
    places = {name: file for file, group in zip(names, groups, strict=True) for name, _ in group}
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def byte_letters() -> list[str]:
    """The printable character that byte-level vocabularies write for each byte."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(others)) for b in range(256)]


def pieces(count: int) -> list[tuple[str, str]]:
    """`count` merges of a byte-pair encoding in the order in which they apply: syllables, then
    words of up to four syllables, alone and after a space. Every word with a space is a token that
    its own text is encoded to: its prefixes merge first.
    """
    space = byte_letters()[0x20]
    syllables = [a + b for a, b in product("bcdfghjklmnpqrstvwxz", "aeiou")]
    merges = [(s[0], s[1]) for s in syllables] + [(space, s) for s in syllables]
    words = [space + s for s in syllables]
    for _ in range(3):
        longer = [(word, s) for word, s in product(words, syllables)]
        merges += longer[: count - len(merges)]
        words = [a + b for a, b in longer]
        if len(merges) >= count:
            break
    return merges[:count]


def tokenizer(vocab_size: int) -> tuple[dict[str, Any], int]:
    """`tokenizer.json` of a byte-level BPE with exactly so many ids, and the id that begins a
    text; the next one ends it.
    """
    specials = min(SPECIALS, max(2, vocab_size // 100))
    regular = vocab_size - specials
    merges = pieces(regular - 256)
    tokens = byte_letters() + [a + b for a, b in merges]
    names = [BEGIN, END] + [f"<|reserved_{n}|>" for n in range(specials - 2)]
    added = [
        {"id": regular + n, "content": name, "single_word": False, "lstrip": False}
        | {"rstrip": False, "normalized": False, "special": True}
        for n, name in enumerate(names)
    ]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    level |= {"use_regex": True}
    begin = {"SpecialToken": {"id": BEGIN, "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    whole = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [begin, first],
            "pair": [begin, first, begin, second],
            "special_tokens": {BEGIN: {"id": BEGIN, "ids": [regular], "tokens": [BEGIN]}},
        },
        "decoder": level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: n for n, token in enumerate(tokens)},
            "merges": [list(pair) for pair in merges],
        },
    }
    return whole, regular


def write_texts(folder: Path, config: dict[str, Any]) -> None:
    """Everything but the weights."""
    whole, begin = tokenizer(config["vocab_size"])
    ends = {"bos_token_id": begin, "eos_token_id": begin + 1}
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BEGIN,
        "eos_token": END,
        "clean_up_tokenization_spaces": False,
        "model_max_length": config["max_position_embeddings"],
        "chat_template": CHAT_TEMPLATE,
    }
    files = {
        "config.json": config | ends,
        "generation_config.json": ends,
        "tokenizer.json": whole,
        "tokenizer_config.json": about,
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("shape", choices=sorted(SHAPES))
    add("folder", type=Path)
    add("--layers", type=int, help="another number of layers")
    add("--dtype", choices=sorted(DTYPES), default="bfloat16")
    add("--no-weights", action="store_true", help="only configuration and tokenizer")
    add("--gptq", action="store_true", help="four bits in groups of 128, with --no-weights")
    add("--seed", type=int, default=0)
    add("--threads", type=int, default=min(8, os.cpu_count() or 1), help="shards at one time")
    args = parser.parse_args()
    if args.gptq and not args.no_weights:
        parser.error("--gptq needs --no-weights: no weights are quantized here")
    config = SHAPES[args.shape] | {"torch_dtype": args.dtype, "use_cache": True}
    if args.layers:
        config["num_hidden_layers"] = args.layers
    if args.gptq:
        config["quantization_config"] = GPTQ
    started = time.perf_counter()
    args.folder.mkdir(parents=True, exist_ok=True)
    write_texts(args.folder, config)
    total = 0
    if not args.no_weights:
        total = write_weights(args.folder, config, args.seed, args.threads)
    seconds = time.perf_counter() - started
    print(f"{args.folder}: {args.shape}, {total / 1e9:.2f} GB in {seconds:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
