"""One tiny checkpoint and one server for the tests that only read; others start their own."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from headrace.testing.tiny import Tiny
from stack import FLAGS, Stack

# Small and exact: float32, a context that a test can fill.
TINY = Tiny(config={"max_position_embeddings": 512})


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return TINY.write(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def server(tiny_model: Path) -> Iterator[Stack]:
    with Stack("--model-id", str(tiny_model), *FLAGS) as stack:
        yield stack.wait_ready()
