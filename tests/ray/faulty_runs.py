"""Runs of the command line whose workers meet a fault by plan, and what came of them."""

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import psutil
from head_node import PROJECT

from workers.fault_plan import PLAN, At, struck, write_plan

Watch = Callable[["subprocess.Popen[str]", Path], None]
_LOOK_EVERY_S = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What is left of a run that has ended."""

    exit_code: int
    output: str
    run_dir: Path
    seconds: float
    struck: tuple[str, ...] = ()  # names of the faults that there were

    @property
    def weights(self) -> str:
        """Return a hash of the exported student's weights, empty without one."""
        path = self.run_dir / "export" / "model.safetensors"
        return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else ""

    @property
    def steps(self) -> list[int]:
        """Return the updates in metrics.jsonl."""
        return [row["step"] for row in self.rows("metrics.jsonl")]

    @property
    def events(self) -> list[str]:
        """Return the kinds of events.jsonl."""
        return [row["kind"] for row in self.rows("events.jsonl")]

    def rows(self, name: str) -> list[dict[str, Any]]:
        """Return the lines of a file of the run dir."""
        return rows(self.run_dir / name)


def run_to_end(
    arguments: Sequence[str],
    *,
    run_dir: Path,
    limit_s: float,
    faults: Sequence[At] = (),
    watch: Watch = lambda *_: None,
    env: Mapping[str, str] = MappingProxyType({}),
) -> Outcome:
    """Run a command line whose run dir is to be `run_dir`; watch is called again and again meanwhile.

    One that has not ended after the limit is killed, and its exit code is that of SIGKILL.
    """
    plan = run_dir.with_name(f"{run_dir.name}.plan.json")
    plan.parent.mkdir(parents=True, exist_ok=True)
    write_plan(plan, list(faults))
    log = run_dir.with_name(f"{run_dir.name}.out")
    start = time.monotonic()
    with log.open("w") as file:
        run = subprocess.Popen(
            [sys.executable, "-m", "opd_ray.train", *arguments],
            cwd=PROJECT,
            env={**os.environ, **env, PLAN: str(plan)},
            stdout=file,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            while run.poll() is None and time.monotonic() - start < limit_s:
                watch(run, run_dir)
                time.sleep(_LOOK_EVERY_S)
        finally:
            run.kill()
            run.wait()
    return Outcome(
        exit_code=run.returncode,
        output=log.read_text(),
        run_dir=run_dir,
        seconds=time.monotonic() - start,
        struck=tuple(struck(plan)),
    )


def worker_process(run: "subprocess.Popen[str]", name: str) -> psutil.Process:
    """Return the process of a worker of a run, by the log that it writes to."""
    for process in psutil.Process(run.pid).children(recursive=True):
        if "ray::" in " ".join(process.cmdline()) and any(
            file.path.endswith(f"/{name}.log") for file in process.open_files()
        ):
            return process
    raise AssertionError(f"no {name}")


def rows(path: Path) -> list[dict[str, Any]]:
    """Return a file's whole lines."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.split("\n")[:-1]]
