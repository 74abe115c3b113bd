"""Reading a checkpoint layer by layer, and writing it again as AutoGPTQ does, a file a layer."""

# Y outputs · X inputs · G groups of inputs

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from headrace.errors import ConfigError
from headrace.quantize.gptq import BITS, Options, Quantized
from headrace.weights.checkpoint import INDEX, Stored, read_headers

_WORD = 32 // BITS
PROGRESS = "quantize_progress.json"
# What belongs to weights, and is made anew.
_NOT_COPIED = (".safetensors", ".bin", ".gguf", ".pt", ".pth")


class Source:
    """The checkpoint that is quantized."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._stored: dict[str, Stored] = read_headers(folder)

    def names(self, prefix: str) -> list[str]:
        """Returns the tensors of a layer."""
        return [name for name in self._stored if name.startswith(prefix)]

    def others(self, prefix: str) -> list[str]:
        """Returns the tensors of no layer."""
        return [name for name in self._stored if not name.startswith(prefix)]

    def read(self, name: str) -> Tensor:
        """Returns a tensor as it is stored."""
        with safe_open(self._stored[name].path, framework="pt", device="cpu") as file:
            return file.get_tensor(name)


class Target:
    """The folder that the quantized checkpoint is written to; what is there already is kept."""

    def __init__(self, folder: Path, layers: int, settings: dict[str, Any]) -> None:
        """
        Args:
            settings: all that the result depends on; another's folder is a ConfigError.
        """
        self.folder = folder
        self._files = layers + 1
        folder.mkdir(parents=True, exist_ok=True)
        progress = folder / PROGRESS
        if progress.is_file():
            before = json.loads(progress.read_text(encoding="utf-8"))
            changed = sorted(key for key in settings if before.get(key) != settings[key])
            if changed:
                raise ConfigError(
                    f"{folder} holds a part of another run, with another {', '.join(changed)}: "
                    "give another folder, or remove it"
                )
        elif any(folder.iterdir()):
            raise ConfigError(f"{folder} is not empty, and no run of this command was cut short")
        progress.write_text(json.dumps(settings), encoding="utf-8")

    def file(self, number: int) -> Path:
        """Returns the file of a layer; the last one has what belongs to none."""
        return self.folder / f"model-{number + 1:05}-of-{self._files:05}.safetensors"

    def save(self, number: int, tensors: dict[str, Tensor]) -> None:
        """Writes a file, which appears when it is whole."""
        path = self.file(number)
        partial = path.with_suffix(".partial")
        here = {name: value.cpu().contiguous() for name, value in tensors.items()}
        save_file(here, partial, metadata={"format": "pt"})
        partial.rename(path)

    def load(self, number: int) -> dict[str, Tensor] | None:
        """Returns a file's tensors, if an earlier run wrote it."""
        path = self.file(number)
        return load_file(path) if path.is_file() else None

    def finish(self, source: Source, options: Options) -> None:
        """Writes the index and the settings, and copies whatever else a model's folder has."""
        weight_map: dict[str, str] = {}
        size = 0
        for number in range(self._files):
            path = self.file(number)
            with safe_open(path, framework="pt", device="cpu") as file:
                weight_map |= dict.fromkeys(file.keys(), path.name)
            size += path.stat().st_size
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
        _write(self.folder / INDEX, index)
        settings = settings_of(options)
        _write(self.folder / "quantize_config.json", settings)
        for path in source.folder.iterdir():
            if path.is_file() and path.suffix not in _NOT_COPIED and path.name != INDEX:
                shutil.copyfile(path, self.folder / path.name)
        config = json.loads((source.folder / "config.json").read_text(encoding="utf-8"))
        config["quantization_config"] = {"quant_method": "gptq", **settings}
        _write(self.folder / "config.json", config)
        (self.folder / PROGRESS).unlink()


def settings_of(options: Options) -> dict[str, Any]:
    """Returns what AutoGPTQ's `quantize_config.json` says."""
    return {
        "bits": BITS,
        "group_size": options.group,
        "damp_percent": options.damp,
        "desc_act": options.act_order,
        "static_groups": False,
        "sym": options.symmetric,
        "true_sequential": True,
        "checkpoint_format": "gptq",
    }


def packed(layer: Quantized) -> dict[str, Tensor]:
    """Returns what a layer is stored as, by leaf; zero points minus one."""
    return {
        "qweight": _words(layer.codes_YX.T.long(), 0),
        "qzeros": _words(layer.zeros_YG.T.long() - 1, 1),
        "scales": layer.scales_YG.T.half(),
        "g_idx": layer.group_of_X.to(torch.int32),
    }


def unpacked(tensors: dict[str, Tensor]) -> Quantized:
    """Returns the layer that `packed` stored."""
    return Quantized(
        _codes(tensors["qweight"], 0).T.to(torch.uint8),
        tensors["scales"].float().T,
        _codes(tensors["qzeros"], 1).T.float() + 1,
        tensors["g_idx"].long(),
    )


def _words(codes: Tensor, dim: int) -> Tensor:
    parts = codes.unflatten(dim, (-1, _WORD))
    shape = [1] * parts.dim()
    shape[dim + 1] = _WORD
    shifts = torch.arange(0, 32, BITS, device=codes.device).view(shape)
    # Two's complement of the 32 bits.
    words = (parts << shifts).sum(dim + 1)
    return (words - ((words >> 31) << 32)).to(torch.int32)


def _codes(words: Tensor, dim: int) -> Tensor:
    shape = [1] * (words.dim() + 1)
    shape[dim + 1] = _WORD
    shifts = torch.arange(0, 32, BITS, device=words.device).view(shape)
    return (words.long().unsqueeze(dim + 1) >> shifts & 15).flatten(dim, dim + 1)


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
