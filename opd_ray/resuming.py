"""Where a run goes on: its checkpoints, what they are told to belong to, and whether the run is still that run."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from opd_ray.checkpoints import DiskCheckpoints
from opd_ray.config.schema import Config, ResumePolicy
from opd_ray.manifest import read_manifest
from opd_ray.plan import Plan
from opd_ray.protocol import Prompt
from opd_ray.routing import teachers_of
from opd_ray.scores.manifest import vocabulary_key
from opd_ray.state import RunDir
from opd_ray.versions import versions

_FREE = (
    "resume",
    "num_steps",
    "save_every",
    "save_total_limit",
    "async_save",
    "max_failed_saves",
    "eval_every",
    "runs_dir",
)
_MAX_SHOWN = 5


def open_checkpoints(
    config: Config, plan: Plan, *, run_dir: RunDir, warn: Callable[[str, str], None]
) -> tuple[int, DiskCheckpoints]:
    """Return the step to go on from, 0 for a new run, and the run's checkpoints. Raises ValueError."""
    checkpoints = DiskCheckpoints(
        folder=run_dir.checkpoints,
        facts=run_facts(config, plan),
        keep=config.save_total_limit,
        max_failed_saves=config.max_failed_saves,
        warn=warn,
    )
    step = checkpoints.newest() if config.resume is ResumePolicy.auto else 0
    if step:
        path = checkpoints.path(step)
        for words in check_facts(read_manifest(path), checkpoints.facts, where=str(path)):
            warn(words, "run_changed")
    return step, checkpoints


def run_facts(config: Config, plan: Plan) -> dict[str, Any]:
    """Return what is written into the manifest of each of a run's checkpoints, ready for JSON."""
    settings = json.loads(json.dumps(asdict(config)))
    return {
        "num_ranks": config.learner.num_ranks,
        "zero_stage": config.learner.zero_stage,
        "config": settings,
        "config_sha256": _sha256(settings),
        "data_sha256": _data_sha256(plan.prompts.train),
        "tokenizer": vocabulary_key(plan.models.tokenizer),
        "teachers": {
            name: {"path": teacher.path, "sha256": _folder_sha256(Path(teacher.path))}
            for name, teacher in teachers_of(config).by_name.items()
        },
        "versions": versions(),
    }


def check_facts(written: Mapping[str, Any], now: Mapping[str, Any], *, where: str) -> list[str]:
    """Return warnings of what has changed since a checkpoint. Raises ValueError for what it cannot go on with."""
    for key, name in (("zero_stage", "learner.zero_stage"), ("num_ranks", "learner.num_ranks")):
        if written[key] != now[key] and written["zero_stage"] > 0:
            raise ValueError(
                f"{name}={now[key]}: {where} was written with {name}={written[key]}, and the ranks' parts of the"
                f" optimizer fit no other; expected {name}={written[key]}, or another name=... with"
                " student.path=<an export>"
            )
    if written["zero_stage"] != now["zero_stage"]:
        raise ValueError(f"learner.zero_stage={now['zero_stage']}: {where} was written with 0; expected 0")
    if written["tokenizer"] != now["tokenizer"]:
        raise ValueError(f"student.path: {where} was written with another tokenizer; expected the same")
    warnings = []
    if written["data_sha256"] != now["data_sha256"]:
        warnings.append(f"data: the training prompts are not those that {where} was trained on")
    for name, teacher in now["teachers"].items():
        known = written["teachers"].get(name)
        if isinstance(known, dict) and known["path"] == teacher["path"] and known != teacher:
            warnings.append(f"{name}: the model in {teacher['path']} is not the one that {where} learned from")
    before, after = _flat(written["config"]), _flat(now["config"])
    changed = [
        f"{key} ({before.get(key)} before, {after.get(key)} now)"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key) and key not in _FREE
    ]
    if changed:
        more = f" and {len(changed) - _MAX_SHOWN} more" if len(changed) > _MAX_SHOWN else ""
        warnings.append(f"the configuration is not that of {where}: {', '.join(changed[:_MAX_SHOWN])}{more}")
    return warnings


def _data_sha256(prompts: list[Prompt]) -> str:
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(prompt.ids_P.tobytes())
        digest.update(json.dumps([prompt.index, prompt.task, prompt.answer]).encode())
    return digest.hexdigest()


def _folder_sha256(folder: Path) -> str | None:
    """Return a hash of a model's settings and of the names and sizes of its files; None for a hub name."""
    if not folder.is_dir():
        return None
    files = sorted(path for path in folder.iterdir() if path.is_file())
    settings = {path.name: path.read_text(errors="replace") for path in files if path.suffix == ".json"}
    return _sha256([settings, [(path.name, path.stat().st_size) for path in files]])


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings by dotted key."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return flat
