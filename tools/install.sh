#!/usr/bin/env bash
# Builds and installs Headrace into .venv.
#
#   tools/install.sh                the server, as one wheel
#   tools/install.sh extra NAME     the packages of an optional group of pyproject.toml
#
# Each part is skipped when nothing it depends on has changed.
set -euo pipefail
cd "$(dirname "$0")/.."

VENV=.venv
PY=$VENV/bin/python
SPACE_MB_MIN=9000 # PyTorch with its CUDA libraries, the build, the default model

say() { printf '\033[1;34m==>\033[0m %s\n' "$*" >&2; }
die() {
    printf '\033[1;31merror:\033[0m %s\n' "$*" >&2
    exit 1
}

find_python() {
    local candidate
    for candidate in "${PYTHON:-}" python3 python3.12 python3.11 python3.13; do
        [ -n "$candidate" ] && command -v "$candidate" >/dev/null 2>&1 || continue
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    die "Python 3.11 or newer is needed; none was found (set PYTHON=/path/to/python)."
}

check_tools() {
    command -v cargo >/dev/null 2>&1 ||
        die "cargo is needed to build the router and the launcher; install a Rust toolchain first (rustup)."
    command -v cc >/dev/null 2>&1 || command -v gcc >/dev/null 2>&1 || command -v clang >/dev/null 2>&1 ||
        die "a C compiler is needed (cc, gcc or clang); install your distribution's build tools."
}

check_space() {
    local free
    free=$(df -Pm . | awk 'NR == 2 { print $4 }')
    [ "$free" -ge "$SPACE_MB_MIN" ] ||
        die "$free MB are free here; $SPACE_MB_MIN MB are needed (PyTorch, the build, the default model)."
}

make_venv() {
    [ -x "$PY" ] && [ -x "$VENV/bin/uv" ] && return
    check_space
    local python
    python=$(find_python)
    say "Making $VENV with $($python --version)"
    "$python" -m venv "$VENV" || die "'$python -m venv' failed; install your distribution's python3-venv."
    "$PY" -m pip install --quiet --disable-pip-version-check uv ||
        die "uv could not be installed from the package index; is there a network?"
}

uv_pip() { VIRTUAL_ENV=$PWD/$VENV "$VENV/bin/uv" pip install --constraint tools/constraints.txt "$@"; }

has_gpu() { [ -e /dev/nvidia0 ] || command -v nvidia-smi >/dev/null 2>&1; }

install_torch() {
    "$PY" -c 'import torch' 2>/dev/null && return
    say "Installing PyTorch"
    # The CPU build is a twentieth of the size; its index is not reachable everywhere.
    if ! has_gpu && timeout 300 env UV_HTTP_TIMEOUT=10 UV_HTTP_RETRIES=0 VIRTUAL_ENV="$PWD/$VENV" \
        "$VENV/bin/uv" pip install --torch-backend=cpu 'torch>=2.11' 2>"$VENV/.torch-cpu.log"; then
        return
    fi
    uv_pip 'torch>=2.11' || die "PyTorch could not be installed; is there a network, and is there space ($SPACE_MB_MIN MB)?"
}

project_dependencies() {
    "$PY" - "$@" <<'PY'
import sys
import tomllib

project = tomllib.load(open("pyproject.toml", "rb"))["project"]
group = sys.argv[1] if len(sys.argv) > 1 else None
print("\n".join(project["optional-dependencies"][group] if group else project["dependencies"]))
PY
}

install_server() {
    check_tools
    make_venv
    [ -d target ] || check_space
    install_torch
    if [ pyproject.toml -nt "$VENV/.dependencies" ]; then
        say "Installing the server's Python packages"
        project_dependencies >"$VENV/.requirements"
        uv_pip --quiet -r "$VENV/.requirements" 'maturin>=1.16,<2' || die "Python packages could not be installed; is there a network?"
        touch "$VENV/.dependencies"
    fi
    say "Building the wheel (the first build compiles the Rust dependencies: some minutes)"
    rm -rf .cache/dist
    "$VENV/bin/maturin" build --release --locked --out .cache/dist --interpreter "$PY" ||
        die "the build failed; cargo's message is above (fetching crates needs a network, building $SPACE_MB_MIN MB)."
    say "Installing the wheel"
    uv_pip --quiet --no-deps --reinstall .cache/dist/*.whl
    # FlashAttention-3 is optional: without it prompts are computed by our own kernels.
    if has_gpu; then (install_extra cuda) || say "The server works without what \`cuda\` names, more slowly."; fi
    touch "$VENV/.headrace"
    say "Done: $VENV/bin/headrace"
}

install_extra() {
    local stamp=$VENV/.extra-$1
    make_venv
    [ pyproject.toml -nt "$stamp" ] || return 0
    say "Installing what \`$1\` needs"
    project_dependencies "$1" >"$VENV/.requirements-$1"
    uv_pip --quiet -r "$VENV/.requirements-$1" || die "Python packages could not be installed; is there a network?"
    touch "$stamp"
}

case ${1:-server} in
server) install_server ;;
extra) install_extra "${2:?the group}" ;;
*) die "unknown part '$1'" ;;
esac
