"""Reads prompt records from JSONL and Parquet files; every refusal names the file and the line (or row)."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from opd_ray.config.data import DataKind

_FIELDS = ("prompt", "messages", "answer", "task")


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One prompt as a file gives it: either plain text or chat messages."""

    where: str  # file and line, for messages to people
    prompt: str | None
    messages: list[dict[str, str]] | None
    answer: str | None
    task: str | None
    reference: str | None = None  # what the verifier compares with instead of the answer

    @property
    def content(self) -> str:
        """Return what the model would be shown, as one text: equal for equal prompts."""
        return self.prompt if self.prompt is not None else json.dumps(self.messages)


def as_messages(record: Record) -> Record:
    """Return a record of plain text as one that a user says, for a chat template."""
    return replace(record, prompt=None, messages=[{"role": "user", "content": record.prompt or ""}])


def read_records(path: str, *, kind: DataKind, key: str = "data.path") -> list[Record]:
    """Return all records of a file; `key` is the configuration key that named it.

    Raises ValueError naming file and line for a missing, empty or malformed file.
    """
    if not Path(path).is_file():
        raise ValueError(f"{key}={path}: no such file")
    rows = _jsonl_rows(path) if kind is DataKind.jsonl else _parquet_rows(path)
    records = [_to_record(row, where=where) for where, row in rows]
    if not records:
        raise ValueError(f"{key}={path}: the file holds no records")
    return records


def _jsonl_rows(path: str) -> Iterator[tuple[str, Any]]:
    for number, raw in enumerate(Path(path).read_bytes().split(b"\n"), start=1):
        where = f"{path}, line {number}"
        if not raw.strip():
            continue
        try:
            yield where, json.loads(raw.decode("utf-8-sig" if number == 1 else "utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(f"{where}: not UTF-8 text ({error.reason} at byte {error.start})") from None
        except RecursionError:
            raise ValueError(f"{where}: nested too deeply") from None
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: not JSON ({error.msg} at column {error.colno})") from None
        except ValueError:  # Python reads no integer of more than 4,300 digits
            raise ValueError(f"{where}: holds a number with too many digits; expected text where it is one") from None


def _parquet_rows(path: str) -> Iterator[tuple[str, Any]]:
    try:
        table = pq.ParquetFile(path)
        columns = [name for name in _FIELDS if name in table.schema_arrow.names]
        rows = (row for batch in table.iter_batches(columns=columns) for row in batch.to_pylist())
        yield from ((f"{path}, row {number}", row) for number, row in enumerate(rows, start=1))
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a readable Parquet file ({str(error).splitlines()[0]})") from None


def _to_record(row: Any, *, where: str) -> Record:
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected an object with `prompt` or `messages`, got {type(row).__name__}")
    prompt, messages = row.get("prompt"), row.get("messages")
    if (prompt is None) == (messages is None):
        raise ValueError(f"{where}: expected exactly one of `prompt` and `messages`, got {sorted(row) or 'neither'}")
    if prompt is not None and not isinstance(prompt, str):
        raise ValueError(f"{where}: `prompt` is {type(prompt).__name__}, expected text")
    if messages is not None:
        _check_messages(messages, where=where)
    answer, task = row.get("answer"), row.get("task")
    is_number = isinstance(answer, int | float) and not isinstance(answer, bool)
    answer = str(answer) if is_number else answer
    for name, value in (("answer", answer), ("task", task)):
        if value is not None and not isinstance(value, str):
            raise ValueError(f"{where}: `{name}` is {type(value).__name__}, expected text")
    return Record(where=where, prompt=prompt, messages=messages, answer=answer, task=task)


def _check_messages(messages: Any, *, where: str) -> None:
    texts = isinstance(messages, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages
    )
    if not texts:
        raise ValueError(f"{where}: `messages` must be a list of objects with text `role` and `content`")
    if not any(m["role"] == "user" for m in messages):
        raise ValueError(f"{where}: `messages` has no message of role `user`")
