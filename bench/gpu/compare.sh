#!/usr/bin/env bash
# Headrace and vLLM under one load on one machine with a GPU, each alone in turn, part by part:
# a part appends lines of JSON to a file in the output folder, so that parts may run in calls of
# their own.
#
#   bench/gpu/compare.sh --model DIR --out DIR [OPTIONS] PART...
#
# Parts
#   ours-offline   decode steps, prefill, throughput without HTTP    -> ours.jsonl
#   vllm-offline   the same                                          -> vllm.jsonl
#   ours-http      our server under `headrace bench http`            -> ours.jsonl
#   vllm-http      vLLM's server under the same client               -> vllm.jsonl
#   vllm-own       vLLM's server under its own `bench serve`         -> vllm-own-C.json
#   table          ours ÷ vLLM, of what there is so far              -> table.md
#   clean          removes the figures of earlier runs
# vllm-http and vllm-own named together share one server.
#
# Options
#   --vllm DIR        folder where vLLM and its needs are unpacked [default: it is installed]
#   --gpus N          GPUs that both split the model over [1]
#   --only LIST       offline: decode,prefill,offline [all]
#   --batches LIST    offline: batches of decode
#   --lengths LIST    offline: prompts of prefill
#   --mixes LIST      offline: mixes such as 1000x512/256
#   --levels LIST     HTTP: clients at one time [1,16,64,256]
#   --context N       tokens of a sequence at most, on both sides [40960]
#   --tokens N        offline: tokens of a step, on both sides [16384, vLLM's own]
#   --dummy           random weights in memory: the model's folder needs none
#   --precision P     bf16, fp8 or int4: vLLM makes fp8 while it loads; chooses the targets [bf16]
#   --python PROGRAM  [python3]
#   --flags "..."     more flags of headrace
#   --vllm-flags "..."  more flags of vLLM's server
#
# `headrace` must be on PATH and its Python package importable (HEADRACE names another binary).
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)

RUNNING=512 # sequences at one time, on both sides
OUR_PORT=8124
VLLM_PORT=8123
# Tokens of a step offline: what vLLM takes for a model in process on a GPU of 70 GiB or more. Both
# servers take 8,192.
TOKENS=16384
READY_S=900 # a server that does not answer within this time failed

headrace=${HEADRACE:-headrace}
python=python3
model='' out='' site='' gpus=1 only='' levels=1,16,64,256 dummy=0 precision=bf16 context=40960 tokens='' flags='' vllm_flags=''
scenarios=() parts=() server='' dummy_flags=() fp8_flags=()

die() {
    echo "compare.sh: $*" >&2
    exit 2
}

while [ $# -gt 0 ]; do
    case $1 in
    --model) model=$2 && shift ;;
    --out) out=$2 && shift ;;
    --vllm) site=$2 && shift ;;
    --gpus) gpus=$2 && shift ;;
    --only) only=$2 && shift ;;
    --batches | --lengths | --mixes) scenarios+=("$1" "$2") && shift ;;
    --levels) levels=$2 && shift ;;
    --tokens) tokens=$2 && shift ;;
    --dummy) dummy=1 ;;
    --precision) precision=$2 && shift ;;
    --context) context=$2 && shift ;;
    --python) python=$2 && shift ;;
    --flags) flags=$2 && shift ;;
    --vllm-flags) vllm_flags=$2 && shift ;;
    -h | --help) sed -n '2,/^set -e/{/^set -e/d;s/^# \{0,1\}//;p}' "$0" && exit ;;
    ours-offline | vllm-offline | ours-http | vllm-http | vllm-own | table | clean) parts+=("$1") ;;
    *) die "unknown part or option $1" ;;
    esac
    shift
done
[ -n "$out" ] || die "--out is needed"
[ ${#parts[@]} -gt 0 ] || die "name at least one part"
mkdir -p "$out"
[ -n "$only" ] && scenarios+=(--only "$only")

stop_server() {
    [ -n "$server" ] || return 0
    kill "$server" 2>/dev/null || true
    wait "$server" 2>/dev/null || true
    server=''
}
trap stop_server EXIT

# vLLM with its own packages first, offline, without what phones home or compiles for long. An
# array and no function: the id of a process in the background must be Python's own.
vllm=(env ${site:+PYTHONPATH="$site"} HF_HUB_OFFLINE=1 VLLM_USE_FLASHINFER_SAMPLER=0
    VLLM_NO_USAGE_STATS=1 VLLM_LOGGING_LEVEL="${VLLM_LOGGING_LEVEL:-WARNING}" "$python")
[ $dummy = 1 ] && dummy_flags=(--load-format dummy)
[ "$precision" = fp8 ] && fp8_flags=(--quantization fp8)

# Flags that both of our parts take.
our_flags() {
    echo --model-id "$model" --num-shard "$gpus" --max-total-tokens "$context" \
        --max-running "$RUNNING" --prefix-caching false "${dummy_flags[@]}" $flags
}

# Waits for the server's /health and notes how many seconds it took: since, file, label, port.
wait_ready() {
    "$python" - "$1" "$3" "$4" "$server" "$READY_S" >>"$2" <<'PYTHON' || die "$3 did not start; see $out/$3-server.log"
import json, os, sys, time, urllib.error, urllib.request

since, label, port, pid, patience = sys.argv[1:]
while True:
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).read()
        break
    except (urllib.error.URLError, OSError):
        os.kill(int(pid), 0)
        if time.time() - float(since) > float(patience):
            sys.exit(1)
        time.sleep(0.05)
print(json.dumps({"m": label, "what": "http_startup", "startup_s": round(time.time() - float(since), 2)}))
PYTHON
}

load() { # label, port, name of the model
    "$headrace" bench http --url "http://127.0.0.1:$2" --model "$3" --tokenizer "$model" \
        --concurrency "$levels" --label "$1" --json "$out/$1.jsonl"
}

ours_offline() {
    # shellcheck disable=SC2046 # the flags are words
    "$headrace" bench offline $(our_flags) --max-batch-prefill-tokens "${tokens:-$TOKENS}" \
        --label ours --json "$out/ours.jsonl" "${scenarios[@]}" \
        2>"$out/ours-offline.log" || { tail -n 20 "$out/ours-offline.log" >&2 && return 1; }
}

vllm_offline() {
    "${vllm[@]}" "$here/peers/vllm_offline.py" "$model" --json "$out/vllm.jsonl" --tp "$gpus" \
        --max-model-len "$context" --max-num-seqs "$RUNNING" ${tokens:+--max-num-batched-tokens "$tokens"} "${scenarios[@]}" \
        "${dummy_flags[@]}" "${fp8_flags[@]}" \
        2>"$out/vllm-offline.log" | tee -a "$out/vllm-offline.log" | grep --line-buffered '^{' ||
        { tail -n 20 "$out/vllm-offline.log" >&2 && return 1; }
}

ours_http() {
    local since status=0
    since=$(date +%s.%N)
    # shellcheck disable=SC2046
    "$headrace" $(our_flags) --hostname 127.0.0.1 --port $OUR_PORT --max-concurrent-requests 1024 \
        --log-level warn >"$out/ours-server.log" 2>&1 &
    server=$!
    wait_ready "$since" "$out/ours.jsonl" ours $OUR_PORT
    load ours $OUR_PORT tgi || status=1
    stop_server
    return $status
}

start_vllm() {
    local since
    [ -z "$server" ] || return 0
    since=$(date +%s.%N)
    "${vllm[@]}" -m vllm.entrypoints.cli.main serve "$model" --served-model-name m --host 127.0.0.1 \
        --port $VLLM_PORT --max-model-len "$context" --max-num-seqs $RUNNING \
        --gpu-memory-utilization 0.9 --tensor-parallel-size "$gpus" --no-enable-prefix-caching \
        "${dummy_flags[@]}" "${fp8_flags[@]}" $vllm_flags \
        >"$out/vllm-server.log" 2>&1 &
    server=$!
    wait_ready "$since" "$out/vllm.jsonl" vllm $VLLM_PORT
}

vllm_http() {
    start_vllm
    load vllm $VLLM_PORT m
}

vllm_own() {
    local level count status=0
    start_vllm
    for level in ${levels//,/ }; do
        count=$((4 * level < 8 ? 8 : 4 * level > 1024 ? 1024 : 4 * level))
        "${vllm[@]}" -m vllm.entrypoints.cli.main bench serve --backend openai --model m --tokenizer "$model" \
            --port $VLLM_PORT --dataset-name random --random-input-len 512 --random-output-len 256 \
            --ignore-eos --temperature 0 --num-prompts $count --max-concurrency "$level" \
            --percentile-metrics ttft,itl --metric-percentiles 50,99 --save-result \
            --result-dir "$out" --result-filename "vllm-own-$level.json" >"$out/vllm-own-$level.log" 2>&1 ||
            status=1
        grep -E "Output token throughput|TTFT|ITL" "$out/vllm-own-$level.log" | sed "s/^/$level: /"
    done
    return $status
}

table() {
    "$python" "$here/compare.py" --ours "$out/ours.jsonl" --theirs "$out/vllm.jsonl" \
        --precision "$precision" --gpus "$gpus" | tee "$out/table.md"
}

failed=0
for part in "${parts[@]}"; do
    case $part in
    vllm-http | vllm-own) ;;
    *) stop_server ;;
    esac
    case $part in clean | table) ;; *) [ -n "$model" ] || die "--model is needed for $part" ;; esac
    echo "== $part ($(date +%T))" >&2
    case $part in
    ours-offline) ours_offline || failed=1 ;;
    vllm-offline) vllm_offline || failed=1 ;;
    ours-http) ours_http || failed=1 ;;
    vllm-http) vllm_http || failed=1 ;;
    vllm-own) vllm_own || failed=1 ;;
    table) table || failed=1 ;;
    clean) rm -f "$out"/ours*.jsonl "$out"/vllm*.json* "$out"/*.log "$out/table.md" ;;
    esac
done
exit $failed
