"""The manifests' probes, port and flags are those of this server."""

import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from stack import HEADRACE, Stack

MANIFEST = Path(__file__).parents[1] / "docs" / "kubernetes" / "headrace.yaml"
PROBES = ("startupProbe", "readinessProbe", "livenessProbe")


@pytest.fixture(scope="module")
def pod() -> dict[str, Any]:
    objects = {one["kind"]: one for one in yaml.safe_load_all(MANIFEST.read_text())}
    return objects["Deployment"]["spec"]["template"]["spec"]


def test_probes_are_routes_that_answer(pod: dict[str, Any], tiny_model: Path) -> None:
    (container,) = pod["containers"]
    paths = {container[probe]["httpGet"]["path"] for probe in PROBES}
    with Stack("--model-id", str(tiny_model)) as stack:
        stack.wait_ready()
        assert {path: stack.get(path)[0] for path in paths} == dict.fromkeys(paths, 200)


def test_the_port_is_the_one_that_the_server_is_told(pod: dict[str, Any]) -> None:
    (container,) = pod["containers"]
    told = {one["name"]: one.get("value") for one in container["env"]}
    (port,) = container["ports"]
    assert int(told["PORT"]) == port["containerPort"] > 1024, "pods here are nobody's root"
    assert {container[probe]["httpGet"]["port"] for probe in PROBES} == {port["name"]}


def test_a_pod_is_given_the_time_that_draining_takes(pod: dict[str, Any]) -> None:
    said = subprocess.run([HEADRACE, "--help"], capture_output=True, text=True, check=True).stdout
    at = said.index("--graceful-termination-timeout")
    default = int(said[at:].split("[default: ")[1].split("]")[0])
    assert pod["terminationGracePeriodSeconds"] > default
