"""Triton's cache with a folder in front of it that an image brings and nobody writes to."""

from __future__ import annotations

import json
from pathlib import Path

from triton.runtime.cache import FileCacheManager

from headrace.config import SHIPPED_KERNELS


class ShippedFirst(FileCacheManager):
    """Looks for compiled kernels in the shipped folder, then in `TRITON_CACHE_DIR`.

    Triton makes one for each kernel; keys are hashes of everything that decides what is compiled.
    """

    def __init__(self, key: str, override: bool = False, dump: bool = False) -> None:
        super().__init__(key, override, dump)
        self._shipped = None if override or dump else SHIPPED_KERNELS / key

    def get_file(self, filename: str) -> str | None:
        found = self._ship(filename)
        return super().get_file(filename) if found is None else str(found)

    def get_group(self, filename: str) -> dict[str, str] | None:
        """Files that belong together, whose paths were another machine's."""
        listed = self._ship(f"__grp__{filename}")
        if listed is not None:
            try:
                names = json.loads(listed.read_text(encoding="utf-8"))["child_paths"]
            except (OSError, ValueError, KeyError):
                names = []
            paths = {name: self._ship(name) for name in names}
            if paths and None not in paths.values():
                return {name: str(path) for name, path in paths.items()}
        return super().get_group(filename)

    def _ship(self, filename: str) -> Path | None:
        path = None if self._shipped is None else self._shipped / filename
        return path if path is not None and path.exists() else None
