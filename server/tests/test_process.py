"""What the process's environment becomes before any library is loaded."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from test_config import example

from headrace.config import Serve, prepare_process


def test_compiled_kernels_are_kept_where_the_user_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = {
        "MALLOC_ARENA_MAX": "1",  # Leaves the allocator of this process alone.
        "XDG_CACHE_HOME": str(tmp_path),
    }
    monkeypatch.setattr(os, "environ", environment)
    prepare_process(Serve.parse(example()))
    assert environment["TRITON_CACHE_DIR"] == str(tmp_path / "headrace" / "triton")
    environment["TRITON_CACHE_DIR"] = "/elsewhere"
    prepare_process(Serve.parse(example()))
    assert environment["TRITON_CACHE_DIR"] == "/elsewhere"
