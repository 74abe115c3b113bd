"""What decides which kernels a start launches, and the mark that all of them are compiled.

A mark that is there makes a start spend nothing; one that is wrongly there costs what a start
without any of this costs: kernels compile when they are first launched.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from headrace.config import Serve, kernel_caches
from headrace.errors import ConfigError
from headrace.quantizers import with_settings

# Keys of `config.json` that are read to build a model; nothing else can matter.
KEYS = tuple(
    """
    architectures attention_bias dtype head_dim hidden_act hidden_size intermediate_size
    layer_types max_position_embeddings max_window_layers mlp_bias num_attention_heads
    num_hidden_layers num_key_value_heads quantization_config rms_norm_eps rope_parameters
    rope_scaling rope_theta sliding_window tie_word_embeddings torch_dtype use_sliding_window
    vocab_size
    """.split()
)
PACKAGE = Path(__file__).parent.parent
# Beside Triton's own folders, whose names are hashes.
FOLDER = "headrace"


@dataclass(frozen=True)
class Wanted:
    """A start whose kernels are to be compiled."""

    model: dict[str, Any]  # of `config.json`, the keys above that are there
    capability: tuple[int, int]
    ranks: int = 1
    dtype: str = "auto"
    quantize: str = ""
    kv_dtype: str = ""
    # As the launcher resolves them for a GPU when nobody says otherwise.
    block_tokens: int = 0
    running_max: int = 512
    step_tokens_max: int = 8192
    pipeline_depth: int = 2

    @staticmethod
    def of(serve: Serve, capability: tuple[int, int]) -> Wanted:
        """What a server's configuration asks for on a GPU."""
        engine = serve.engine
        return Wanted(
            model=read_facts(serve.model.path),
            capability=capability,
            ranks=len(serve.shards),
            dtype=serve.device.dtype,
            quantize=serve.model.quantize,
            kv_dtype=serve.device.kv_dtype,
            block_tokens=engine.block_tokens,
            running_max=engine.running_max,
            step_tokens_max=engine.step_tokens_max,
            pipeline_depth=engine.pipeline_depth,
        )

    def encode(self) -> str:
        """One line."""
        return json.dumps(asdict(self), sort_keys=True)

    @staticmethod
    def decode(line: str) -> Wanted:
        """Reads what `encode` wrote."""
        values = json.loads(line)
        major, minor = values.pop("capability")
        return Wanted(capability=(major, minor), **values)

    def name(self) -> str:
        """The mark's name: equal where kernels, compiler and all of this are."""
        parts = [self.encode(), *(_version(of) for of in ("triton", "torch")), _sources()]
        parts.append(str(find_spec("flash_attn_interface") is not None))
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def read_facts(folder: Path) -> dict[str, Any]:
    """The keys of a folder's `config.json` that matter here."""
    path = folder / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} is not a JSON object")
    return facts_of(with_settings(folder, values))


def facts_of(values: dict[str, Any]) -> dict[str, Any]:
    """The keys that matter and say something."""
    return {key: values[key] for key in KEYS if values.get(key) is not None}


def is_compiled(name: str) -> bool:
    """Whether a mark lies in one of the caches in which kernels are looked for."""
    return any((cache / FOLDER / name).exists() for cache in kernel_caches())


def mark(name: str, what: str) -> None:
    """Says that all kernels are in the cache that is written to."""
    path = kernel_caches()[-1] / FOLDER / name
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_text(what + "\n", encoding="utf-8")
    temporary.replace(path)


@contextmanager
def alone(name: str) -> Iterator[None]:
    """Waits until no other process on this machine compiles the same."""
    folder = kernel_caches()[-1] / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # Given back when the process ends, however it does.
        yield


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def _sources() -> str:
    """A hash of the shard's code: it holds the kernels, and decides how they are launched."""
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        digest.update(str(path.relative_to(PACKAGE)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()
