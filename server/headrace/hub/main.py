"""`headrace download`: progress on stderr, one JSON line on stdout."""

import argparse
import json
import os
import sys
import threading
from collections.abc import Sequence

from headrace.hub.default_model import DEFAULT_MODEL_ID
from headrace.hub.download import resolve
from headrace.hub.errors import HubError


def main(argv: Sequence[str]) -> int:
    """Makes the model's folder and says where it is; returns the exit code.

    The line is `{"event": "model", "id", "path", "sha"}` or `{"event": "fatal", "message"}`.
    """
    parser = argparse.ArgumentParser(
        prog="headrace download", description="Fetch a model and make it ready to be served."
    )
    parser.add_argument(
        "--model-id",
        default=DEFAULT_MODEL_ID,
        help=f"Hub id or folder (default {DEFAULT_MODEL_ID})",
    )
    parser.add_argument("--revision", default=None, help="branch, tag or commit")
    parser.add_argument(
        "--no-weights", action="store_true", help="a local folder need not hold any weights"
    )
    # Given by the launcher, which reports errors itself: stdin ends when it is gone.
    parser.add_argument("--lifeline", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.lifeline:
        threading.Thread(target=_watch_lifeline, name="lifeline", daemon=True).start()
    try:
        model = resolve(args.model_id, args.revision, not args.no_weights)
    except (HubError, OSError) as error:
        # A disk that is full or cannot be written is the user's to know, not a fault of ours.
        message = str(error) if isinstance(error, HubError) else f"`{args.model_id}`: {error}"
        print(json.dumps({"event": "fatal", "message": message}), flush=True)
        if not args.lifeline:
            print(f"error: {message}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    line = {"event": "model", "id": args.model_id, "path": str(model.path), "sha": model.sha}
    print(json.dumps(line), flush=True)
    return 0


def _watch_lifeline() -> None:
    """Exits when stdin ends. What was downloaded so far is resumed next time."""
    while os.read(0, 4096):
        pass
    os._exit(1)
