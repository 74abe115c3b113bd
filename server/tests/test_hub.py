"""Hub ids, folders, pickles and the default model, each in a process and a cache of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub_stand_in import COMMIT, StandIn
from safetensors.torch import load_file, save_file

from headrace.hub import convert
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
