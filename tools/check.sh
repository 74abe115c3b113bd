#!/usr/bin/env bash
# `make check`: formatters in check mode, the style's teeth, lints, types. Changes nothing.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON_PATHS=(server integration-tests bench tools)

step() { printf '\033[1;34m==>\033[0m %s\n' "$*"; }

step "rustfmt"
cargo fmt --all --check
step "ruff"
.venv/bin/ruff format --check --quiet "${PYTHON_PATHS[@]}"
.venv/bin/ruff check --quiet "${PYTHON_PATHS[@]}"
step "tidy"
.venv/bin/python tools/tidy.py
step "types"
.venv/bin/basedpyright
step "clippy"
cargo clippy --release --locked --workspace --all-targets --quiet -- -D warnings
step "check: everything is in order"
