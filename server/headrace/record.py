"""Reads the record of a run. Imports nothing heavy: a replay reads its configuration first.

The file is what the router's recorder wrote: eight bytes `HEADRACE`, a `u32` version, then records
of a kind (`u8`), a length (`u32`) and as many bytes, little-endian, until the end of the file.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path

from headrace.config import Serve
from headrace.errors import ConfigError

MAGIC = b"HEADRACE"
VERSION = 1

PREPARE, TO_SHARD, RESULT, SERVE = 1, 2, 3, 5


def recorded_serve(path: Path) -> Serve:
    """The configuration that a record begins with; raises `ConfigError` if it has none."""
    for kind, data in read_records(path):
        if kind == SERVE:
            return Serve.parse(json.loads(data))
    raise ConfigError(f"{path} does not hold its configuration; name one with --config")


def read_records(path: Path) -> Iterator[tuple[int, bytes]]:
    """The records of a file; one that its end cuts short is left out."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    if data[: len(MAGIC)] != MAGIC or len(data) < len(MAGIC) + 4:
        raise ConfigError(f"{path} is not a record of plans")
    (version,) = struct.unpack_from("<I", data, len(MAGIC))
    if version != VERSION:
        raise ConfigError(f"{path} has version {version}; this replay reads version {VERSION}")
    at = len(MAGIC) + 4
    while at + 5 <= len(data):
        kind, length = struct.unpack_from("<BI", data, at)
        at += 5
        if at + length > len(data):
            break
        yield kind, data[at : at + length]
        at += length
