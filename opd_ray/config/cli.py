"""Checks the command line's overrides by composing once before Hydra does, to say in one line what is wrong."""

import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, cast, get_args, get_origin, get_type_hints

import yaml
from hydra import compose, initialize_config_dir
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from opd_ray.config.schema import Config

_UNKNOWN_KEY = (ConfigAttributeError, ConfigKeyError)
# Keys that were renamed, and names that other systems have for ours.
RENAMED = {
    "learner.learning_rate": "learner.lr",
    "learner.gradient_accumulation_steps": "learner.max_tokens_per_micro_batch, which counts tokens",
    "rollout.n": "rollout.samples_per_prompt",
    "rollout.num_generations": "rollout.samples_per_prompt",
    "rollout.max_new_tokens": "rollout.max_response_tokens",
    "rollout.max_tokens": "rollout.max_response_tokens",
    "objective.beta": "objective.jsd_beta",
    "objective.kl_coef": "nothing: the divergence is the loss itself",
    "batch.size": "batch.num_prompts",
    "max_steps": "num_steps",
    "student.model": "student.path",
    "teacher.model": "teacher.path",
}
_ENTRY = re.compile(r"\+*(?P<block>teachers|tasks)\.(?P<name>[^.=]+)[.=]")  # OmegaConf makes no typed entry key by key


def check_overrides(arguments: Sequence[str], *, config_dir: Path) -> list[str]:
    """Return the arguments with the flags before the overrides: Hydra refuses flags in between.

    Raises ValueError for overrides that do not compose: an unknown key or choice, a value of the wrong type. Of a
    sweep, every value is tried with the first value of the others.
    """
    flags = get_args_parser().parse_intermixed_args(list(arguments))  # knows which flags take a value
    if flags.shell_completion:
        return list(arguments)
    parsed = [_parse(argument) for argument in flags.overrides]
    for override in parsed:
        if override.is_sweep_override() and not flags.multirun:
            raise ValueError(
                f"{override.input_line}: several values are a sweep, which needs --multirun; one value with a comma"
                " needs quotes inside: key='\"a,b\"'"
            )
    with initialize_config_dir(str(config_dir), version_base="1.3"):
        for overrides in _combinations(parsed):
            _compose(overrides)
    return [a for a in arguments if a not in flags.overrides] + list(flags.overrides)


def known_keys(schema: type = Config, prefix: str = "") -> list[str]:
    """Return every key of the schema in dotted form, with `*` for the keys that the user names."""
    keys = []
    hints = get_type_hints(schema)
    for field in fields(schema):
        key = f"{prefix}{field.name}"
        block = next((t for t in (hints[field.name], *get_args(hints[field.name])) if is_dataclass(t)), None)
        keys.append(key)
        if isinstance(block, type):
            of_any = get_origin(hints[field.name]) is dict
            keys += known_keys(block, f"{key}.*." if of_any else f"{key}.")
    return keys


def _parse(argument: str) -> Override:
    try:
        override = OverridesParser.create().parse_override(argument)
        if not override.key_or_group:
            raise OverrideParseException(override=argument, message="no key")
        return override
    except HydraException:
        raise ValueError(
            f"{argument}: not of the form key=value; a value with special characters needs quotes inside:"
            " key='\"value\"', key='[\"value\"]'"
        ) from None


def _combinations(parsed: Sequence[Override]) -> Iterator[list[str]]:
    """Yield override lists: the first value of every sweep, then each further value by itself."""
    values = [_values(override) for override in parsed]
    yield [v[0] for v in values]
    for position, alternatives in enumerate(values):
        for value in alternatives[1:]:
            yield [value if i == position else v[0] for i, v in enumerate(values)]


def _values(override: Override) -> list[str]:
    if not override.is_sweep_override():
        return [str(override.input_line)]
    key = override.get_key_element()
    if override.is_interval_sweep():  # of an optimising sweeper: its two ends
        interval = cast(IntervalSweep, override.value())
        return [f"{key}={interval.start}", f"{key}={interval.end}"]
    return [f"{key}={value}" for value in override.sweep_string_iterator()]


def _compose(overrides: list[str]) -> None:
    try:
        composed = compose("train", overrides=overrides)
        OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.to_container(composed))  # refuses what a `+` has added
    except MissingConfigException as error:
        raise ValueError(_missing_choice(error)) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"{mark.name}, line {mark.line + 1}" if mark else "configs"
        raise ValueError(f"{where}: not YAML ({error.problem})") from None
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise ValueError(_explain(error, overrides=overrides)) from None


def _missing_choice(error: MissingConfigException) -> str:
    options = ", ".join(error.options or ()) or "none"
    group, _, choice = str(error.missing_cfg_file or "?").rpartition("/")
    return f"{group}={choice}: no such choice (available: {options})"


def _explain(error: Exception, *, overrides: Sequence[str]) -> str:
    """Reduce Hydra's and OmegaConf's nested messages to the key, what was given and what is near."""
    root: BaseException = error
    while root.__cause__ is not None and not getattr(root, "full_key", None):
        root = root.__cause__
    key = str(getattr(root, "full_key", None) or "")
    first_line = (str(root).splitlines() or [type(error).__name__])[0]
    for override in overrides:
        entry = _ENTRY.match(override)
        if entry and key in (entry["name"], f"{entry['block']}.{entry['name']}"):
            block, name = entry["block"], entry["name"]
            return f"{block}.{name}: no such entry yet; add it whole: '+{block}={{{name}: {{...}}}}'"
    if not isinstance(root, _UNKNOWN_KEY):
        return f"{key}: {first_line}" if key else f"{first_line} (given: {' '.join(overrides)})"
    if ".engine_args." in key:
        return f"{key}: engine_args holds no such key yet; add it with a plus: +{key}=..."
    if key in RENAMED:
        return f"{key}: no such key; here it is {RENAMED[key]}"
    near = _near(key)
    return f"{key}: no such key" + (f"; did you mean {near}?" if near else "")


def _near(key: str) -> Any:
    """Return the known key that a wrong one most likely stands for: the same last part, or similar letters.

    A key of the whole run goes before one of a single task or teacher.
    """
    keys = known_keys()
    same_end = [k for k in keys if k.rpartition(".")[2] == key.rpartition(".")[2]]
    return next(
        iter(
            sorted(same_end, key=lambda k: ("*" in k, len(k))) or difflib.get_close_matches(key, keys, n=1, cutoff=0.5)
        ),
        None,
    )
