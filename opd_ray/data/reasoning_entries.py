"""Entries of reasoning-gym as text, and where a response states its answer to one."""

import json
import re
from typing import Any

# Where a response states its answer; the last one counts.
_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_BOXED = re.compile(r"\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}")
_SAID = re.compile(r"answer(?:\*\*)?\s*:(?:\*\*)?", re.IGNORECASE)
_TUPLE, _MAPPING = "tuple of", "mapping of"  # marks of what JSON does not have


def as_text(value: Any) -> str:
    """Return a value as JSON from which `from_text` makes an equal one: of tuples too, and of keys that are no text.

    Raises ValueError for any other value that JSON does not have, naming its type.
    """
    text = json.dumps(_marked(value))
    if from_text(text) != value:
        raise ValueError("written as JSON and read again they are not the same")
    return text


def from_text(text: str) -> Any:
    """Return what `as_text` was given. Raises ValueError for what is no JSON."""
    return _restored(json.loads(text))


def stated_answer(response: str, *, num_lines: int | None = 1) -> str:
    """Return the part of a response that is its answer.

    It is what stands last in <answer>...</answer>, else in a box, else behind "Answer:", else on the last lines that
    are not empty. num_lines: how many lines it has outside of a tag or a box; None: all behind "Answer:".
    """
    for form in (_TAGGED, _BOXED):
        found = form.findall(response)
        if found:
            return str(found[-1]).strip()
    behind = [response[match.end() :].strip() for match in _SAID.finditer(response)]
    said = [text for text in behind if text]
    if said:
        lines = said[-1].splitlines()[:num_lines]
    else:
        lines = [line for line in response.splitlines() if line.strip()][-(num_lines or 1) :]
    return "\n".join(lines).strip().removeprefix("**").removesuffix("**").strip()


def _marked(value: Any) -> Any:
    if isinstance(value, tuple):
        return {_TUPLE: [_marked(v) for v in value]}
    if isinstance(value, list):
        return [_marked(v) for v in value]
    if isinstance(value, dict):
        if all(isinstance(k, str) and k not in (_TUPLE, _MAPPING) for k in value):
            return {k: _marked(v) for k, v in value.items()}
        return {_MAPPING: [[_marked(k), _marked(v)] for k, v in value.items()]}
    if value is None or isinstance(value, str | int | float):
        return value
    raise ValueError(f"they hold a {type(value).__name__}, which JSON does not have")


def _restored(value: Any) -> Any:
    if isinstance(value, list):
        return [_restored(v) for v in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {_TUPLE}:
        return tuple(_restored(v) for v in value[_TUPLE])
    if value.keys() == {_MAPPING}:
        return {_restored(k): _restored(v) for k, v in value[_MAPPING]}
    return {k: _restored(v) for k, v in value.items()}
