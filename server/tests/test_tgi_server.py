"""`text-generation-server`, as it is called in Dockerfiles and init containers."""

import json
from pathlib import Path

import pytest

from headrace.__main__ import main
from headrace.testing.tiny import Tiny


def run(*argv: str) -> int:
    return main(["tgi-server", *argv])


def test_weights_are_downloaded_and_the_folder_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Tiny().write(tmp_path)
    flags = ("--auto-convert", "--no-merge-lora", "--logger-level", "DEBUG", "--json-output")
    assert run("download-weights", str(folder), "--extension", ".safetensors", *flags) == 0
    assert json.loads(capsys.readouterr().out)["path"] == str(folder)


@pytest.mark.parametrize(
    ("argv", "what"),
    [
        (("download-weights", "m", "--extension", ".bin"), "--extension .bin"),
        (("download-weights", "m", "--merge-lora"), "LoRA"),
        (("download-weights", "m", "--no-auto-convert"), "--no-auto-convert"),
        (("serve", "m"), "text-generation-launcher"),
        (("sreve",), "no command `sreve`"),
    ],
)
def test_what_cannot_be_done_is_refused(
    argv: tuple[str, ...], what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*argv) == 2
    assert what in capsys.readouterr().err


def test_help_names_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == run() == 0
    assert "download-weights MODEL_ID" in capsys.readouterr().out
