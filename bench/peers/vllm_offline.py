#!/usr/bin/env python3
"""vLLM in process under the scenarios of `headrace bench offline`: the same lines of JSON.

    bench/peers/vllm_offline.py MODEL_DIR --json vllm.jsonl [--only decode,prefill] [--tp 2]

One engine runs all scenarios. Random token ids, greedy, the end of text ignored, no prefix cache,
no detokenizing. Meant for vLLM 0.26.
"""

import time

STARTED = time.perf_counter()  # before the imports, which are part of what a start takes

import argparse  # noqa: E402
import json  # noqa: E402
import random  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

DECODE_STEPS = 128
DECODE_ISL = 512
DECODE_BASE_RUNS = 2
PREFILL_RUNS = 3
WARM_UP = ((8, 128, 16), (64, 512, 8))
Mix = tuple[int, int, int]


def mix(text: str) -> Mix:
    """`1000x512/256`: requests, prompt tokens, new tokens."""
    requests, lengths = text.split("x")
    isl, osl = lengths.split("/")
    return int(requests), int(isl), int(osl)


def mixes(text: str) -> list[Mix]:
    return [mix(part) for part in text.split(",")]


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


class Bench:
    """An engine that is ready, and where figures go."""

    def __init__(self, args: argparse.Namespace):
        from vllm import LLM

        self.llm: Any = LLM(
            model=args.model,
            load_format=args.load_format,
            dtype=args.dtype,
            quantization=args.quantization,
            tensor_parallel_size=args.tp,
            max_model_len=args.max_model_len,
            max_num_seqs=args.max_num_seqs,
            max_num_batched_tokens=args.max_num_batched_tokens,
            gpu_memory_utilization=args.gpu_memory_utilization,
            enable_prefix_caching=False,
            skip_tokenizer_init=True,
            disable_log_stats=True,
        )
        self.max_len = args.max_model_len
        self.random = random.Random(args.seed)
        self.vocab = json.loads((Path(args.model) / "config.json").read_text())["vocab_size"]
        self.label = args.label
        self.path = args.json

    def run(self, requests: int, isl: int, osl: int) -> float:
        """Seconds until the last token of requests that are submitted together."""
        from vllm import SamplingParams

        end = min(100_000, self.vocab)
        prompts = [
            {"prompt_token_ids": [self.random.randrange(100, end) for _ in range(isl)]}
            for _ in range(requests)
        ]
        asked = SamplingParams(temperature=0, max_tokens=osl, ignore_eos=True, detokenize=False)
        start = time.perf_counter()
        answers = self.llm.generate(prompts, asked, use_tqdm=False)
        seconds = time.perf_counter() - start
        wrong = [a for a in answers if len(a.outputs[0].token_ids) != osl]
        if wrong:
            raise RuntimeError(f"{len(wrong)} of {requests} answers have not {osl} tokens")
        return seconds

    def push(self, row: dict[str, Any]) -> None:
        line = json.dumps({"m": self.label, **row})
        print(line, flush=True)
        if self.path:
            with self.path.open("a") as file:
                file.write(line + "\n")

    def decode(self, batches: list[int]) -> None:
        for batch in batches:
            base = min(self.run(batch, DECODE_ISL, 1) for _ in range(DECODE_BASE_RUNS))
            each = (self.run(batch, DECODE_ISL, DECODE_STEPS + 1) - base) / DECODE_STEPS
            row = {"what": "decode", "batch": batch, "isl": DECODE_ISL, "osl": DECODE_STEPS + 1}
            self.push(row | {"step_ms": round(each * 1e3, 3), "tok_s": round(batch / each, 1)})

    def prefill(self, lengths: list[int]) -> None:
        for isl in lengths:
            best = min(self.run(1, isl, 1) for _ in range(PREFILL_RUNS))
            row = {"what": "prefill", "isl": isl, "osl": 1, "ttft_ms": round(best * 1e3, 2)}
            self.push(row | {"tok_s": round(isl / best)})

    def offline(self, chosen: list[Mix]) -> None:
        for requests, isl, osl in chosen:
            seconds = self.run(requests, isl, osl)
            row = {"what": "offline", "n": requests, "isl": isl, "osl": osl}
            new = requests * osl
            row |= {"s": round(seconds, 2), "out_tok_s": round(new / seconds, 1)}
            self.push(row | {"total_tok_s": round((new + requests * isl) / seconds, 1)})


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model", help="checkpoint folder")
    add("--json", type=Path, help="file that lines are appended to")
    add("--label", default="vllm")
    add("--only", default="decode,prefill,offline")
    add("--batches", type=numbers, default=[1, 8, 32, 64, 128, 256])
    add("--lengths", type=numbers, default=[512, 2048, 8192, 32768])
    add("--mixes", type=mixes, default=mixes("1000x512/256,300x2048/128,512x128/512"))
    add("--tp", type=int, default=1)
    add("--dtype", default="auto")
    add("--quantization", help="fp8, made while loading")
    add("--load-format", default="auto", help="dummy: random weights, nothing is read")
    add("--max-model-len", type=int, default=40960)
    add("--max-num-seqs", type=int, default=512)
    add("--max-num-batched-tokens", type=int, help="tokens of a step [default: vLLM's]")
    add("--gpu-memory-utilization", type=float, default=0.9)
    add("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> int:
    args = arguments()
    bench = Bench(args)
    scheduling = bench.llm.llm_engine.vllm_config.scheduler_config
    budget = scheduling.max_num_batched_tokens
    bench.push({"what": "server", "step_tokens_max": budget})
    bench.push({"what": "startup", "startup_s": round(time.perf_counter() - STARTED, 2)})
    chosen = args.only.split(",")
    for requests, isl, osl in WARM_UP:
        bench.run(requests, isl, osl)
    if "decode" in chosen:
        bench.decode(args.batches)
    if "prefill" in chosen:
        bench.prefill(args.lengths)
    if "offline" in chosen:
        bench.offline(args.mixes)
    return 0


if __name__ == "__main__":
    sys.exit(main())
