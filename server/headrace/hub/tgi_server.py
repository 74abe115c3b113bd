"""`text-generation-server`: the commands of TGI's Python program that people call by hand."""

import argparse
import sys
from collections.abc import Sequence

from headrace.hub.main import main as download

NAME = "text-generation-server"
# What TGI's program knows and this one does not do, and what to do instead.
REFUSED = {
    "serve": "shards are started by text-generation-launcher",
}
EXTENSION = ".safetensors"


def main(argv: Sequence[str]) -> int:
    """Executes a command; returns the exit status, 2 for what cannot be done."""
    command, *rest = argv or ["--help"]
    if command == "download-weights":
        return _download_weights(rest)
    if command in REFUSED:
        print(f"Error: `{NAME} {command}`: {REFUSED[command]}.", file=sys.stderr)
        return 2
    if command in ("--help", "-h"):
        print(
            f"Usage: {NAME} download-weights MODEL_ID [OPTIONS]\n"
            f"       {NAME} quantize MODEL_ID OUTPUT_DIR [OPTIONS]\n\n{__doc__}"
        )
        return 0
    print(f"Error: no command `{command}`; `{NAME} --help` names them.", file=sys.stderr)
    return 2


def _download_weights(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog=f"{NAME} download-weights",
        description="Fetch a model and make it ready to be served, as `headrace download` does.",
    )
    parser.add_argument("model_id", metavar="MODEL_ID", help="Hub id or folder")
    parser.add_argument("--revision", help="branch, tag or commit")
    parser.add_argument("--extension", default=EXTENSION, help=f"only {EXTENSION} is served")
    for flag, default, text in (
        ("--auto-convert", True, "weights of pickles are converted"),
        ("--merge-lora", False, "adapters are not served yet: refused"),
        ("--trust-remote-code", False, "without effect: no code of a model is run"),
        ("--json-output", False, "without effect: the answer is one line of JSON"),
    ):
        parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=default, help=text)
    parser.add_argument("--logger-level", default="INFO", help="without effect")
    args = parser.parse_args(argv)
    for asked, what in (
        (args.extension != EXTENSION, f"--extension {args.extension}: only {EXTENSION} is served"),
        (args.merge_lora, "--merge-lora: LoRA adapters are not served yet"),
        (not args.auto_convert, "--no-auto-convert: weights of pickles are always converted"),
    ):
        if asked:
            print(f"Error: {what}.", file=sys.stderr)
            return 2
    revision = ["--revision", args.revision] if args.revision else []
    return download(["--model-id", args.model_id, *revision])
