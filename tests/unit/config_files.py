"""Composes the repository's own configuration files, as a command line does."""

from collections.abc import Callable
from pathlib import Path

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from opd_ray.config.load import load, register_schema
from opd_ray.config.schema import Config

CONFIG_DIR = Path(__file__).resolve().parents[2] / "configs"

# Everything that has no default, and nothing else.
MANDATORY = ("name=run", "num_steps=3", "student.path=student", "teacher.path=teacher", "data.task=sort")


def compose_raw(*overrides: str) -> DictConfig:
    register_schema()
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        return compose("train", overrides=list(overrides))


def compose_config(*overrides: str) -> Config:
    return load(compose_raw(*overrides))


def refusal(function: Callable[[], object]) -> str:
    """Return the words with which a ValueError refuses."""
    try:
        function()
    except ValueError as error:
        return str(error)
    raise AssertionError("nothing was refused")
