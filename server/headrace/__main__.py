"""`python -m headrace shard | replay | describe | compile | download | quantize`."""

import argparse
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

from headrace.ahead.child import Ahead
from headrace.ahead.command import add_arguments
from headrace.ahead.command import run as compile_kernels
from headrace.config import Serve, keep_kernels, prepare_process
from headrace.errors import HeadraceError
from headrace.startup import Phases, open_driver, process_age, read_ahead


def main(argv: list[str]) -> int:
    """Dispatches a subcommand; returns the exit status."""
    own = {"download": _download, "quantize": _quantize, "tgi-server": _tgi_server}
    if argv and argv[0] in own:
        return own[argv[0]](argv[1:])
    arguments = _parser().parse_args(argv)
    try:
        if arguments.run is _compile:
            return _compile(arguments)
        serve = _configuration(arguments)
        prepare_process(serve)
        return arguments.run(serve, arguments)
    except HeadraceError as error:
        if arguments.run is _shard:
            print(json.dumps({"event": "fatal", "message": str(error)}), flush=True)
        print(f"headrace: {error}", file=sys.stderr)
        return 1


def _download(argv: list[str]) -> int:
    from headrace import hub

    return hub.main(argv)


def _tgi_server(argv: list[str]) -> int:
    from headrace.hub import tgi_server

    if argv[:1] == ["quantize"]:
        return _quantize(argv[1:], f"{tgi_server.NAME} quantize")
    return tgi_server.main(argv)


def _quantize(argv: list[str], program: str = "headrace quantize") -> int:
    from headrace import hub, quantize
    from headrace.errors import ConfigError

    def folder_of(model: str, revision: str | None) -> Path:
        try:
            return hub.resolve(model, revision).path
        except hub.HubError as error:
            raise ConfigError(str(error)) from error

    return quantize.main(argv, folder_of, program)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="headrace", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, run, text in (
        ("shard", _shard, "serve one rank on its Unix socket"),
        ("replay", _replay, "execute recorded plans again and compare the tokens"),
        ("describe", _describe, "print the facts of the model as one JSON object"),
    ):
        command = commands.add_parser(name, help=text)
        recorded = run is _replay
        source = "serve.json, instead of the recorded one" if recorded else "serve.json"
        command.add_argument("--config", type=Path, required=not recorded, help=source)
        command.set_defaults(run=run)
        if recorded:
            command.add_argument("file", type=Path, help="what --record-plans wrote")
            command.add_argument("--model", type=Path, help="folder of the model, if it has moved")
        else:
            command.add_argument("--rank", type=int, default=0)
    command = commands.add_parser("compile", help="compile a GPU's kernels before they are needed")
    add_arguments(command)
    command.set_defaults(run=_compile)
    commands.add_parser("download", help="fetch a model's files; see download --help")
    commands.add_parser("quantize", help="make a checkpoint of four bits; see quantize --help")
    return parser


def _configuration(arguments: argparse.Namespace) -> Serve:
    if arguments.run is not _replay:
        return Serve.load(arguments.config)
    from headrace.record import recorded_serve

    serve = Serve.load(arguments.config) if arguments.config else recorded_serve(arguments.file)
    model = replace(serve.model, path=arguments.model or serve.model.path)
    # One shard: rank 0's results are what was recorded.
    return replace(serve, model=model, shards=serve.shards[:1])


def _shard(serve: Serve, arguments: argparse.Namespace) -> int:
    phases = Phases(process_age())
    ahead = Ahead(serve)
    if serve.device.kind != "cpu":
        ahead.after(open_driver(serve.shard(arguments.rank).device_index, ahead.begin))
    if arguments.rank == 0 and serve.model.load_format != "dummy":
        read_ahead(serve.model.path)
    with phases("imports"):
        from headrace.serve import run_shard
        from headrace.telemetry import start_logging

    listener = start_logging(serve.telemetry, arguments.rank)
    status = run_shard(serve, arguments.rank, phases, ahead.wait)
    listener.stop()
    sys.stdout.flush()
    # Threads of gRPC and of the device may still be at work; nothing they hold needs them.
    os._exit(status)


def _compile(arguments: argparse.Namespace) -> int:
    keep_kernels()
    return compile_kernels(arguments)


def _replay(serve: Serve, arguments: argparse.Namespace) -> int:
    from headrace.replay import run_replay

    return run_replay(serve, arguments.file)


def _describe(serve: Serve, arguments: argparse.Namespace) -> int:
    from headrace.load import describe

    print(json.dumps(describe(serve)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
