"""Messages as named arrays and plain values, and back, whatever their fields are; their keys and checksums."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from opd_ray.protocol import (
    RECORDED_VERSION,
    GroupSummary,
    HiddenScore,
    Int32,
    SampledScore,
    Score,
    ScoreSummary,
    SupportScore,
    TrajectoryGroup,
)

Array = npt.NDArray[Any]

_DIGEST_BYTES = 16
_KINDS: dict[str, type[Score]] = {kind.__name__: kind for kind in (SampledScore, SupportScore, HiddenScore)}
# What tells a group from every other one. The versions of its tokens do not: they mean something in their own run only.
_OF_GROUP = ("prompt_ids", "offsets", "response_ids", "sampled_logprobs", "support_ids")


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """A group and its score, as they are recorded."""

    teacher: str  # whose score
    group_summary: GroupSummary
    group: TrajectoryGroup
    score_summary: ScoreSummary
    score: Score

    @property
    def num_bytes(self) -> int:
        """Return the size of all arrays."""
        return sum(array.nbytes for part in (self.group, self.score) for array in _arrays(part).values())


def pack(scored: Scored) -> tuple[dict[str, Array], dict[str, Any]]:
    """Return the arrays by name, and what goes into JSON."""
    arrays = {f"{part}.{name}": array for part in ("group", "score") for name, array in _arrays_of(scored, part)}
    values = {
        "teacher": scored.teacher,
        "kind": type(scored.score).__name__,
        **{part: _values(getattr(scored, part)) for part in ("group_summary", "group", "score_summary", "score")},
    }
    return arrays, values


def unpack_group(arrays: Mapping[str, Array], values: Mapping[str, Any]) -> tuple[GroupSummary, TrajectoryGroup]:
    """Return a recorded group, its tokens marked as no policy of this run's."""
    group = TrajectoryGroup(**_named(arrays, "group"), **values["group"])
    summary = GroupSummary(**_with_tuples(values["group_summary"]))
    versions = np.full_like(group.token_versions, RECORDED_VERSION)
    return replace(summary, oldest_version=RECORDED_VERSION), replace(group, token_versions=versions)


def unpack_score(arrays: Mapping[str, Array], values: Mapping[str, Any]) -> tuple[ScoreSummary, Score]:
    """Return a recorded score as the teacher gave it."""
    score = _KINDS[values["kind"]](**_named(arrays, "score"), **values["score"])
    return ScoreSummary(**_with_tuples(values["score_summary"])), score


def group_key(group: TrajectoryGroup) -> str:
    """Return the key by which a group's score is found: of prompt, responses and what the sampler said of them."""
    arrays = _arrays(group)
    return digest([(group.task, np.empty(0)), *((name, arrays[name]) for name in _OF_GROUP)])


def checksum(arrays: Mapping[str, Array], values: Mapping[str, Any], *, part: str) -> str:
    """Return the checksum of all that is packed of a `group` or a `score`."""
    said = json.dumps([values["kind"], values[part], values[f"{part}_summary"]], sort_keys=True)
    return digest([(said, np.empty(0)), *sorted((n, a) for n, a in arrays.items() if n.startswith(f"{part}."))])


def prompt_key(ids_P: Int32) -> str:
    """Return the key of a prompt's tokens."""
    return digest([("prompt", ids_P.astype(np.int32))])


def digest(arrays: Iterable[tuple[str, Array]]) -> str:
    """Return a checksum over names, types, shapes and values, in the order given."""
    total = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    for name, array in arrays:
        total.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        total.update(np.ascontiguousarray(array).data if array.size else b"")
    return total.hexdigest()


def _arrays(message: Any) -> dict[str, Array]:
    values = {field.name: getattr(message, field.name) for field in fields(message)}
    return {name: value for name, value in values.items() if isinstance(value, np.ndarray)}


def _arrays_of(scored: Scored, part: str) -> Iterable[tuple[str, Array]]:
    return ((name, np.ascontiguousarray(array)) for name, array in _arrays(getattr(scored, part)).items())


def _values(message: Any) -> dict[str, Any]:
    values = {field.name: getattr(message, field.name) for field in fields(message)}
    return {name: value for name, value in values.items() if not isinstance(value, np.ndarray)}


def _named(arrays: Mapping[str, Array], part: str) -> dict[str, Any]:
    return {n.removeprefix(f"{part}."): array for n, array in arrays.items() if n.startswith(f"{part}.")}


def _with_tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    """Turn JSON's lists back into the tuples that messages hold."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
