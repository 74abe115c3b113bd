"""Who may import whom: lower layers know nothing of higher ones."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "headrace"

# What each part of the package may import of the others. What is absent may not exist.
ARROWS: dict[str, set[str]] = {
    "errors": set(),
    "quantizers": {"errors"},
    "config": {"errors"},
    "device": {"errors", "memory"},
    "native": set(),
    "comm": {"device", "errors"},
    "ops": {"device", "errors", "native"},
    "quant": {"ops", "errors"},
    "weights": {"quant", "device", "errors"},
    "layers": {"quant", "ops", "comm", "device", "errors"},
    "models": {
        "layers",
        "weights",
        "quant",
        "quantizers",
        "ops",
        "comm",
        "native",
        "startup",
        "errors",
    },
    "kv": {"memory", "errors"},
    "memory": {"errors"},
    "startup": set(),
    "ahead": {
        "models",
        "ops",
        "comm",
        "device",
        "engine",
        "prepare",
        "load",
        "config",
        "quantizers",
        "errors",
    },
    "hub": {"errors"},
    "quantize": {"models", "layers", "weights", "errors"},
}
# May import whatever it tests: nothing that is served imports it (KNOWN_BY).
FREE = {"testing"}
# Only these may know them; `errors` is everybody's.
KNOWN_BY: dict[str, set[str]] = {
    "testing": set(),
    "serve": {"__main__"},
    "wire": {
        "serve",
        "executor",
        "runner",
        "batch",
        "warm",
        "slots",
        "sampler",
        "masks",
        "replay",
        "telemetry",
        "tracing",
    },
    "hub": {"__main__"},
    "quantize": {"__main__"},
    "ahead": {"__main__"},
}
SOURCES = sorted(PACKAGE.rglob("*.py"))


def part_of(file: Path) -> str:
    return file.relative_to(PACKAGE).with_suffix("").parts[0]


def imports(file: Path) -> Iterator[str]:
    """Yields the dotted names that a file imports, wherever in it that is."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports are absolute"
            module = node.module or ""
            # `from headrace import ops` names a part as well.
            alone = module == "headrace"
            yield from (f"{module}.{alias.name}" for alias in node.names) if alone else (module,)


def parts(file: Path) -> set[str]:
    """Returns the other parts of the package that a file imports."""
    named = {name.split(".")[1] for name in imports(file) if name.startswith("headrace.")}
    return named - {part_of(file)}


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_lower_never_imports_higher(file: Path) -> None:
    part = part_of(file)
    used = parts(file)
    if part in ARROWS:
        assert used <= ARROWS[part], f"{part} may not import {sorted(used - ARROWS[part])}"
    for other in used & KNOWN_BY.keys() if part not in FREE else ():
        assert part in KNOWN_BY[other], f"{part} may not import {other}"


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_what_nobody_may_import_and_what_only_some_may(file: Path) -> None:
    roots = {name.split(".")[0] for name in imports(file)}
    part = part_of(file)
    assert "tokenizers" not in roots or part in ("hub", "quantize", "testing"), (
        "the shard has no tokenizer"
    )
    assert "transformers" not in roots or part in ("hub", "testing"), "the shard needs no model zoo"
    # Of tracing: what an exporter's TLS is made of.
    assert not roots & {"grpc", "google"} or part in ("serve", "wire", "__main__", "tracing")


@pytest.mark.parametrize(
    "file", sorted((PACKAGE / "models").glob("*.py")), ids=lambda file: file.name
)
def test_models_never_mention_ranks_or_devices_of_their_own(file: Path) -> None:
    if file.name == "__init__.py":
        return  # The way in takes both as values and hands them down.
    names = {
        node.attr if isinstance(node, ast.Attribute) else node.id
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute | ast.Name)
    }
    assert not names & {"rank", "comm", "device", "world_size"}
