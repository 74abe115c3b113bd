#!/usr/bin/env bash
# `make test`: everything that needs no GPU and no programs of other people.
set -euo pipefail
cd "$(dirname "$0")/.."

step() { printf '\033[1;34m==>\033[0m %s\n' "$*"; }

step "The default model"
.venv/bin/headrace download >/dev/null ||
    echo "    not to be had here: the tests that need a real model will say that they skip"
step "Rust: unit tests, scenarios, properties, seeded mutations"
cargo test --release --locked --workspace --quiet
step "Python: operations, models, executor, invariance"
.venv/bin/python -m pytest server/tests -n 2 --dist loadfile -rs -m "not gpu and not clients" "$@"
step "The whole server"
.venv/bin/python -m pytest integration-tests -rs -m "not gpu and not clients" "$@"
step "test: everything passed"
