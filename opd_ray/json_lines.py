"""Appends to files of a JSON object a line, and goes on when the disk does not take them."""

import json
import os
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

_MAX_HELD = 10_000  # lines of one file that wait for room


class JsonLines:
    """The files of one folder. Lines that cannot be written wait, in order, for the next that can."""

    def __init__(self, folder: Path, *, warn: Callable[[str], None]) -> None:
        """warn: told once when a file cannot be written, and again when it can and cannot once more."""
        self._folder = folder
        self._warn = warn
        self._held: dict[str, deque[str]] = {}

    def append(self, name: str, record: Mapping[str, Any]) -> None:
        """Add a line to a file."""
        held = self._held.setdefault(name, deque(maxlen=_MAX_HELD))
        held.append(json.dumps(record) + "\n")
        self._write(name, held, is_news=len(held) == 1)

    def flush(self) -> None:
        """Write what waits, as far as it can be."""
        for name, held in self._held.items():
            if held:
                self._write(name, held, is_news=False)

    def _write(self, name: str, held: deque[str], *, is_news: bool) -> None:
        path = self._folder / name
        try:
            append_whole(path, "".join(held))
        except OSError as fault:
            if is_news:
                self._warn(f"{path} cannot be written ({fault.strerror or fault}); its lines wait until it can be")
        else:
            held.clear()


def append_whole(path: Path, text: str) -> None:
    """Append text to a file, all of it or nothing. Raises OSError."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        size = os.fstat(file).st_size
        content = text.encode()
        try:
            while content:
                content = content[os.write(file, content) :]
        except OSError:
            os.ftruncate(file, size)
            raise
    finally:
        os.close(file)
