"""What the image promises to those who run TGI's: read from the Dockerfile.

That its steps work, and what they make answers, is `make image-check`'s business.
"""

import json
import shlex
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))

from image_check import Stage, read_dockerfile  # noqa: E402

STAGES = {stage.name: stage for stage in read_dockerfile((ROOT / "Dockerfile").read_text())}
TARGETS = ("cpu", "cuda", "sagemaker")


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
    runs = [step.rest for stage in chain(target) for step in stage.steps if step.word == "RUN"]
    linked = " ".join(runs)
    for name in ("text-generation-launcher", "text-generation-server"):
        assert f"ln -s headrace /opt/headrace/bin/{name}" in linked


def test_arguments_go_to_the_server_as_they_are() -> None:
    """No shell is between, so that arguments may have spaces and signals arrive."""
    for target, program in (("cpu", "headrace"), ("cuda", "headrace"), ("sagemaker", "sagemaker")):
        assert json.loads(last(target, "ENTRYPOINT")) == [program]
