"""Turns Hydra's composed configuration into the schema's dataclasses, once; nothing past here sees a DictConfig."""

from copy import deepcopy

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from opd_ray.config.schema import Config
from opd_ray.config.teacher import TeacherKind
from opd_ray.config.validate import validate

_TEACHER_PATH = "teacher.path"


def register_schema() -> None:
    """Make the schema the base of `configs/train.yaml`: Hydra then refuses unknown keys and wrong types."""
    ConfigStore.instance().store(name="schema", node=Config)


def load(composed: DictConfig) -> Config:
    """Return the validated configuration. Raises ValueError naming the key at fault."""
    composed = _with_paths_of_self(composed)
    try:
        missing = sorted(OmegaConf.missing_keys(composed))
        given = OmegaConf.merge(composed)
        if _TEACHER_PATH in missing and composed.teachers:  # they teach all: nothing reads it
            missing.remove(_TEACHER_PATH)
            OmegaConf.update(given, _TEACHER_PATH, "")
        if missing:
            raise ValueError(f"{missing[0]} is not given: it has no default (missing: {', '.join(missing)})")
        config = OmegaConf.to_object(given)
    except OmegaConfBaseException as error:
        raise ValueError(f"{error.full_key}: {str(error).splitlines()[0]}") from None
    assert isinstance(config, Config)
    validate(config)
    return config


def _with_paths_of_self(composed: DictConfig) -> DictConfig:
    """Return the configuration with the student's path for each teacher that is the student and names none."""
    composed = deepcopy(composed)
    for teacher in (composed.teacher, *composed.teachers.values()):
        is_self = not OmegaConf.is_missing(teacher, "kind") and teacher.kind == TeacherKind.self
        if is_self and OmegaConf.is_missing(teacher, "path") and not OmegaConf.is_missing(composed.student, "path"):
            teacher.path = composed.student.path
    return composed
