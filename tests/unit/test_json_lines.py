import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from opd_ray.json_lines import JsonLines, append_whole


class FullDisk:
    """Stands in for os.write: takes so many bytes more."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.room = 10**9
        self._write = os.write
        monkeypatch.setattr(os, "write", self.write)

    def write(self, file: int, content: bytes) -> int:
        if self.room == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        taken = self._write(file, content[: self.room])
        self.room -= taken
        return taken


def read(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("room", [0, 3])
def test_lines_wait_for_room_in_order_and_none_is_ever_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    disk, told = FullDisk(monkeypatch), list[str]()
    lines = JsonLines(tmp_path, warn=told.append)
    lines.append("metrics.jsonl", {"step": 0})
    for step in (1, 2):
        disk.room = room
        lines.append("metrics.jsonl", {"step": step})
        assert read(tmp_path / "metrics.jsonl") == [{"step": 0}]
    assert told == [
        f"{tmp_path}/metrics.jsonl cannot be written (No space left on device); its lines wait until it can be"
    ]
    disk.room = 10**9
    lines.append("metrics.jsonl", {"step": 3})
    assert [line["step"] for line in read(tmp_path / "metrics.jsonl")] == [0, 1, 2, 3]


def test_what_still_waits_at_the_end_is_written_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk, told = FullDisk(monkeypatch), list[str]()
    lines = JsonLines(tmp_path, warn=told.append)
    disk.room = 0
    lines.append("a", {"n": 1})
    lines.append("b", {"n": 2})
    lines.flush()
    assert len(told) == 2  # flushing in vain says nothing new
    disk.room = 10**9
    lines.flush()
    assert (read(tmp_path / "a"), read(tmp_path / "b")) == ([{"n": 1}], [{"n": 2}])


def test_text_longer_than_one_write_takes_is_written_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda file, content: write(file, content[:2]))
    append_whole(tmp_path / "a", "abcdeé\n")
    assert (tmp_path / "a").read_text() == "abcdeé\n"
