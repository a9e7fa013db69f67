"""Procedural tasks of reasoning-gym: prompts made from a seed, each marked by its own dataset's rule.

The library is imported when it is asked for: that takes more than a second.
"""

import difflib
import json
import re
from functools import cache
from typing import Any

from opd_ray.data.records import Record

_INSTRUCTION = "\nGive the final answer on a line of its own, as: Answer: ..."
# Where a response states its answer; the last one counts.
_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_BOXED = re.compile(r"\\boxed\{([^{}]*)\}")
_SAID = re.compile(r"[Aa]nswer\s*:\s*(.+)")


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

    Raises ValueError for a dataset whose entries cannot be written as JSON.
    """
    import reasoning_gym

    entries = list(reasoning_gym.create_dataset(name, size=num_records, seed=seed))
    return [_record(name, index, entry) for index, entry in enumerate(entries)]


def verify_reasoning(response: str, reference: str) -> float:
    """Return 1.0 when the dataset's own rule gives the stated answer full marks.

    reference: the dataset's name and entry, in JSON, as `reasoning_records` writes them. The answer is what stands
    last in <answer>...</answer>, else in a box, else behind "Answer:", else on the last line that is not empty.
    """
    given = json.loads(reference)
    if not response.strip():
        return 0.0
    return float(_dataset(given["dataset"]).score_answer(stated_answer(response), given["entry"]) >= 1.0)


def stated_answer(response: str) -> str:
    """Return the part of a response that is its answer."""
    for form in (_TAGGED, _BOXED, _SAID):
        found = form.findall(response)
        if found:
            return str(found[-1]).strip()
    lines = [line.strip() for line in response.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def _record(name: str, index: int, entry: dict[str, Any]) -> Record:
    try:
        reference = json.dumps({"dataset": name, "entry": entry})
    except TypeError as fault:
        raise ValueError(
            f"reasoning-gym's {name} cannot be used: its entries are not written as JSON ({fault})"
        ) from None
    return Record(
        where=f"reasoning-gym {name}, prompt {index}",
        prompt=str(entry["question"]) + _INSTRUCTION,
        messages=None,
        answer=None if entry["answer"] is None else str(entry["answer"]),
        task=name,
        reference=reference,
    )


@cache
def _dataset(name: str) -> Any:
    import reasoning_gym

    return reasoning_gym.create_dataset(name, size=1, seed=0)


@cache
def _names() -> frozenset[str]:
    from reasoning_gym.factory import DATASETS

    return frozenset(DATASETS)
