"""Turns rows of any dataset into prompt records: cleaned, without duplicates, with answers that can be marked."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq
from huggingface_hub import HfApi, hf_hub_download

from opd_ray.config.prepare import PrepareConfig
from opd_ray.data.tasks import verifier

_READERS = {
    ".parquet": pq.read_table,
    ".csv": pyarrow.csv.read_csv,
    ".json": pyarrow.json.read_json,
    ".jsonl": pyarrow.json.read_json,
}


@dataclass(slots=True, kw_only=True)
class Prepared:
    """The records that are kept, and what became of the others."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    num_read: int = 0
    num_empty: int = 0  # without a prompt
    num_duplicates: int = 0
    num_conflicts: int = 0  # of the duplicates, those with another answer
    num_bad_answers: int = 0  # left out: the verifier cannot compare with them
    first_bad_answer: str = ""


def source_rows(config: PrepareConfig) -> Iterator[dict[str, Any]]:
    """Yield the rows of the source. Raises ValueError naming the key at fault."""
    wanted = [config.prompt, *([config.answer] if config.answer else [])]
    for path in _files(config):
        reader = _READERS[path.suffix]
        try:
            table = reader(path)
        except (pa.ArrowException, OSError) as fault:
            raise ValueError(f"{path}: cannot be read as {path.suffix[1:]} ({str(fault).splitlines()[0]})") from None
        missing = [name for name in wanted if name not in table.column_names]
        if missing:
            key = "prompt" if missing[0] == config.prompt else "answer"
            raise ValueError(
                f"{key}={missing[0]}: {path.name} has no such column, it has {', '.join(table.column_names)}"
                + ("; answer=null says that there is none" if key == "answer" else "")
            )
        yield from table.select(wanted).to_pylist()


def prepare(rows: Iterable[dict[str, Any]], config: PrepareConfig) -> Prepared:
    """Return the records of `prompt` or `messages`, `answer` and `task`, each prompt once: the first of them stays."""
    prepared, seen = Prepared(), dict[str, str | None]()
    verify = verifier(config.task) if config.task else None
    for row in rows:
        prepared.num_read += 1
        record = _record(row, config)
        if record is None:
            prepared.num_empty += 1
            continue
        answer, identity = record.get("answer"), _identity(record)
        if identity in seen:
            prepared.num_duplicates += 1
            prepared.num_conflicts += seen[identity] != answer
            continue
        seen[identity] = answer
        if verify is not None and answer is not None:
            try:
                verify("", answer)
            except ValueError as fault:
                prepared.num_bad_answers += 1
                prepared.first_bad_answer = prepared.first_bad_answer or f"row {prepared.num_read}: {fault}"
                continue
        prepared.rows.append(record)
    return prepared


def write(rows: Sequence[dict[str, Any]], output: Path) -> None:
    """Write the records beside their place, then rename them into it."""
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_suffix(".partial")
    pq.write_table(pa.Table.from_pylist(list(rows)), partial)
    partial.replace(output)


def _record(row: dict[str, Any], config: PrepareConfig) -> dict[str, Any] | None:
    """Return a record, or None for a row without a prompt."""
    given, record = row[config.prompt], dict[str, Any]()
    if isinstance(given, list):
        messages = [{"role": m["role"], "content": m["content"]} for m in given]
        if not any(m["role"] == "user" and m["content"].strip() for m in messages):
            return None
        record["messages"] = messages
    else:
        if given is None or not str(given).strip():
            return None
        text = config.template.replace("{prompt}", str(given).strip())
        record |= {"messages": [{"role": "user", "content": text}]} if config.chat else {"prompt": text}
    if config.answer:
        answer = row[config.answer]
        record["answer"] = None if answer is None else str(answer).strip()
    if config.task:
        record["task"] = config.task
    return record


def _identity(record: dict[str, Any]) -> str:
    """Return what equal prompts have in common: their words, whatever the white space and the case."""
    messages = record.get("messages") or [{"role": "", "content": record["prompt"]}]
    return "\n".join(f"{m['role']} {' '.join(m['content'].split()).lower()}" for m in messages)


def _files(config: PrepareConfig) -> list[Path]:
    path = Path(config.source)
    known = ", ".join(_READERS)
    if path.is_file():
        if path.suffix not in _READERS:
            raise ValueError(f"source={config.source}: expected a file that ends in one of {known}")
        return [path]
    if path.is_absolute() or config.source.startswith(".") or path.suffix in _READERS or path.is_dir():
        raise ValueError(f"source={config.source}: no such file; expected one, or a dataset's name on the hub")
    return _downloaded(config)


def _downloaded(config: PrepareConfig) -> list[Path]:
    """Fetch the files of a split of a hub dataset: those that have it, and the subset, in their paths."""
    names = HfApi().list_repo_files(config.source, repo_type="dataset")
    data = [name for name in names if Path(name).suffix in _READERS and not name.startswith(".")]
    of_subset = [name for name in data if config.subset is None or config.subset in Path(name).parts[:-1]]
    of_split = [name for name in of_subset if config.split in Path(name).name or config.split in Path(name).parts[:-1]]
    if not of_split:
        raise ValueError(
            f"source={config.source}: no file of split={config.split}"
            + (f" and subset={config.subset}" if config.subset else "")
            + f"; it has {', '.join(data[:6]) or 'no file of a known kind'}"
        )
    return [Path(hf_hub_download(config.source, name, repo_type="dataset")) for name in sorted(of_split)]
