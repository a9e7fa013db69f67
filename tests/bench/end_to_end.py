"""Part `end_to_end`: whole updates of ours and of TRL's `DistillationTrainer`, from the same models and prompts.

The loss is the exact reverse KL in both, for AdamW at the same constant rate on as many prompts. Ours runs as its users
run it, by command. On policy it does what TRL does, and is held against it; with a batch of staleness it is shown.
"""

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from harness import Figure, at_most, run_script

_PART = "end_to_end"
_ROOT = Path(__file__).resolve().parents[2]
_MAX_KL_RATIO = 1.05  # the same but for the noise of sampling


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """What is trained, and for how long."""

    num_prompts: int  # an update, of one response each
    max_prompt_tokens: int
    max_response_tokens: int
    lr: float
    num_updates: int
    num_warm_up: int  # of the updates, not timed
    max_ratio: float  # of the seconds an update, ours to TRL's
    groups_per_call: int
    beta2: float = 0.95


SIZES = {
    "small": Size(
        num_prompts=128,
        max_prompt_tokens=24,
        max_response_tokens=13,
        lr=1e-3,
        num_updates=100,
        num_warm_up=10,
        max_ratio=1.0,
        groups_per_call=16,
    ),
    "larger": Size(
        num_prompts=64,
        max_prompt_tokens=32,
        max_response_tokens=256,
        lr=1e-4,
        num_updates=5,
        num_warm_up=1,
        max_ratio=0.5,
        groups_per_call=1,
    ),
}
# On policy the pools work in turn, each with both cores; else beside one another.
_OURS = {
    "on_policy": ["max_staleness=0", "cluster.threads_per_worker=2"],
    "staleness_1": ["max_staleness=1", "cluster.threads_per_worker=1"],
}


def end_to_end() -> Iterator[Figure]:
    """Yield the figures of the part; about 15 minutes on two cores."""
    for name, size in SIZES.items():
        with tempfile.TemporaryDirectory() as folder:
            yield from _compared(name, size, Path(folder))


def _compared(name: str, size: Size, folder: Path) -> Iterator[Figure]:
    run_script("end_to_end_setup.py", name, str(size.num_prompts * size.num_updates), str(folder))
    theirs = _rate(size, **run_script("end_to_end_trl.py", str(folder), json.dumps(asdict(size)), extra_packages=True))
    yield from theirs.figures(f"{name}_trl")
    for setting, overrides in _OURS.items():
        ours = _rate(size, **_run_ours(setting, size, folder, overrides))
        yield from ours.figures(f"{name}_{setting}")
        ratio, limit = ours.seconds / theirs.seconds, size.max_ratio if setting == "on_policy" else math.inf
        yield at_most(limit, part=_PART, name=f"{name}_{setting}_vs_trl", value=ratio, unit="of the time")
    students = ["student", "trl", *(f"runs/{setting}/export" for setting in _OURS)]
    kl: list[float] = run_script("end_to_end_kl.py", str(folder), str(size.max_response_tokens), *students)
    for student, value in zip(("before", "trl", *_OURS), kl, strict=True):
        yield Figure(part=_PART, name=f"{name}_{student}_kl", value=value, unit="nats/token")
    yield at_most(_MAX_KL_RATIO, part=_PART, name=f"{name}_on_policy_kl_vs_trl", value=kl[2] / kl[1], unit="ratio")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rate:
    seconds: float  # an update, mean
    tokens_per_s: float  # response tokens

    def figures(self, name: str) -> Iterator[Figure]:
        yield Figure(part=_PART, name=f"{name}_update", value=self.seconds, unit="s")
        yield Figure(part=_PART, name=f"{name}_speed", value=self.tokens_per_s, unit="tokens/s")


def _rate(size: Size, *, seconds: list[float], num_tokens: list[float]) -> _Rate:
    """Return the rate of the updates after the warm-up."""
    assert len(seconds) == len(num_tokens) == size.num_updates
    timed = sum(seconds[size.num_warm_up :])
    return _Rate(
        seconds=timed / (size.num_updates - size.num_warm_up),
        tokens_per_s=sum(num_tokens[size.num_warm_up :]) / timed,
    )


def _run_ours(setting: str, size: Size, folder: Path, overrides: list[str]) -> dict[str, Any]:
    """Run a job and return the seconds and response tokens of its updates, from its metrics."""
    command = [
        *(sys.executable, "-m", "opd_ray.train", f"name={setting}", f"runs_dir={folder}/runs"),
        *("data=jsonl", f"data.path={folder}/train.jsonl", f"data.eval_path={folder}/held_out.jsonl"),
        *(f"student.path={folder}/student", f"teacher.path={folder}/teacher", "tracking=none", "objective=full"),
        *("eval.num_prompts=1", "eval.samples_per_prompt=1", f"data.max_prompt_tokens={size.max_prompt_tokens}"),
        *(f"num_steps={size.num_updates}", f"batch.num_prompts={size.num_prompts}", "rollout.samples_per_prompt=1"),
        f"rollout.max_response_tokens={size.max_response_tokens}",
        f"rollout.groups_per_call={size.groups_per_call}",
        *(f"learner.lr={size.lr}", f"learner.beta2={size.beta2}", "learner.zero_stage=0", *overrides),
    ]
    done = subprocess.run(command, cwd=_ROOT, env=dict(os.environ), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} exited with {done.returncode}: {done.stderr[-2000:]}")
    rows = [json.loads(line) for line in (folder / "runs" / setting / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "time/step_s" in row]
    seconds = [row["time/step_s"] - row.get("time/eval_s", 0.0) for row in steps]
    tokens = [row["perf/tokens_per_s"] * row["time/step_s"] for row in steps]
    return {"seconds": seconds, "num_tokens": tokens}
