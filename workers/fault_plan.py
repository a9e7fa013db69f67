"""Faults on purpose, at named points of the real workers: for tests, and for `make chaos`. Without a plan, nothing.

A plan is a JSON file that the environment names: a list of `At` as objects. Each strikes once in all, also over
restarts: it leaves a file beside the plan first.
"""

import errno
import json
import math
import os
import signal
import time
from dataclasses import asdict, dataclass
from enum import StrEnum
from functools import cache
from pathlib import Path

import torch

from workers.lane import LANE

PLAN = "OPD_RAY_FAULT_PLAN"  # environment variable: the plan's path
_FOREVER_S = 1e6


class Phase(StrEnum):
    """The points of the workers where a fault can strike."""

    generate = "generate"  # a rollout worker's engine has the group; step: the version asked for
    prepare = "prepare"  # a rollout worker is given a version, which is the step
    commit = "commit"  # a rollout worker is about to load it
    score = "score"  # a teacher worker is given a group; step: the newest version that sampled it
    backward = "backward"  # a rank has a loss; step: the version that is updated
    optimize = "optimize"  # a rank is about to step its optimizer
    publish = "publish"  # a rank is about to publish a version, which is the step
    save = "save"  # a rank is about to write its part of a checkpoint; step: its updates


class Action(StrEnum):
    """What befalls the worker's process."""

    sigkill = "sigkill"
    sigstop = "sigstop"
    hang = "hang"  # the thread that got there waits without end
    disk_full = "disk_full"  # the call that got there fails as on a full disk
    out_of_memory = "out_of_memory"  # the call that got there fails as torch does when a GPU's memory is full
    not_finite = "not_finite"  # the numbers that got there become NaN; in backward


@dataclass(frozen=True, slots=True, kw_only=True)
class At:
    """A fault: where, whom and what."""

    step: int
    phase: Phase
    role: str
    index: int
    action: Action

    @property
    def name(self) -> str:
        """Return a name that no other fault of a plan has."""
        return f"{self.role}-{self.index}-{self.phase}-{self.step}-{self.action}"


def write_plan(path: Path, faults: list[At]) -> None:
    """Write a plan for the workers of a run that is started with its path in the environment."""
    path.write_text(json.dumps([asdict(fault) for fault in faults]))


def struck(path: Path) -> list[str]:
    """Return the names of the faults of a plan that have struck."""
    return sorted(mark.name.removeprefix(f"{path.name}.") for mark in path.parent.glob(f"{path.name}.*"))


def reach(phase: Phase, *, step: int) -> float:
    """Tell that this process's worker has got to a point; what is planned for it there happens now.

    Return what its numbers are to be multiplied with: 1, or NaN as planned.
    """
    factor = 1.0
    for fault in _planned(os.environ.get(PLAN, "")):
        here = f"{fault.role}-{fault.index}" == os.environ.get(LANE) and (fault.phase, fault.step) == (phase, step)
        if here and _is_first(fault):
            factor *= _strike(fault.action)
    return factor


@cache
def _planned(path: str) -> list[At]:
    return [At(**fault) for fault in json.loads(Path(path).read_text())] if path else []


def _is_first(fault: At) -> bool:
    try:
        Path(f"{os.environ[PLAN]}.{fault.name}").touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def _strike(action: Action) -> float:
    match action:
        case Action.sigkill:
            os.kill(os.getpid(), signal.SIGKILL)
        case Action.sigstop:
            os.kill(os.getpid(), signal.SIGSTOP)
        case Action.hang:
            time.sleep(_FOREVER_S)
        case Action.disk_full:
            raise OSError(errno.ENOSPC, "No space left on device (planned)")
        case Action.out_of_memory:
            raise torch.OutOfMemoryError("out of memory (planned)")
        case Action.not_finite:
            return math.nan
    return 1.0
