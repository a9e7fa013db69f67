"""The files of a recording: shards and their index, each whole or not there, and read with their checksums."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import safetensors.numpy
from safetensors import SafetensorError, safe_open

from opd_ray.protocol import GroupSummary, Score, ScoreSummary, TrajectoryGroup
from opd_ray.scores.manifest import Manifest, from_json, to_json
from opd_ray.scores.messages import (
    Array,
    Scored,
    checksum,
    group_key,
    pack,
    prompt_key,
    unpack_group,
    unpack_score,
)

_MANIFEST, _INDEX = "manifest.json", "index.jsonl"
_KEY = "teacher.cache.path"
MAX_SHARD_BYTES = 256 << 20  # an update that is larger is cut; the writer holds one shard's bytes at a time
_CHUNK_BYTES = 16 << 20
_MAX_OPEN_SHARDS = 16


class DamagedRecording(ValueError):
    """A shard is missing, or its bytes are not those that were written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedGroup:
    """What the index says of a group: where it lies, and what a run must know of it beforehand."""

    file: str
    row: int  # in the file
    step: int  # the update it was recorded for
    task: str
    teacher: str  # whose score
    prompt_index: int
    seed: int
    num_prompt_tokens: int
    response_lengths: tuple[int, ...]
    has_rewards: bool
    prompt_key: str
    group_key: str
    group_checksum: str
    score_checksum: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """What the index says of a file."""

    file: str
    step: int
    num_bytes: int
    checksum: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """A folder of recorded scores, its index read."""

    folder: Path
    manifest: Manifest
    shards: Sequence[Shard]
    groups: Sequence[RecordedGroup]  # in the order of updates

    def verify(self, *, checksums: bool) -> None:
        """Raise ValueError for a shard that is missing or of another size and, reading it all, of another content."""
        for shard in self.shards:
            path = self.folder / shard.file
            size = path.stat().st_size if path.is_file() else None
            if size is None:
                raise ValueError(f"{_KEY}={self.folder}: the shard {shard.file} is missing; copy the folder again")
            if size != shard.num_bytes or (checksums and _checksum_of(path) != shard.checksum):
                what = f"has {size} bytes of {shard.num_bytes}" if size != shard.num_bytes else "has changed"
                raise ValueError(
                    f"{_KEY}={self.folder}: the shard {shard.file} is damaged, it {what}; copy or record it again"
                )


def read_recording(folder: str | Path) -> Recording:
    """Read manifest and index. Raises ValueError for a folder that holds no recording this version can read."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{_KEY}={folder}: no such folder; expected the scores/ of a run with record_scores=true")
    for name in (_MANIFEST, _INDEX):
        if not (folder / name).is_file():
            raise ValueError(f"{_KEY}={folder}: holds no {name}; expected the scores/ of a run with record_scores=true")
    try:
        manifest = from_json((folder / _MANIFEST).read_text())
    except ValueError as error:
        raise ValueError(f"{_KEY}={folder}: {_MANIFEST} {error}") from None
    try:
        lines = [(Shard(**values["shard"]), values["groups"]) for values in _whole_lines(folder)]
        groups = [_recorded(shard, row, values) for shard, rows in lines for row, values in enumerate(rows)]
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{_KEY}={folder}: {_INDEX} is damaged ({error}); copy the folder again") from None
    return Recording(folder=folder, manifest=manifest, shards=[shard for shard, _ in lines], groups=groups)


def prepare_folder(folder: Path, manifest: Manifest, *, step: int) -> None:
    """Make a folder ready to record from update `step` on: what was recorded for later ones is dropped.

    Raises ValueError when it cannot be written, or holds a recording under other settings.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        before = folder / _MANIFEST
        kept = [line for line in _whole_lines(folder) if line["shard"]["step"] < step]
        if kept and before.is_file() and before.read_text() != to_json(manifest):
            raise ValueError(
                f"{folder} was recorded under other settings ({_MANIFEST}); resume with those, or with"
                " record_scores=false"
            )
        names = {line["shard"]["file"] for line in kept}
        for path in folder.glob("*.safetensors*"):
            if path.name not in names:
                path.unlink()
        _write_whole(before, to_json(manifest).encode())
        _write_whole(folder / _INDEX, "".join(json.dumps(line) + "\n" for line in kept).encode())
    except OSError as error:
        raise ValueError(f"record_scores=true: {folder} cannot be written ({error.strerror})") from None


def write_update(folder: Path, *, step: int, scored: Sequence[Scored], max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Write an update's groups and scores: each shard whole, then its line of the index. Raises OSError."""
    for number, part in enumerate(_parts(scored, max_bytes=max_shard_bytes)):
        name = f"update-{step:06d}-{number:02d}.safetensors"
        packed = [pack(one) for one in part]
        arrays = {f"{row}.{key}": array for row, (of_row, _) in enumerate(packed) for key, array in of_row.items()}
        content = safetensors.numpy.save(arrays, {"groups": json.dumps([values for _, values in packed])})
        _write_whole(folder / name, content)
        shard = Shard(file=name, step=step, num_bytes=len(content), checksum=_checksum(content))
        line = {"shard": asdict(shard), "groups": [_index_values(*row) for row in zip(part, packed, strict=True)]}
        with (folder / _INDEX).open("a") as index:
            index.write(json.dumps(line) + "\n")


class ShardReader:
    """Reads groups and scores of a recording by the index's rows; keeps the last few shards open."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open = lru_cache(maxsize=_MAX_OPEN_SHARDS)(self._opened)

    def group(self, recorded: RecordedGroup) -> tuple[GroupSummary, TrajectoryGroup]:
        """Return a group. Raises DamagedRecording."""
        return unpack_group(*self._row(recorded, part="group", expected=recorded.group_checksum))

    def score(self, recorded: RecordedGroup) -> tuple[ScoreSummary, Score]:
        """Return a group's score. Raises DamagedRecording."""
        return unpack_score(*self._row(recorded, part="score", expected=recorded.score_checksum))

    def _row(self, recorded: RecordedGroup, *, part: str, expected: str) -> tuple[dict[str, Array], dict[str, Any]]:
        where, prefix = f"{self._folder / recorded.file}, row {recorded.row}", f"{recorded.row}."
        try:
            tensors, names, values = self._open(recorded.file)
            mine = [name for name in names if name.startswith(f"{prefix}{part}.")]
            arrays = {name.removeprefix(prefix): tensors.get_tensor(name) for name in mine}
            found = checksum(arrays, values[recorded.row], part=part)
        except (OSError, SafetensorError, KeyError, IndexError, TypeError, ValueError) as error:
            raise DamagedRecording(f"{where}: cannot be read ({error})") from None
        if found != expected:
            raise DamagedRecording(f"{where}: its checksum differs from the index's")
        return arrays, values[recorded.row]

    def _opened(self, file: str) -> tuple[Any, list[str], list[dict[str, Any]]]:
        tensors: Any = safe_open(self._folder / file, framework="numpy")
        return tensors, list(tensors.keys()), json.loads(tensors.metadata()["groups"])


def _parts(scored: Sequence[Scored], *, max_bytes: int) -> list[list[Scored]]:
    """Cut an update where a shard would grow beyond its limit."""
    parts, size = list[list[Scored]](), max_bytes
    for one in scored:
        if size + one.num_bytes > max_bytes:
            parts.append([])
            size = 0
        parts[-1].append(one)
        size += one.num_bytes
    return parts


def _index_values(scored: Scored, packed: tuple[dict[str, Array], dict[str, Any]]) -> dict[str, Any]:
    group, summary = scored.group, scored.group_summary
    return {
        "task": group.task,
        "teacher": scored.teacher,
        "prompt_index": group.prompt_index,
        "seed": group.seed,
        "num_prompt_tokens": summary.num_prompt_tokens,
        "response_lengths": summary.response_lengths,
        "has_rewards": len(group.rewards) > 0,
        "prompt_key": prompt_key(group.prompt_ids),
        "group_key": group_key(group),
        "group_checksum": checksum(*packed, part="group"),
        "score_checksum": checksum(*packed, part="score"),
    }


def _recorded(shard: Shard, row: int, values: dict[str, Any]) -> RecordedGroup:
    lengths = tuple(values["response_lengths"])
    return RecordedGroup(file=shard.file, row=row, step=shard.step, **{**values, "response_lengths": lengths})


def _whole_lines(folder: Path) -> list[dict[str, Any]]:
    """Return the index's lines; the last one is left out where a crash has cut it short."""
    index = folder / _INDEX
    return [json.loads(line) for line in index.read_text().split("\n")[:-1]] if index.is_file() else []


def _write_whole(path: Path, content: bytes) -> None:
    """Write a file beside its place and rename it into it, on the disk before the rename."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def _checksum(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _checksum_of(path: Path) -> str:
    total = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            total.update(chunk)
    return total.hexdigest()
