#!/usr/bin/env bash
# `make test-clients`: other people's programs against the whole server, each in an environment
# of its own under .cache/clients, made again when its pinned list changes.
#
#   tools/test_clients.sh                all of them, but for those whose packages are large
#   tools/test_clients.sh lm-eval        lm-eval alone: 0.5 GB, some minutes
set -euo pipefail
cd "$(dirname "$0")/.."

PY=.venv/bin/python
UV=.venv/bin/uv

step() { printf '\033[1;34m==>\033[0m %s\n' "$*"; }
die() {
    printf '\033[1;31merror:\033[0m %s\n' "$*" >&2
    exit 1
}

[ -x .venv/bin/headrace ] && [ -x "$UV" ] || die "the server is not installed; run \`make install\` first."

prepare() {
    local list=$1 folder
    folder=.cache/clients/$(basename "$list" .txt)
    # The stamp is the list itself: a changed pin and another Python both make a new environment.
    if [ -x "$folder/bin/python" ] && cmp -s "$list" "$folder/.installed"; then
        return
    fi
    step "Installing the clients of $list"
    rm -rf "$folder"
    "$UV" venv --quiet --python "$PY" "$folder" || die "$folder could not be made."
    VIRTUAL_ENV=$PWD/$folder "$UV" pip install --quiet -r "$list" ||
        die "the packages of $list could not be installed; is there a network?"
    cp "$list" "$folder/.installed"
}

prepare_node() {
    local from=integration-tests/clients/node folder=.cache/clients/node
    if ! command -v npm >/dev/null; then
        step "npm is not installed: Node's clients are left out"
        return
    fi
    if ! cmp -s "$from/package-lock.json" "$folder/.installed"; then
        step "Installing the clients of $from/package.json"
        rm -rf "$folder"
        mkdir -p "$folder"
        cp "$from"/package*.json "$folder"
        npm ci --silent --no-audit --no-fund --prefix "$folder" ||
            die "the packages of $from could not be installed; is there a network?"
        cp "$from/package-lock.json" "$folder/.installed"
    fi
    cp "$from"/*.mjs "$folder"
}

if [ "${1:-}" = lm-eval ]; then
    shift
    prepare integration-tests/clients/large/lmeval.txt
    step "lm-eval, whose figures are to be those of PyTorch"
    "$PY" -m pytest integration-tests/test_lm_eval.py -m clients -rs "$@"
    step "lm-eval: everything passed"
    exit
fi
for program in chromium-headless-shell prometheus; do
    command -v "$program" >/dev/null ||
        step "$program is not installed: its tests are left out (Debian has a package of that name)"
done
for list in integration-tests/clients/*.txt; do prepare "$list"; done
prepare_node
step "Other people's programs: the clients of TGI, of the Hub and of OpenAI, and schemathesis"
"$PY" -m pytest integration-tests/test_clients.py -m clients "$@"
step "A browser on the page, and a Prometheus on the metrics"
"$PY" -m pytest integration-tests/test_page.py integration-tests/test_monitoring.py -m clients -rs "$@"
step "test-clients: everything passed"
