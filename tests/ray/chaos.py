"""`make chaos`: every fault of a list, each in a run of its own, then a long run full of them; prints a table.

All on the real stack with tiny models. A case is survived when the run ends well, with every update in metrics.jsonl
and the fault in events.jsonl; where the run is deterministic, also with the undisturbed run's weights, bit for bit.
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
from faulty_runs import Outcome, run_to_end
from head_node import PROJECT
from stack_fixtures import run_overrides, write_model

from workers.fault_plan import Action, At, Phase

_ROLLOUT, _TEACHER, _LEARNER = "rollout", "teacher", "learner"
_KILL, _STOP, _HANG, _FULL = Action.sigkill, Action.sigstop, Action.hang, Action.disk_full
_NUM_STEPS, _CASE_LIMIT_S = 6, 300.0
_SOAK_STEPS, _SOAK_EVERY, _SOAK_LIMIT_S = 200, 10, 3000.0
_FILE = PROJECT / "runs" / "chaos" / "chaos.json"
_COMMON = ("deterministic=true", "save_every=2", "save_total_limit=3", "max_failed_saves=1", "fault.backoff_s=0.1")
_LIMITS = ("fault.hang_timeout_s=10", "fault.call_timeout_s=150")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A fault, and how the run takes it."""

    at: At
    event: str
    loose: tuple[str, ...] = ()  # how the run is not deterministic: a rollout worker is then started anew in its place
    rounded: bool = False  # sums are taken in another order, or sampling is not deterministic
    more: tuple[str, ...] = ()

    @property
    def words(self) -> str:
        """Return the fault in a few words."""
        at = self.at
        beside = " written beside training" if "async_save=true" in self.more else ""
        others = {(): "", _LOOSE: ", others go on", _LONE: ", the only one"}[self.loose]
        return f"{at.action.value.replace('_', ' ')} of {at.role}-{at.index} in {at.phase.value}{others}{beside}"


def _case(at: At, *, event: str = "", loose: tuple[str, ...] = (), rounded: bool = False, more: str = "") -> Case:
    in_place = at.role == _TEACHER or loose
    expected = event or ("worker_restarted" if in_place else "workers_restarted")
    return Case(at=at, event=expected, loose=loose, rounded=rounded or bool(loose), more=(*loose, *more.split()))


def _at(role: str, index: int, phase: Phase, action: Action, step: int = 3) -> At:
    return At(step=step, phase=phase, role=role, index=index, action=action)


_LOOSE = ("deterministic=false", "rollout.num_workers=2", "cluster.num_cpus=4")
_LONE = ("deterministic=false",)  # there is no other
_GO_BACK = "learner.max_skipped_steps=0 learner.on_skipped_steps=rollback"
CASES = (
    _case(_at(_ROLLOUT, 0, Phase.generate, _KILL)),
    _case(_at(_ROLLOUT, 0, Phase.prepare, _KILL)),
    _case(_at(_ROLLOUT, 0, Phase.commit, _KILL)),
    _case(_at(_ROLLOUT, 0, Phase.generate, _STOP)),
    _case(_at(_ROLLOUT, 0, Phase.generate, _HANG)),
    _case(_at(_ROLLOUT, 1, Phase.generate, _KILL), loose=_LOOSE),
    _case(_at(_ROLLOUT, 0, Phase.prepare, _KILL), loose=_LOOSE),
    _case(_at(_ROLLOUT, 1, Phase.commit, _KILL), loose=_LOOSE),
    _case(_at(_ROLLOUT, 0, Phase.generate, _STOP), loose=_LOOSE),
    _case(_at(_TEACHER, 0, Phase.score, _KILL)),
    _case(_at(_TEACHER, 0, Phase.score, _STOP)),
    _case(_at(_LEARNER, 1, Phase.backward, _KILL)),
    _case(_at(_LEARNER, 0, Phase.optimize, _KILL)),
    _case(_at(_LEARNER, 0, Phase.publish, _KILL)),
    _case(_at(_LEARNER, 1, Phase.save, _KILL, 4)),
    _case(_at(_LEARNER, 0, Phase.backward, _STOP)),
    _case(_at(_LEARNER, 1, Phase.optimize, _HANG), more="fault.call_timeout_s=15"),
    _case(_at(_LEARNER, 1, Phase.save, _KILL, 4), more="async_save=true"),
    _case(_at(_LEARNER, 1, Phase.save, _FULL, 4), event="checkpoint_failed"),
    _case(_at(_LEARNER, 1, Phase.backward, Action.out_of_memory), event="micro_batches_halved", rounded=True),
    _case(_at(_LEARNER, 1, Phase.backward, Action.not_finite), event="rolled_back", rounded=True, more=_GO_BACK),
    _case(_at(_ROLLOUT, 0, Phase.generate, _KILL), loose=_LONE),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A line of the table."""

    fault: str
    tried: int
    survived: int
    same_weights: str
    seconds_lost: float
    remark: str = ""

    def __str__(self) -> str:
        return f"| {self.fault} | {self.tried} | {self.survived} | {self.same_weights} | {self.seconds_lost:.0f} |"


class Chaos:
    """Runs the cases in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._models = [str(folder / name) for name in ("student", "teacher")]
        for path, seed, width in zip(self._models, (1, 2), (64, 128), strict=True):
            write_model(Path(path), seed=seed, hidden_size=width, tied=False)
        self._whole: dict[tuple[str, ...], Outcome] = {}

    def cases(self, names: list[str]) -> Iterator[Row]:
        """Yield a row for every case whose words hold one of the names, or for all."""
        for number, case in enumerate(CASES):
            if not names or any(name in case.words for name in names):
                yield self._row(f"case{number}", case)

    def soak(self, *, seed: int, num_steps: int) -> Iterator[Row]:
        """Yield the row of a long run with a random fault about every ten updates, and rows of what must stay flat."""
        faults = random_faults(seed=seed, num_steps=num_steps)
        whole = self._undisturbed((), num_steps=num_steps)
        meter = Meter()
        outcome = self._run("soak", (), num_steps=num_steps, faults=faults, limit_s=_SOAK_LIMIT_S, watch=meter)
        survived = outcome.exit_code == 0 and outcome.steps == list(range(num_steps + 1))
        yield Row(
            fault=f"soak: {num_steps} updates, seed {seed}",
            tried=len(outcome.struck),
            survived=len(outcome.struck) if survived else 0,
            same_weights="yes" if outcome.weights == whole.weights else "NO",
            seconds_lost=outcome.seconds - whole.seconds,
            remark="" if survived else outcome.output[-3000:],
        )
        print(meter.words(), flush=True)

    def _row(self, name: str, case: Case) -> Row:
        whole = self._undisturbed(case.loose, num_steps=_NUM_STEPS)
        outcome = self._run(name, case.more, num_steps=_NUM_STEPS, faults=[case.at], limit_s=_CASE_LIMIT_S)
        survived = (
            outcome.exit_code == 0 and outcome.steps == list(range(_NUM_STEPS + 1)) and case.event in outcome.events
        )
        same = "yes" if outcome.weights == whole.weights else "NO"
        return Row(
            fault=case.words,
            tried=len(outcome.struck),
            survived=int(survived),
            same_weights="not asked" if case.rounded else same,
            seconds_lost=outcome.seconds - whole.seconds,
            remark="" if survived else f"exit {outcome.exit_code}, {outcome.steps}, {outcome.output[-3000:]}",
        )

    def _undisturbed(self, more: tuple[str, ...], *, num_steps: int) -> Outcome:
        key = (*more, str(num_steps))
        if key not in self._whole:
            self._whole[key] = self._run(f"whole{len(self._whole)}", more, num_steps=num_steps, limit_s=_SOAK_LIMIT_S)
            if self._whole[key].exit_code:
                raise RuntimeError(self._whole[key].output)
        return self._whole[key]

    def _run(self, name: str, more: tuple[str, ...], *, num_steps: int, limit_s: float, **rest: object) -> Outcome:
        student, teacher = self._models
        arguments = run_overrides(self._folder / "runs", student=student, teacher=teacher)
        chosen = (*_COMMON, *_LIMITS, f"num_steps={num_steps}", "eval_every=1000", f"name={name}", *more)
        run_dir = self._folder / "runs" / name
        return run_to_end([*arguments, *chosen], run_dir=run_dir, limit_s=limit_s, **rest)  # type: ignore[arg-type]


def random_faults(*, seed: int, num_steps: int) -> list[At]:
    """Return a fault for about every ten updates, each at another place; the same for the same seed."""
    draw = random.Random(seed)
    places = [
        (_ROLLOUT, 0, Phase.generate),
        (_ROLLOUT, 0, Phase.prepare),
        (_ROLLOUT, 0, Phase.commit),
        (_TEACHER, 0, Phase.score),
        (_LEARNER, 0, Phase.backward),
        (_LEARNER, 1, Phase.backward),
        (_LEARNER, 0, Phase.optimize),
        (_LEARNER, 1, Phase.publish),
        (_LEARNER, 1, Phase.save),
    ]
    faults = []
    for start in range(_SOAK_EVERY // 2, num_steps - _SOAK_EVERY, _SOAK_EVERY):
        role, index, phase = draw.choice(places)
        step = start + draw.randrange(_SOAK_EVERY - 1)
        step += step % 2 if phase is Phase.save else 0  # there is a save after every second
        action = _STOP if draw.random() < 0.1 else _KILL
        faults.append(At(step=step, phase=phase, role=role, index=index, action=action))
    return faults


class Meter:
    """Looks at a run now and then: what of memory, files and shared memory its driver and its cluster hold."""

    def __init__(self) -> None:
        self._next = 0.0
        self._seen: list[tuple[int, float, int, float, int]] = []

    def __call__(self, run: "subprocess.Popen[str]", run_dir: Path) -> None:
        """Take a look, every five seconds."""
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + 5
        try:
            driver = psutil.Process(run.pid)
            shared = shutil.disk_usage("/dev/shm").used  # unlinked files count
            path = run_dir / "metrics.jsonl"
            step = path.read_text().count("\n") if path.exists() else 0
            processes = len(driver.children(recursive=True))
            self._seen.append((step, driver.memory_info().rss / 1e6, driver.num_fds(), shared / 1e6, processes))
        except (psutil.Error, OSError):
            return

    def words(self) -> str:
        """Return the largest figures of the run's second and last quarter, side by side."""
        last = max(step for step, *_ in self._seen)
        parts = [[seen for seen in self._seen if a * last <= seen[0] <= b * last] for a, b in ((0.25, 0.5), (0.75, 1))]
        names = ("driver's memory, MB", "driver's open files", "shared memory, MB", "processes")
        lines = [
            f"| {name} | {' | '.join(f'{max(seen[i] for seen in part):.0f}' for part in parts)} |"
            for i, name in enumerate(names, start=1)
        ]
        return "\n".join(["| largest in the soak's | second quarter | last quarter |", "|---|---|---|", *lines])


def main() -> int:
    """Run what is asked for; 1 when a fault was not survived."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=[], help="cases whose words hold one of these")
    parser.add_argument("--no-soak", action="store_true")
    parser.add_argument("--no-cases", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=_SOAK_STEPS)
    asked = parser.parse_args()
    print("| fault | tried | survived | same weights | seconds lost |\n|---|---|---|---|---|", flush=True)
    done = []
    with tempfile.TemporaryDirectory() as folder:
        chaos = Chaos(Path(folder))
        parts = [] if asked.no_cases else [chaos.cases(asked.only)]
        parts += [] if asked.no_soak else [chaos.soak(seed=asked.seed, num_steps=asked.steps)]
        for rows in parts:
            for row in rows:
                print(row, *([row.remark] if row.remark else []), sep="\n", flush=True)
                done.append(row)
    _FILE.parent.mkdir(parents=True, exist_ok=True)
    _FILE.write_text(
        json.dumps([{name: getattr(row, name) for name in Row.__slots__} for row in done], indent=1) + "\n"
    )
    bad = [row for row in done if row.tried == 0 or row.survived < row.tried or row.same_weights == "NO"]
    for row in bad:
        print(f"not survived: {row.fault}", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
