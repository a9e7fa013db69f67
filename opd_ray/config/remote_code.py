"""Code that comes with a model runs in an engine only where a user allows it, and of a hub only the commit named."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from opd_ray.config.schema import Config
from opd_ray.routing import teacher_key, teachers_of

_COMMIT = re.compile(r"[0-9a-f]{40}")


def check_remote_code(config: Config) -> None:
    """Raise ValueError for an engine that would run whatever code a hub holds at the time."""
    check_engine_args("rollout.engine_args", config.rollout.engine_args, path=config.student.path)
    for name, teacher in teachers_of(config).by_name.items():
        key = teacher_key(name).removesuffix(".path")
        check_engine_args(f"{key}.engine_args", teacher.engine_args, path=teacher.path)


def check_engine_args(key: str, engine_args: Mapping[str, Any], *, path: str) -> None:
    """Raise ValueError when they allow a hub's code without a commit. path: of the model; a folder's code is there."""
    revision = engine_args.get("code_revision")
    if engine_args.get("trust_remote_code") and not Path(path).is_dir() and not _COMMIT.fullmatch(str(revision)):
        raise ValueError(
            f"{key}.trust_remote_code=true with code_revision={revision}: expected the 40 digits of a commit of {path}"
            " whose code you have read"
        )
