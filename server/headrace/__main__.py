"""`python -m headrace shard | replay | describe | download`."""

import argparse
import json
import os
import sys
from pathlib import Path

from headrace.config import Serve, prepare_process
from headrace.errors import HeadraceError


def main(argv: list[str]) -> int:
    """Dispatches a subcommand; returns the exit status."""
    if argv[:1] == ["download"]:
        from headrace import hub

        return hub.main(argv[1:])
    arguments = _parser().parse_args(argv)
    try:
        serve = Serve.load(arguments.config)
        prepare_process(serve)
        return arguments.run(serve, arguments)
    except HeadraceError as error:
        if arguments.run is _shard:
            print(json.dumps({"event": "fatal", "message": str(error)}), flush=True)
        print(f"headrace: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="headrace", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, run, text in (
        ("shard", _shard, "serve one rank on its Unix socket"),
        ("replay", _replay, "execute recorded plans again and compare the tokens"),
        ("describe", _describe, "print the facts of the model as one JSON object"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("--config", type=Path, required=True, help="serve.json")
        command.add_argument("--rank", type=int, default=0)
        command.set_defaults(run=run)
        if name == "replay":
            command.add_argument("file", type=Path, help="what --record wrote")
    commands.add_parser("download", help="fetch a model's files; see download --help")
    return parser


def _shard(serve: Serve, arguments: argparse.Namespace) -> int:
    from headrace.serve import run_shard
    from headrace.telemetry import start_logging

    listener = start_logging(serve.telemetry, arguments.rank)
    status = run_shard(serve, arguments.rank)
    listener.stop()
    sys.stdout.flush()
    # Threads of gRPC and of the device may still be at work; nothing they hold needs them.
    os._exit(status)


def _replay(serve: Serve, arguments: argparse.Namespace) -> int:
    from headrace.replay import run_replay

    return run_replay(serve, arguments.file)


def _describe(serve: Serve, arguments: argparse.Namespace) -> int:
    from headrace.load import describe

    print(json.dumps(describe(serve)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
