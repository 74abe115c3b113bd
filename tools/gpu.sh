#!/usr/bin/env bash
# `make gpu`: everything that is tested on a CUDA device, in under ten minutes, and a table of it.
#
#   tools/gpu.sh [PART...]     kernels models memcheck racecheck [default: all of them]
#
#   kernels    server/tests/test_triton_*.py, one process a file, side by side
#   models     every other test marked `gpu`, those of the whole server included
#   memcheck   compute-sanitizer over small shapes of the kernels' tests: bad accesses
#   racecheck  the same: races in shared memory
#
# PYTHON is any Python that has PyTorch and pytest [.venv's if there is one, else python3], HEADRACE
# the binary for the tests of the whole server [beside that Python]. LOGS names a folder that keeps
# the output of every part. A sanitizer that the driver refuses to run is told and fails nothing.
set -uo pipefail
cd "$(dirname "$0")/.."

LIMIT_S=570 # of all parts together
KERNELS_S=300
MODELS_S=240
SANITIZER_S=170
# Small shapes of every kernel: a sanitizer makes them a hundred times slower.
SANITIZED=${SANITIZED:-"norms or gated or rotation or decode_inputs or best_token or best_tokens or rows_of_all_lengths or rows_of_many_tokens or a_product_is"}
# What a sanitizer says when it cannot work on this machine.
REFUSALS='Device not supported|Unable to (attach|find|load)|Failed to (initialize|attach)|Internal Sanitizer Error|Insufficient|initialization failed|Target application terminated before first instrumented'
SANITIZER_STATUS=86

if [ -z "${PYTHON:-}" ]; then
    PYTHON=python3
    [ -x .venv/bin/python ] && PYTHON=$PWD/.venv/bin/python
fi
PYTHON=$(command -v "$PYTHON") || { echo "gpu.sh: no Python" >&2 && exit 2; }
export HEADRACE=${HEADRACE:-$(dirname "$PYTHON")/headrace}
export PYTHONPATH=$PWD/server${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
temporary=$(mktemp -d)
trap 'rm -rf "$temporary"' EXIT
LOGS=${LOGS:-$temporary/logs}
mkdir -p "$LOGS"
rows=()
failed=0

# The binary looks for Python beside itself and in an activated environment.
if [ ! -e "$(dirname "$HEADRACE")/python3" ]; then
    mkdir -p "$temporary/env/bin"
    printf '#!/bin/sh\nexec "%s" "$@"\n' "$PYTHON" >"$temporary/env/bin/python3"
    chmod +x "$temporary/env/bin/python3"
    export VIRTUAL_ENV=$temporary/env
fi

left() { # seconds: at most $1, at least 1
    local rest=$((LIMIT_S - SECONDS))
    echo $((rest < 1 ? 1 : rest < $1 ? rest : $1))
}

# The last line of pytest's that counts: "12 passed, 1 skipped in 3.21s".
counts() { grep -aE '(passed|failed|error|skipped|deselected|no tests ran).* in [0-9.]+' "$1" | tail -n 1 | sed -E 's/ in [0-9.]+s.*//; s/=+ ?//g'; }

row() { # part, status of the command, log, seconds
    local verdict note
    note=$(counts "$3")
    case $2 in
    0) verdict=passed ;;
    5) verdict='nothing ran' ;;
    124) verdict='out of time' ;;
    *) verdict=FAILED ;;
    esac
    case $verdict in passed | 'nothing ran') ;; *) failed=1 ;; esac
    rows+=("| $1 | $verdict | ${note:--} | $4 |")
}

run_kernels() {
    local files=(server/tests/test_triton_*.py) file log status began=$SECONDS
    local -A pids
    for file in "${files[@]}"; do
        log=$LOGS/$(basename "$file" .py).log
        timeout -k 5 "$(left $KERNELS_S)" "$PYTHON" -m pytest "$file" -rs >"$log" 2>&1 &
        pids[$file]=$!
    done
    for file in "${files[@]}"; do
        log=$LOGS/$(basename "$file" .py).log
        wait "${pids[$file]}"
        status=$?
        row "$(basename "$file")" $status "$log" $((SECONDS - began))
        [ $status = 0 ] || tail -n 30 "$log"
    done
}

run_models() {
    local status began=$SECONDS log=$LOGS/models.log paths=(server/tests)
    if [ -x "$HEADRACE" ]; then
        paths+=(integration-tests)
    else
        rows+=("| the whole server | left out | there is no $HEADRACE | - |")
    fi
    timeout -k 5 "$(left $MODELS_S)" "$PYTHON" -m pytest "${paths[@]}" -m gpu -rs \
        --ignore-glob='*/test_triton_*' >"$log" 2>&1
    status=$?
    row "models and server" $status "$log" $((SECONDS - began))
    [ $status = 0 ] || tail -n 40 "$log"
}

# Runs one tool; its verdict is written to a file, since both tools run side by side.
sanitize() {
    local tool=$1 status began=$SECONDS log=$LOGS/$1.log errors what
    if ! command -v compute-sanitizer >/dev/null; then
        echo "| $tool | left out | compute-sanitizer is not installed | - |" >"$temporary/$tool.row"
        return
    fi
    # The caching allocator would hide what lies outside a tensor and inside its block.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout -k 5 "$(left $SANITIZER_S)" \
        compute-sanitizer --tool "$tool" --error-exitcode $SANITIZER_STATUS --target-processes all \
        "$PYTHON" -m pytest server/tests/test_triton_*.py -m 'not gpu' -k "$SANITIZED" -v >"$log" 2>&1
    status=$?
    errors=$(grep -aoE '(ERROR|RACECHECK) SUMMARY: .*' "$log" | tail -n 1)
    what="$(counts "$log"); ${errors:-no summary}"
    if grep -aqE "$REFUSALS" "$log"; then
        what="refused: $(grep -aE -m 1 "$REFUSALS" "$log" | sed 's/^=* *//; s/|/\//g')"
    elif [ $status = 124 ]; then
        # What ran was clean unless something was found.
        what="out of time after $(grep -ac PASSED "$log") tests; $(grep -acE '^=+ *(Invalid|Error: |ERROR: |Race)' "$log") findings"
        grep -aqE '^=+ *(Invalid|Error: Race|ERROR: Race|Race)' "$log" && touch "$temporary/$tool.failed"
    elif [ $status != 0 ]; then
        touch "$temporary/$tool.failed"
    fi
    local verdict=clean
    case $what in refused*) verdict=refused ;; out*) verdict=partly ;; esac
    [ -e "$temporary/$tool.failed" ] && verdict=FAILED
    echo "| $tool | $verdict | $what | $((SECONDS - began)) |" >"$temporary/$tool.row"
}

run_sanitizers() { # tools
    local tool
    for tool in "$@"; do sanitize "$tool" & done
    wait
    for tool in "$@"; do
        rows+=("$(cat "$temporary/$tool.row")")
        if [ -e "$temporary/$tool.failed" ]; then
            failed=1
            grep -aE -A 12 -m 3 '^=+ *(Invalid|Error: |ERROR: |Race)' "$LOGS/$tool.log" | head -n 40
        fi
    done
}

[ $# -gt 0 ] || set -- kernels models memcheck racecheck
sanitizers=()
for part in "$@"; do
    case $part in
    kernels) run_kernels ;;
    models) run_models ;;
    memcheck | racecheck) sanitizers+=("$part") ;;
    -h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0" && exit ;;
    *) echo "gpu.sh: no part $part" >&2 && exit 2 ;;
    esac
done
[ ${#sanitizers[@]} = 0 ] || run_sanitizers "${sanitizers[@]}"

echo
"$PYTHON" - <<'PYTHON'
import torch

name = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"
print(f"{name}, PyTorch {torch.__version__}")
PYTHON
printf '%s\n' '| part | result | tests | seconds |' '|---|---|---|---|' "${rows[@]}"
exit $failed
