"""The entry point of SageMaker's image, with a program in the server's place."""

import os
import subprocess
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "tools" / "sagemaker.sh"


def start(tmp_path: Path, *flags: str, **variables: str) -> subprocess.CompletedProcess[str]:
    server = tmp_path / "headrace"
    server.write_text('#!/bin/sh\necho "$$ $HF_MODEL_ID $*"\n')
    server.chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}"} | variables
    command = f'echo $$; exec sh {SCRIPT} "$@"'
    return subprocess.run(
        ["sh", "-c", command, "sh", *flags], env=env, capture_output=True, text=True, check=False
    )


def test_the_server_takes_the_place_of_the_entry_point(tmp_path: Path) -> None:
    done = start(tmp_path, "--max-best-of", "3", HF_MODEL_ID="a/b")
    first, told = done.stdout.splitlines()
    assert told == f"{first} a/b --port 8080 --max-best-of 3"
    assert done.returncode == 0


def test_without_a_model_it_ends_with_1_and_says_why(tmp_path: Path) -> None:
    done = start(tmp_path)
    assert done.returncode == 1
    assert "HF_MODEL_ID is not set" in done.stderr
