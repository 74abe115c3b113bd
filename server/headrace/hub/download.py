"""Hub ids and folders to a folder that can be served. Interrupted downloads resume."""

import json
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from headrace.hub import convert, default_model
from headrace.hub.errors import HubError

# What a server reads; everything else of a repository stays where it is.
FILES = ("*.json", "*.jinja", "tokenizer.model", "*.tiktoken")
SAFETENSORS = "*.safetensors"
PICKLES = "*.bin"
CONNECT_SECONDS_MAX = 2.0
# Weights in other layouts, beside the ones we read.
UNUSED = ("original/*", "onnx/*", "openvino/*", "*/*.bin", "training_args.bin", "optimizer.bin")


@dataclass(frozen=True)
class ModelFolder:
    """A folder with `config.json`, `tokenizer.json` and safetensors, and its commit if known."""

    path: Path
    sha: str | None


def resolve(model_id: str, revision: str | None = None, weights: bool = True) -> ModelFolder:
    """Makes a folder ready to be served out of a Hub id or a local folder.

    Args:
        weights: whether a local folder must hold any.

    Raises:
        HubError: one sentence for the user: what is missing and what would help.
    """
    if is_folder(model_id):
        path = Path(model_id).expanduser().resolve()
        return ModelFolder(complete(path, model_id, weights), None)
    if "\\" in model_id or model_id.count("/") > 1 or not model_id.strip("/"):
        raise HubError(
            f"`{model_id}` is neither a folder on this machine nor a Hub id (owner/name)."
        )
    if model_id == default_model.DEFAULT_MODEL_ID and revision is None:
        return resolve_default(model_id)
    return hub_folder(snapshot(model_id, revision), model_id)


def resolve_default(model_id: str) -> ModelFolder:
    """The default model from the Hub cache, an earlier conversion, the Hub or the package."""
    try:
        return hub_folder(cached_snapshot(model_id, None), model_id)
    except HubError:
        pass
    if (made := default_model.already_made()) is not None:
        return ModelFolder(made, None)
    if hub_reachable():
        return hub_folder(snapshot(model_id, None), model_id)
    return ModelFolder(default_model.from_package(), None)


def hub_folder(path: Path, model_id: str) -> ModelFolder:
    """A snapshot of the Hub cache, checked; its folder is named after the commit."""
    return ModelFolder(complete(path, model_id), path.name if is_commit(path.name) else None)


def hub_reachable() -> bool:
    """Whether a connection to the Hub opens within two seconds (assumed behind a proxy).

    Asked first, because the Hub's client retries for half a minute before it says no.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    endpoint = urlsplit(constants.ENDPOINT)
    if getproxies().get(endpoint.scheme):
        return True
    port = endpoint.port or (80 if endpoint.scheme == "http" else 443)
    try:
        with socket.create_connection((endpoint.hostname or "", port), CONNECT_SECONDS_MAX):
            return True
    except OSError:
        return False


def is_folder(model_id: str) -> bool:
    """Whether a model id means a folder: one that exists, or one that can be nothing else."""
    if Path(model_id).expanduser().is_dir():
        return True
    if model_id.startswith(("/", "./", "../", "~")):
        raise HubError(f"The folder `{model_id}` does not exist.")
    return False


def is_commit(name: str) -> bool:
    return len(name) == 40 and all(c in "0123456789abcdef" for c in name)


def snapshot(model_id: str, revision: str | None) -> Path:
    """The Hub snapshot of a model, from the cache or downloaded (huggingface_hub resumes files)."""
    from huggingface_hub import HfApi, constants, snapshot_download

    if constants.HF_HUB_OFFLINE:
        return cached_snapshot(model_id, revision)
    if not hub_reachable():
        try:
            return cached_snapshot(model_id, revision)
        except HubError as error:
            raise HubError(
                f"`{model_id}` is not in the local Hub cache, and the Hub ({constants.ENDPOINT}) "
                "could not be reached."
            ) from error
    try:
        files = HfApi().list_repo_files(model_id, revision=revision)
        weights = SAFETENSORS if any(f.endswith(".safetensors") for f in files) else PICKLES
        return Path(snapshot_download(model_id, **wanted(revision, weights)))
    except Exception as error:  # every failure of the Hub's client ends as one sentence
        reason = explain(error, model_id, revision)
        if reason.retry_from_cache:
            try:
                return cached_snapshot(model_id, revision)
            except HubError:
                pass
        raise HubError(reason.message) from error


def wanted(revision: str | None, weights: str) -> dict[str, Any]:
    """Which files of which revision: asked of the Hub and of its cache in the same words."""
    return {
        "revision": revision,
        "allow_patterns": [*FILES, weights],
        "ignore_patterns": list(UNUSED),
    }


def cached_snapshot(model_id: str, revision: str | None) -> Path:
    """The snapshot in the local Hub cache, without the network."""
    from huggingface_hub import snapshot_download

    def find(weights: str) -> Path:
        return Path(snapshot_download(model_id, local_files_only=True, **wanted(revision, weights)))

    try:
        path = find(SAFETENSORS)
        return path if any(path.glob(SAFETENSORS)) else find(PICKLES)
    except Exception as error:
        at = f" at revision `{revision}`" if revision else ""
        raise HubError(
            f"`{model_id}`{at} is not in the local Hub cache, and HF_HUB_OFFLINE forbids "
            "fetching it."
        ) from error


@dataclass(frozen=True)
class Reason:
    """Why the Hub gave nothing, and whether an earlier download may still serve."""

    message: str
    retry_from_cache: bool


def explain(error: Exception, model_id: str, revision: str | None) -> Reason:
    """One sentence for a failure of the Hub's client."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return Reason(
            f"`{model_id}` is gated: accept its terms on the Hub, then set HF_TOKEN to a token of "
            "that account.",
            False,
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return Reason(
            f"`{model_id}` was not found on the Hub (a private model needs HF_TOKEN).", False
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return Reason(f"`{model_id}` has no revision `{revision}`.", False)
    if isinstance(error, errors.HFValidationError):
        return Reason(f"`{model_id}` is neither a folder on this machine nor a Hub id.", False)
    if isinstance(error, OSError) and getattr(error, "errno", None) == 28:
        return Reason(f"No space is left on the disk to download `{model_id}`.", False)
    detail = str(error).strip().splitlines() or [type(error).__name__]
    return Reason(f"The Hub could not be reached for `{model_id}`: {detail[0]}", True)


def complete(path: Path, model_id: str, weights: bool = True) -> Path:
    """Checks a folder for what a server needs; converts pickled weights if there are no others."""
    if not (path / "config.json").is_file():
        raise HubError(f"`{model_id}` has no config.json; is it a Transformers model?")
    if any(path.glob(SAFETENSORS)):
        check_shards(path, model_id)
    elif weights:
        if not any(path.glob(PICKLES)):
            raise HubError(f"`{model_id}` has neither safetensors nor .bin weights.")
        convert.pickles_to_safetensors(path)
    if not (path / "tokenizer.json").is_file():
        convert.make_tokenizer_json(path, model_id)
    return path


def check_shards(path: Path, model_id: str) -> None:
    """Every file that the index names must be there (an interrupted copy is not a model)."""
    index = path / "model.safetensors.index.json"
    if not index.is_file():
        return
    named = set(json.loads(index.read_text())["weight_map"].values())
    missing = sorted(name for name in named if not (path / name).exists())
    if missing:
        raise HubError(
            f"`{model_id}` lacks {len(missing)} of {len(named)} weight files, first {missing[0]}."
        )
