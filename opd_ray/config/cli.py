"""Checks the command line's overrides by composing once before Hydra does, to say in one line what is wrong."""

import difflib
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException
from omegaconf.errors import OmegaConfBaseException

from opd_ray.config.schema import Config


def check_overrides(arguments: Sequence[str], *, config_dir: Path) -> None:
    """Raise ValueError for overrides that do not compose: an unknown key or choice, a value of the wrong type."""
    overrides = [argument for argument in arguments if not argument.startswith("-")]
    try:
        parsed = OverridesParser.create().parse_overrides(overrides)
        fixed = [str(o.input_line) for o in parsed if not o.is_sweep_override()]
        with initialize_config_dir(str(config_dir), version_base="1.3"):
            compose("train", overrides=fixed)
    except MissingConfigException as error:
        raise ValueError(_missing_choice(error)) from None
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(_explain(error)) from None


def known_keys(schema: type = Config, prefix: str = "") -> list[str]:
    """Return every key of the schema in dotted form."""
    keys = []
    hints = get_type_hints(schema)
    for field in fields(schema):
        key = f"{prefix}{field.name}"
        block = next((t for t in (hints[field.name], *get_args(hints[field.name])) if is_dataclass(t)), None)
        keys += [key] if block is None else [key, *known_keys(_as_type(block), f"{key}.")]
    return keys


def _as_type(block: Any) -> type:
    assert isinstance(block, type)
    return block


def _missing_choice(error: MissingConfigException) -> str:
    name = error.missing_cfg_file or "?"
    options = ", ".join(error.options or ()) or "none"
    group, _, choice = str(name).rpartition("/")
    return f"{group}={choice}: no such choice (available: {options})"


def _explain(error: Exception) -> str:
    """Reduce Hydra's and OmegaConf's nested messages to the key, what was given and what is near."""
    root: BaseException = error
    while root.__cause__ is not None and not getattr(root, "full_key", None):
        root = root.__cause__
    key = getattr(root, "full_key", None) or ""
    lines = str(root).splitlines() or [type(error).__name__]
    if "is not in struct" in str(root) or "not in struct" in str(error):
        near = difflib.get_close_matches(key, known_keys(), n=1, cutoff=0.5)
        return f"{key}: no such key" + (f"; did you mean {near[0]}?" if near else "")
    return f"{key}: {lines[0]}" if key else lines[0]
