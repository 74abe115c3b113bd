"""Older layouts of a checkpoint to the one that shards read.

Pickled weights are read by PyTorch's restricted unpickler, which builds tensors and nothing else.
"""

import json
import os
import sys
from pathlib import Path

from headrace.hub.errors import HubError


def pickles_to_safetensors(path: Path) -> None:
    """Writes `pytorch_model*.bin` of a folder again as `model*.safetensors`, with an index.

    No code of the pickle runs. A file appears under its final name only when it is whole.

    Raises:
        HubError: the pickle holds more than tensors, or the folder cannot be written.
    """
    import torch
    from safetensors.torch import save_file

    sources = sorted(path.glob("pytorch_model*.bin")) or sorted(path.glob("*.bin"))
    if not os.access(path, os.W_OK):
        raise HubError(f"{path} holds only .bin weights and cannot be written to convert them.")
    weight_map: dict[str, str] = {}
    for number, source in enumerate(sources, 1):
        name = target_name(number, len(sources))
        print(f"Converting {source.name} to {name} ({number}/{len(sources)})", file=sys.stderr)
        try:
            state = torch.load(source, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:
            raise HubError(
                f"{source.name} could not be read as plain tensors, and code in it is never run: "
                f"{str(error).splitlines()[0]}"
            ) from error
        tensors = {
            key: value.contiguous().clone()
            for key, value in state.items()
            if isinstance(value, torch.Tensor)
        }
        partial = path / (name + ".partial")
        save_file(tensors, partial, metadata={"format": "pt"})
        partial.rename(path / name)
        weight_map |= dict.fromkeys(tensors, name)
    if len(sources) > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (path / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def target_name(number: int, total: int) -> str:
    """`model.safetensors`, or `model-00001-of-00003.safetensors` when there are several."""
    return "model.safetensors" if total == 1 else f"model-{number:05}-of-{total:05}.safetensors"


def make_tokenizer_json(path: Path, model_id: str) -> None:
    """Writes `tokenizer.json` out of an older tokenizer's files, by Transformers if it is there."""
    reason = f"`{model_id}` has no tokenizer.json"
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise HubError(
            f"{reason}; with the package `transformers` installed it can be converted."
        ) from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        tokenizer.backend_tokenizer.save(str(path / "tokenizer.json"))
    except Exception as error:
        raise HubError(
            f"{reason}, and its tokenizer could not be converted: {error}".splitlines()[0]
        ) from error
