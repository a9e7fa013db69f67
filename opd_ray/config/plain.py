"""Command lines of `key=value` over a small dataclass, for entry points without Hydra's groups."""

import difflib
import sys
from collections.abc import Sequence
from dataclasses import MISSING, Field, field, fields
from typing import Any, TypeVar, cast, get_args, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

T = TypeVar("T")


def key(default: Any, *, words: str) -> Any:
    """Return a field with a default (`...`: it must be given) and what `--help` says of it."""
    if default is ...:
        return field(metadata={"words": words})
    if isinstance(default, dict | list):
        return field(default_factory=lambda: type(default)(default), metadata={"words": words})
    return field(default=default, metadata={"words": words})


def read_command_line(schema: type[T], arguments: Sequence[str], *, usage: str) -> T:
    """Return the configuration that a command line gives; `--help` prints the keys and ends the process.

    The value of a key that holds text is taken as it is, but for `null`; others are YAML.
    Raises ValueError for what is not key=value, an unknown or missing key, a value of the wrong type.
    """
    keys: dict[str, Field[Any]] = {f.name: f for f in fields(schema)}  # type: ignore[arg-type]
    if any(argument in ("-h", "--help") for argument in arguments):
        print(f"{usage.strip()}\n\nKeys\n\n{_table(list(keys.values()))}")
        sys.exit(0)
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        if not equals:
            raise ValueError(f"{argument}: expected key=value; --help lists the keys")
        if name.partition(".")[0] not in keys:
            near = difflib.get_close_matches(name, keys, n=1, cutoff=0.4)
            hint = f"; did you mean {near[0]}?" if near else f" (there are {', '.join(keys)})"
            raise ValueError(f"{name}: no such key{hint}")
    texts = {name for name, hint in get_type_hints(schema).items() if str in (hint, *get_args(hint))}
    given = dict(argument.split("=", 1) for argument in arguments)
    others = [f"{name}={value}" for name, value in given.items() if name not in texts]
    try:
        merged = OmegaConf.merge(
            OmegaConf.structured(schema),
            OmegaConf.from_dotlist(others),
            {name: None if value == "null" else value for name, value in given.items() if name in texts},
        )
        missing = sorted(OmegaConf.missing_keys(merged))
        if missing:
            raise ValueError(f"{missing[0]} is not given: {keys[missing[0]].metadata['words']}")
        return cast(T, OmegaConf.to_object(merged))
    except OmegaConfBaseException as error:
        raise ValueError(f"{error.full_key}: {str(error).splitlines()[0]}") from None


def _table(keys: Sequence[Field[Any]]) -> str:
    width = max(len(k.name) for k in keys) + 2
    return "\n".join(f"  {k.name:<{width}}{k.metadata['words']}{_default(k)}" for k in keys)


def _default(k: Field[Any]) -> str:
    if k.default is MISSING:
        return "" if k.default_factory is not MISSING else " (must be given)"
    return "" if k.default is None else f" ({k.default})"
