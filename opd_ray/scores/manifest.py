"""What a recording says of itself: under which settings its scores are what they are."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from opd_ray.config.schema import Config, TeacherConfig
from opd_ray.protocol import Payload, ScoreRequest
from opd_ray.requests import score_request
from opd_ray.routing import teachers_of

FORMAT = 1  # raised whenever an older reader would misread a folder


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedTeacher:
    """Who gave scores."""

    path: str
    config_key: str  # checksum of its whole configuration
    head_key: str | None  # checksum of its output head where hidden states were recorded: they mean nothing without it


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """The settings of the run that recorded."""

    format: int
    run: str  # its name
    student: str  # its path
    vocabulary_key: str  # checksum of the student's token map
    vocab_size: int  # rows that all heads had: what log-probs are normalised over
    teacher_hidden_size: int
    temperature: float  # the rollout's, at which log-probs are given
    top_p: float  # the rollout's
    correct_top_p: bool  # the sampler's log-probs are those within the nucleus
    equivalent_ids: tuple[tuple[int, ...], ...]  # ids that the teachers counted as one
    asked: ScoreRequest
    teachers: Mapping[str, RecordedTeacher]  # by the name that the index gives


def manifest_of(
    config: Config,
    *,
    tokenizer: Any,
    vocab_size: int,
    teacher_hidden_size: int,
    equivalent_ids: Sequence[Sequence[int]],
    head_keys: Mapping[str, str],
) -> Manifest:
    """Return the manifest of a run's own recording. tokenizer is the student's, vocab_size what log-probs are over;
    head_keys by teacher, of those whose hidden states are recorded."""
    return Manifest(
        format=FORMAT,
        run=config.name,
        student=config.student.path,
        vocabulary_key=vocabulary_key(tokenizer),
        vocab_size=vocab_size,
        teacher_hidden_size=teacher_hidden_size,
        temperature=config.rollout.temperature,
        top_p=config.rollout.top_p,
        correct_top_p=config.objective.correct_top_p,
        equivalent_ids=tuple(tuple(ids) for ids in equivalent_ids),
        asked=score_request(config.objective),
        teachers={
            name: RecordedTeacher(path=teacher.path, config_key=_config_key(teacher), head_key=head_keys.get(name))
            for name, teacher in teachers_of(config).by_name.items()
        },
    )


def to_json(manifest: Manifest) -> str:
    """Return the text of manifest.json."""
    return json.dumps(asdict(manifest), indent=2) + "\n"


def from_json(text: str) -> Manifest:
    """Return the manifest of a text. Raises ValueError for anything else, and for the format of another version."""
    try:
        values = json.loads(text)
        if values["format"] != FORMAT:
            raise ValueError(f"has format {values['format']}, this version reads format {FORMAT}: record it again")
        values["equivalent_ids"] = tuple(tuple(ids) for ids in values["equivalent_ids"])
        values["asked"] = ScoreRequest(**{**values["asked"], "payload": Payload(values["asked"]["payload"])})
        values["teachers"] = {name: RecordedTeacher(**teacher) for name, teacher in values["teachers"].items()}
        return Manifest(**values)
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"is not the manifest of a recording ({error})") from None


def vocabulary_key(tokenizer: Any) -> str:
    """Return the checksum of a tokenizer's map from tokens to ids."""
    return _key(sorted(tokenizer.get_vocab().items()))


def _config_key(teacher: TeacherConfig) -> str:
    return _key(asdict(teacher))


def _key(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).hexdigest()
