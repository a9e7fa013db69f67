"""Looks at the folders of student and teachers before any worker starts: present, whole, and of one language."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import AutoConfig, AutoTokenizer

from opd_ray.config.schema import TeacherConfig
from opd_ray.config.student import LoraConfig
from opd_ray.config.teacher import AlignmentKind, TeacherKind
from opd_ray.data.byte_aligner import ByteAligner
from opd_ray.data.hub import local_folder
from opd_ray.data.lora import AdapterSize, adapter_size

_NUM_NAMED_IDS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Models:
    """What the run needs to know of its models."""

    tokenizer: Any  # the student's
    vocab_size: int  # rows that all heads have; ids beyond are padding
    teacher_hidden_size: int  # the largest
    adapters: AdapterSize | None = None  # None: all of the student's weights are trained


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFiles:
    """A model's folder, opened: everything but the weights."""

    key: str  # configuration key of its path
    folder: Path
    tokenizer: Any
    config: Any  # of the language model


def open_model(key: str, path: str) -> ModelFiles:
    """Open a folder or hub name. Raises ValueError for a model that is missing or incomplete."""
    folder = _folder(key, path)
    return ModelFiles(key=key, folder=folder, tokenizer=_tokenizer(key, folder), config=_model_config(key, folder))


def open_tokenizer(key: str, path: str) -> Any:
    """Return the tokenizer of a folder or hub name, whose weights need not be there. Raises ValueError without one."""
    return _tokenizer(key, _folder(key, path, weights=False))


def hidden_size(path: str) -> int:
    """Return the width of a model's states. Raises ValueError for a folder that is no model."""
    return int(_model_config("student.path", _folder("student.path", path)).hidden_size)


def inspect_models(
    *, student_path: str, teachers: Mapping[str, TeacherConfig], lora: LoraConfig | None = None
) -> Models:
    """Check student and teachers and return what the run needs of them.

    teachers maps the keys of their paths to them; lora: the student's adapters. Raises ValueError for a model that is
    missing or incomplete, for tokenizers that name ids differently, and for adapters of modules that are not there.
    """
    student = open_model("student.path", student_path)
    configs, hidden_sizes = [student.config], [0]
    for key, teacher in teachers.items():
        if teacher.kind is TeacherKind.cache:
            continue  # it said what it had to say; the recording is checked instead
        has_weights = teacher.kind is not TeacherKind.http
        folder = _folder(key, teacher.path, weights=has_weights)
        own = _tokenizer(key, folder)
        if teacher.alignment is AlignmentKind.bytes:
            ByteAligner(student.tokenizer, own, token_map=teacher.token_map)
            continue
        check_same_tokens(student.tokenizer, own, key=key)
        if has_weights:
            configs.append(_model_config(key, folder))
            hidden_sizes.append(configs[-1].hidden_size)
    return Models(
        tokenizer=student.tokenizer,
        vocab_size=min(config.vocab_size for config in configs),
        teacher_hidden_size=max(hidden_sizes),
        adapters=adapter_size(student.config, lora) if lora is not None else None,
    )


def check_same_tokens(student: Any, teacher: Any, *, key: str = "teacher.path") -> None:
    """Raise ValueError naming the first ids that mean different tokens to the two tokenizers."""
    student_tokens = {index: token for token, index in student.get_vocab().items()}
    teacher_tokens = {index: token for token, index in teacher.get_vocab().items()}
    ids = sorted(student_tokens.keys() | teacher_tokens.keys())
    differing = [i for i in ids if student_tokens.get(i) != teacher_tokens.get(i)]
    if differing:
        named = "; ".join(
            f"id {i} is {student_tokens.get(i)!r} to the student and {teacher_tokens.get(i)!r} to the teacher"
            for i in differing[:_NUM_NAMED_IDS]
        )
        raise ValueError(
            f"student.path and {key} have different token maps: {len(differing)} of {len(ids)} ids differ"
            f" ({named}); expected two models with one tokenizer, or {key.removesuffix('.path')}.alignment=bytes"
        )


def _folder(key: str, path: str, *, weights: bool = True) -> Path:
    if Path(path).is_file():
        raise ValueError(f"{key}={path}: is a file, expected a Hugging Face folder")
    try:
        folder = local_folder(path)
    except HFValidationError:  # a path that is no hub name
        raise ValueError(f"{key}={path}: no such folder") from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{key}={path}: no such folder, and not found on the Hugging Face hub ({reason})") from None
    if not weights:
        return folder
    if not (folder / "config.json").is_file():
        raise ValueError(f"{key}={path}: the folder has no config.json, expected a Hugging Face model folder")
    if not any(folder.glob("*.safetensors")):
        raise ValueError(f"{key}={path}: the folder has no *.safetensors, expected weights in that format")
    return folder


def _model_config(key: str, folder: Path) -> Any:
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False).get_text_config()
    except (ValueError, OSError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{key}={folder}: config.json cannot be used ({str(error).splitlines()[0]})") from None
    if not hasattr(config, "vocab_size") or not hasattr(config, "hidden_size"):
        raise ValueError(f"{key}={folder}: config.json names no vocab_size and hidden_size, expected a language model")
    return config


def _tokenizer(key: str, folder: Path) -> Any:
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        raise ValueError(f"{key}={folder}: the folder has no tokenizer (tokenizer.json); save the model's with it")
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, OSError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{key}={folder}: the tokenizer cannot be loaded ({str(error).splitlines()[0]})") from None
