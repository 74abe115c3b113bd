"""Options of the tests."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--model-path",
        default="",
        help="folder of the default model; found in the caches if it is there",
    )
