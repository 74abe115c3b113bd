"""What the image promises to those who run TGI's: read from the Dockerfile.

That its steps work, and what they make answers, is `make image-check`'s business.
"""

import json
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from stack import HEADRACE

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))

from image_check import Stage, read_dockerfile  # noqa: E402

STAGES = {stage.name: stage for stage in read_dockerfile((ROOT / "Dockerfile").read_text())}
TARGETS = ("cpu", "cuda", "sagemaker")
PROGRAMS = ("launcher", "server", "router", "benchmark")


def chain(name: str) -> list[Stage]:
    """The stages that an image is made of, the lowest first."""
    stage = STAGES.get(name)
    return [*chain(stage.base), stage] if stage else []


def last(name: str, word: str) -> str:
    steps = [step.rest for stage in chain(name) for step in stage.steps if step.word == word]
    return steps[-1]


@pytest.mark.parametrize("target", TARGETS)
def test_variables_and_folder_are_tgi_s(target: str) -> None:
    steps = [step for stage in chain(target) for step in stage.steps]
    pairs = [pair for step in steps if step.word == "ENV" for pair in shlex.split(step.rest)]
    variables = dict(pair.split("=", 1) for pair in pairs)
    assert (variables["PORT"], variables["HF_HOME"]) == ("80", "/data")
    assert last(target, "WORKDIR") == "/usr/src"
    assert not {step.word for step in steps} & {
        *("EXPOSE", "HEALTHCHECK", "STOPSIGNAL", "USER", "VOLUME", "CMD")
    }


@pytest.mark.parametrize("target", TARGETS)
def test_programs_go_by_tgi_s_names(target: str) -> None:
    """The wheel brings them, into the folder that is searched first."""
    runs = [step.rest for stage in chain(target) for step in stage.steps if step.word == "RUN"]
    assert any("uv pip install" in run and "/wheels/*.whl" in run for run in runs)
    steps = [step.rest for stage in chain(target) for step in stage.steps if step.word == "ENV"]
    assert any("PATH=/opt/headrace/bin:$PATH" in step for step in steps)
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["maturin"]
    scripts = {path.name for path in (ROOT / wheel["data"] / "scripts").iterdir()}
    assert scripts == {f"text-generation-{name}" for name in PROGRAMS}


@pytest.mark.parametrize(
    ("name", "arguments", "told"),
    [
        ("launcher", ["--help"], "--model-id"),
        ("server", ["--help"], "download-weights MODEL_ID"),
        ("router", ["print-schema"], '"openapi":"3.1'),
        ("benchmark", ["--help"], "--tokenizer-name"),
    ],
)
def test_an_installed_wheel_has_the_programs(
    name: str, arguments: list[str], told: str, tmp_path: Path
) -> None:
    program = HEADRACE.with_name(f"text-generation-{name}")
    linked = tmp_path / "linked"
    linked.symlink_to(program)
    for path in (program, linked):
        done = subprocess.run([str(path), *arguments], capture_output=True, text=True, check=True)
        assert told in done.stdout


def test_arguments_go_to_the_server_as_they_are() -> None:
    """No shell is between, so that arguments may have spaces and signals arrive."""
    for target, program in (("cpu", "headrace"), ("cuda", "headrace"), ("sagemaker", "sagemaker")):
        assert json.loads(last(target, "ENTRYPOINT")) == [program]
