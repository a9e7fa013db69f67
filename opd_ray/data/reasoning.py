"""Procedural tasks of reasoning-gym: prompts made from a seed, each marked by its own dataset's rule.

The library is imported when it is asked for: that takes more than a second.
"""

import difflib
from functools import cache
from typing import Any

from opd_ray.data.marking_process import MarkingProcess
from opd_ray.data.reasoning_entries import as_text, from_text
from opd_ray.data.records import Record

_INSTRUCTION = "\nGive the final answer at the end, as: Answer: ..."
_PROCESS = MarkingProcess("opd_ray.data.reasoning_child")


def check_dataset(key: str, name: str) -> None:
    """Raise ValueError unless reasoning-gym has a dataset of this name."""
    names = _names()
    if name not in names:
        near = difflib.get_close_matches(name, names, n=3) or sorted(names)[:3]
        raise ValueError(
            f"{key}={name}: expected one of reasoning-gym's {len(names)} datasets; near it are {', '.join(near)}"
        )


def reasoning_records(name: str, *, num_records: int, seed: int) -> list[Record]:
    """Return prompts of a dataset with what its rule needs to mark them.

    Raises ValueError for a dataset that cannot be made from a seed alone, or whose entries JSON cannot hold.
    """
    import reasoning_gym

    try:
        entries = list(reasoning_gym.create_dataset(name, size=num_records, seed=seed))
    except (AssertionError, ValueError, TypeError, ImportError, OSError) as fault:
        raise ValueError(f"reasoning-gym's {name} cannot be used: it is not made from a seed alone ({fault})") from None
    return [_record(name, index, entry) for index, entry in enumerate(entries)]


def verify_reasoning(response: str, reference: str) -> float:
    """Return 1.0 when the dataset's own rule gives the stated answer full marks.

    reference: the dataset's name and entry as text, as `reasoning_records` writes them; the stated answer is that of
    `stated_answer`. A rule that raises or takes more than 5 s costs this response. Raises ValueError for a reference
    of another form.
    """
    _check_reference(reference)
    return _PROCESS.mark(response, reference)


def _check_reference(reference: str) -> None:
    try:
        given = from_text(reference)
    except ValueError:
        given = None
    if not isinstance(given, dict) or given.keys() != {"dataset", "entry"}:
        raise ValueError(
            "verifier 'reasoning_gym' expects an entry as data=reasoning_gym makes them, was given the answer"
            f" {reference[:40]!r}; use data=reasoning_gym, or another verifier"
        )


def _record(name: str, index: int, entry: dict[str, Any]) -> Record:
    try:
        reference = as_text({"dataset": name, "entry": entry})
    except ValueError as fault:
        raise ValueError(f"reasoning-gym's {name} cannot be used: its entries have no JSON, {fault}") from None
    return Record(
        where=f"reasoning-gym {name}, prompt {index}",
        prompt=str(entry["question"]) + _INSTRUCTION,
        messages=None,
        answer=None if entry["answer"] is None else str(entry["answer"]),
        task=name,
        reference=reference,
    )


@cache
def _names() -> frozenset[str]:
    from reasoning_gym.factory import DATASETS

    return frozenset(DATASETS)
