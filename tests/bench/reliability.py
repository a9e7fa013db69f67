"""Part `reliability`: what a checkpoint costs, and how long after the loss of a worker the next update is finished.

A student of 20 million parameters on two ranks (ZeRO-2), a checkpoint after every update, by command.
"""

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
from harness import Figure, run_script

_PART = "reliability"
_ROOT = Path(__file__).resolve().parents[2]
_NUM_UPDATES, _NUM_PROMPTS = 8, 16
_LOST = ("learner-1", "rollout-0", "teacher-0")
_AT_STEP = 3
_MAX_S = 600.0


def reliability() -> Iterator[Figure]:
    """Yield the figures of the part; about 11 minutes on two cores."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run_script("end_to_end_setup.py", "larger", str(_NUM_UPDATES * _NUM_PROMPTS), name)
        seconds = {
            name: _step_s(_run(folder, name, *more))
            for name, more in {
                "none": ("save_every=0",),
                "synchronous": (),
                "asynchronous": ("async_save=true",),
            }.items()
        }
        yield from _checkpoints(folder / "runs" / "synchronous", seconds)
        for worker in _LOST:
            yield Figure(part=_PART, name=f"{worker}_killed_to_next_update", value=_lost(folder, worker), unit="s")


def _step_s(run_dir: Path) -> float:
    """Return the median time of a step, with the checkpoint before it."""
    return statistics.median([row["time/step_s"] for row in _rows(run_dir / "metrics.jsonl")[3:]])


def _checkpoints(run_dir: Path, step_s: Mapping[str, float]) -> Iterator[Figure]:
    """Yield the size of a checkpoint, and what one in every step adds to it. step_s: of runs, by their saves."""
    manifest = next(run_dir.glob("checkpoints/step-*/MANIFEST.json"))
    size = sum(file["bytes"] for file in json.loads(manifest.read_text())["files"].values())
    yield Figure(part=_PART, name="checkpoint_size", value=size / 1e6, unit="MB")
    yield Figure(part=_PART, name="step_without_checkpoint", value=step_s["none"], unit="s")
    for kind in ("synchronous", "asynchronous"):
        added = step_s[kind] - step_s["none"]
        yield Figure(part=_PART, name=f"{kind}_checkpoint", value=added, unit="s more a step")
        yield Figure(part=_PART, name=f"{kind}_checkpoint_share", value=added / step_s[kind], unit="of a step with one")


def _lost(folder: Path, worker: str) -> float:
    """Return the seconds from a kill in the middle of a run to the end of the first update after it."""
    killed_at: list[float] = []

    def kill(run: subprocess.Popen[str], run_dir: Path) -> None:
        if not killed_at and _num_steps(run_dir) > _AT_STEP:
            _process(run, worker).send_signal(signal.SIGKILL)
            killed_at.append(time.time())

    run_dir = _run(folder, worker, each_look=kill)
    (event,) = [row for row in _rows(run_dir / "events.jsonl") if row["kind"].endswith("_restarted")]
    ends = [row["end"] for row in _rows(run_dir / "spans.jsonl")]
    return min(end for end in ends if end > event["time"]) - killed_at[0]


def _run(folder: Path, name: str, *more: str, each_look: Any = lambda *_: None) -> Path:
    """Run a job to its end and return its run dir. each_look: is called again and again with the process meanwhile."""
    command = [
        *(sys.executable, "-m", "opd_ray.train", f"name={name}", f"runs_dir={folder}/runs", "save_every=1"),
        *("data=jsonl", f"data.path={folder}/train.jsonl", f"data.eval_path={folder}/held_out.jsonl"),
        *(f"student.path={folder}/student", f"teacher.path={folder}/teacher", "tracking=none", "objective=support"),
        *("eval.num_prompts=2", "eval.samples_per_prompt=1", "data.max_prompt_tokens=32", "learner.num_ranks=2"),
        *(f"num_steps={_NUM_UPDATES}", f"batch.num_prompts={_NUM_PROMPTS}", "rollout.samples_per_prompt=1"),
        *("rollout.max_response_tokens=64", "save_total_limit=0", "fault.backoff_s=0"),
        *more,
    ]
    run_dir, until = folder / "runs" / name, time.monotonic() + _MAX_S
    with subprocess.Popen(
        command, cwd=_ROOT, env=dict(os.environ), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as run:
        while run.poll() is None and time.monotonic() < until:
            each_look(run, run_dir)
            time.sleep(0.02)
        run.kill()
        _, errors = run.communicate()
    if run.returncode:
        raise RuntimeError(f"{' '.join(command)} exited with {run.returncode}: {errors[-2000:]}")
    return run_dir


def _process(run: subprocess.Popen[str], worker: str) -> psutil.Process:
    """Return the process of a worker, by the log that it writes to."""
    for process in psutil.Process(run.pid).children(recursive=True):
        if any(file.path.endswith(f"/{worker}.log") for file in process.open_files()):
            return process
    raise RuntimeError(f"no {worker}")


def _num_steps(run_dir: Path) -> int:
    return len(_rows(run_dir / "metrics.jsonl"))


def _rows(path: Path) -> list[dict[str, Any]]:
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.split("\n")[:-1]]
