#!/usr/bin/env python3
"""The style's teeth: fails on what breaks the architecture, prints what is merely large.

tools/tidy.py            check; exit 1 with one line a finding
tools/tidy.py --sizes    lines of code a folder, longest functions and files, duplication
"""

import ast
import json
import re
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "server" / "headrace"

# Which of our crates a crate may name. Everything else is an arrow that must not exist.
RUST_ARROWS = {
    "headrace": {"headrace-bench", "headrace-config", "headrace-launcher", "headrace-router"},
    "headrace-bench": {
        "headrace-config", "headrace-engine", "headrace-launcher", "headrace-router",
        "headrace-text",
    },
    "headrace-ceiling": {"headrace-config", "headrace-core", "headrace-router", "headrace-wire"},
    "headrace-config": set(),
    "headrace-core": set(),
    "headrace-engine": {"headrace-core", "headrace-grammar", "headrace-wire"},
    "headrace-grammar": set(),
    "headrace-launcher": {"headrace-config"},
    "headrace-otlp": set(),
    "headrace-router": {
        "headrace-config", "headrace-engine", "headrace-grammar", "headrace-otlp",
        "headrace-text",
    },
    "headrace-text": set(),
    "headrace-wire": {"headrace-core"},
}  # fmt: skip
# What the pure core may be built of.
CORE_DEPENDENCIES = {"thiserror", "rustc-hash"}
LICENSES = {
    "0BSD", "Apache-2.0", "Apache-2.0 WITH LLVM-exception", "BSD-2-Clause", "BSD-3-Clause",
    "BSL-1.0", "CC0-1.0", "ISC", "MIT", "MIT-0", "MPL-2.0", "Unicode-3.0", "Unlicense", "Zlib",
}  # fmt: skip
# Words that may stand only in these files of server/headrace (prefixes of paths).
PYTHON_ONLY_IN = {
    r"\btorch\.cuda\b": ("device/cuda", "graphs.py", "ops/", "quantize/"),
    r"\bos\.environ\b|\bos\.getenv\b": ("config.py", "__main__.py"),
    r"\.item\(\)|\.tolist\(\)": (
        # slots, sampler and telemetry: columns of a plan, which are numpy on the host already.
        "batch.py", "executor.py", "hub/", "replay.py", "sampler.py", "slots.py", "telemetry.py",
        "tracing.py",
        "quant/", "quantize/", "testing/", "wire.py", "weights/",
    ),
}  # fmt: skip
RUST_FUNCTION_LINES, PYTHON_FUNCTION_LINES, FILE_LINES = 80, 60, 500


def tracked(*suffixes: str) -> list[Path]:
    """Files of the repository with these endings, tracked or new."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    paths = (ROOT / name for name in sorted(set(names.splitlines())))
    return [p for p in paths if p.suffix in suffixes and p.is_file()]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def rust_arrows() -> Iterator[str]:
    for manifest in tracked(".toml"):
        if manifest.name != "Cargo.toml" or manifest.parent == ROOT:
            continue
        crate = tomllib.loads(manifest.read_text())
        name = crate["package"]["name"]
        if name not in RUST_ARROWS:
            yield f"{name_of(manifest)}: crate {name} has no entry in RUST_ARROWS"
            continue
        wanted = set(crate.get("dependencies", {}))
        ours = {d for d in wanted if d.startswith("headrace")}
        for extra in sorted(ours - RUST_ARROWS[name]):
            yield f"{name_of(manifest)}: {name} must not depend on {extra}"
        if name == "headrace-core":
            for extra in sorted(wanted - CORE_DEPENDENCIES):
                yield f"{name_of(manifest)}: the core must not depend on {extra}"


def forbidden_words() -> Iterator[str]:
    for path in tracked(".py"):
        if not path.is_relative_to(PACKAGE):
            continue
        inside = str(path.relative_to(PACKAGE))
        for number, line in enumerate(path.read_text().splitlines(), 1):
            for pattern, allowed in PYTHON_ONLY_IN.items():
                slow_twin = inside.endswith("reference.py")
                if re.search(pattern, line) and not inside.startswith(allowed) and not slow_twin:
                    yield f"{name_of(path)}:{number}: {line.strip()} (only in {', '.join(allowed)})"


def generated_code() -> Iterator[str]:
    for path in tracked(".py", ".rs", ".so", ".whl"):
        if re.search(r"_pb2(_grpc)?\.py$|\.so$|\.whl$", path.name) or "@generated" in first(path):
            yield f"{name_of(path)}: generated files are not committed"


def first(path: Path) -> str:
    return path.read_text(errors="replace")[:200] if path.suffix in {".py", ".rs"} else ""


def ops_and_models() -> Iterator[str]:
    tests = "\n".join(p.read_text() for p in (ROOT / "server" / "tests").glob("*.py"))
    for folder in sorted(p for p in (PACKAGE / "ops").iterdir() if (p / "__init__.py").is_file()):
        if not (folder / "reference.py").is_file() and "reference twin:" not in "".join(
            p.read_text() for p in folder.glob("*.py")
        ):
            yield f"{name_of(folder)}: an operation needs its reference.py"
        if folder.name not in tests:
            yield f"{name_of(folder)}: no test names this operation"
    for checklist in (ROOT / "docs").glob("add-*.md"):
        for path in re.findall(r"`([\w./-]+\.(?:py|rs|md|proto|toml|cpp))`", checklist.read_text()):
            if "<" not in path and not (ROOT / path).exists():
                yield f"{name_of(checklist)}: {path} does not exist"


def private_words() -> Iterator[str]:
    """Absolute paths of a machine, and relative ones that leave the repository."""
    places = re.compile(r"(?<![\w.:/-])/(?:home|mnt|root|work|Users)/\w")
    for path in tracked(".py", ".rs", ".md", ".toml", ".sh", ".cpp", ".h", ".proto", ".txt"):
        if path == Path(__file__).resolve():
            continue
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
            beyond = (
                not (path.parent / relative).resolve().is_relative_to(ROOT)
                for relative in re.findall(r"(?:\.\./)+[\w./-]+", line)
            )
            if places.search(line) or any(beyond):
                yield f"{name_of(path)}:{number}: names a place outside the repository"


def cargo_metadata() -> Iterator[str]:
    """Licences of every crate in the lock file."""
    command = ["cargo", "metadata", "--format-version", "1", "--locked", "--offline"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        yield f"cargo metadata: {done.stderr.strip().splitlines()[-1]}"
        return
    for package in json.loads(done.stdout)["packages"]:
        license_ = (package.get("license") or "").replace("/", " OR ")
        choices = [c.strip("() ") for c in re.split(r"\bOR\b", license_)]
        if not any(set(re.split(r"\s+AND\s+", c)) <= LICENSES for c in choices):
            yield f"{package['name']} {package['version']}: licence {license_ or 'unknown'!r}"


def functions(path: Path) -> Iterator[tuple[int, str]]:
    """Length in lines and name of each function of a file."""
    text = path.read_text()
    if path.suffix == ".py":
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield (node.end_lineno or node.lineno) - node.lineno + 1, node.name
        return
    lines = text.splitlines()
    for number, line in enumerate(lines):
        found = re.match(r"(\s*)(?:pub(?:\([a-z ]+\))? )?(?:const |async )*fn (\w+)", line)
        head = next(
            (text for text in lines[number:] if text.rstrip().endswith(("{", "}", ";"))), ""
        )
        if found and not head.rstrip().endswith(";"):
            close = found[1] + "}"
            ends = (n for n in range(number, len(lines)) if lines[n] == close)
            yield next(ends, number) - number + 1, found[2]


def is_test(path: Path) -> bool:
    return bool({"tests", "integration-tests", "benches"} & set(path.parts)) or path.stem == "tests"


def print_sizes() -> None:
    code = [p for p in tracked(".rs", ".py", ".cpp", ".h", ".proto", ".sh") if p.is_file()]
    by_folder: Counter[str] = Counter()
    for path in code:
        parts = path.relative_to(ROOT).parts
        depth = 2 if parts[0] in {"router", "launcher", "server"} else 1
        kind = " (tests)" if is_test(path) else ""
        by_folder["/".join(parts[:depth][: len(parts) - 1]) + kind] += len(
            path.read_text().splitlines()
        )
    print("lines a folder")
    for folder, count in sorted(by_folder.items()):
        print(f"  {count:6}  {folder}")
    for suffix, budget in ((".rs", RUST_FUNCTION_LINES), (".py", PYTHON_FUNCTION_LINES)):
        found = sorted(
            (size, name, name_of(p))
            for p in code
            if p.suffix == suffix and not is_test(p)
            for size, name in functions(p)
        )
        if found:
            p99 = found[min(len(found) - 1, int(len(found) * 0.99))][0]
            print(f"{suffix} functions: {len(found)}, p99 {p99} lines, budget {budget}")
            for size, name, where in reversed(found[-3:]):
                print(f"  {size:6}  {name}  {where}")
    print("longest files")
    sizes = sorted(((len(p.read_text().splitlines()), name_of(p)) for p in code), reverse=True)
    for size, where in sizes[:5]:
        print(f"  {size:6}  {where}{'  (over budget)' if size > FILE_LINES else ''}")
    print(f"duplication, runs of ten lines: {duplication(code):.1f} %")


def duplication(code: list[Path], run: int = 10) -> float:
    """Share of code lines inside a run of `run` or more that stands elsewhere too."""
    files: list[list[str]] = []
    for path in code:
        if is_test(path) or path.suffix not in {".rs", ".py", ".cpp"}:
            continue
        lines = (" ".join(line.split()) for line in path.read_text().splitlines())
        skip = ("#", "//", "use ", "import ", "from ", "*")
        files.append([line for line in lines if len(line) > 2 and not line.startswith(skip)])
    windows: Counter[tuple[str, ...]] = Counter(
        tuple(lines[i : i + run]) for lines in files for i in range(len(lines) - run + 1)
    )
    total = repeated = 0
    for lines in files:
        marked = [False] * len(lines)
        for i in range(len(lines) - run + 1):
            if windows[tuple(lines[i : i + run])] > 1:
                marked[i : i + run] = [True] * run
        total, repeated = total + len(lines), repeated + sum(marked)
    return 100 * repeated / max(1, total)


def main() -> int:
    if "--sizes" in sys.argv:
        print_sizes()
        return 0
    checks = (
        rust_arrows, forbidden_words, generated_code, ops_and_models, private_words, cargo_metadata,
    )  # fmt: skip
    findings = [finding for check in checks for finding in check()]
    print("\n".join(findings) if findings else f"tidy: {len(checks)} checks, nothing found")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
