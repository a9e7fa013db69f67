"""What a person sees while a run goes on: phases, a progress bar or a line a step, and the final table."""

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from opd_ray.pipeline import bottleneck
from opd_ray.protocol import Metrics

_LOSS_EVERY = 50  # steps
_STEP_PARTS = {
    "time/step_s": "median step",
    "time/wait_rollout_s": "  waiting for rollouts",
    "time/wait_teacher_s": "  then for the last score",
    "time/update_s": "  update",
    "time/publish_s": "  publishing weights",
}


class RunConsole:
    """Owns the terminal of a run."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(highlight=False, soft_wrap=True)
        self._progress: Progress | None = None
        self.phase_seconds: dict[str, float] = {}

    def say(self, text: str) -> None:
        """Print one line, above a progress bar if there is one."""
        self._console.print(text, markup=False)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Name a part of the run and keep its seconds for the final table."""
        start = time.perf_counter()
        with self._console.status(f"{name} ..."):
            yield
        self._end_phase(name, time.perf_counter() - start)

    @contextmanager
    def progress_phase(self, name: str, *, num_steps: int, done: int = 0) -> Iterator["StepLine"]:
        """As `phase`, with a progress bar on a terminal and plain lines elsewhere."""
        start = time.perf_counter()
        line = StepLine(self._console, name=name, num_steps=num_steps, done=done)
        with line:
            yield line
        self._end_phase(name, time.perf_counter() - start)

    def table(self, title: str, rows: Sequence[tuple[str, str]]) -> None:
        """Print name and value pairs."""
        table = Table(title=title, show_header=False, title_justify="left")
        for name, value in rows:
            table.add_row(name, value)
        self._console.print(table)

    def _end_phase(self, name: str, seconds: float) -> None:
        self.phase_seconds[name] = self.phase_seconds.get(name, 0.0) + seconds
        self.say(f"{name}: {seconds:.1f} s")


class StepLine:
    """One line of numbers that moves on with every step."""

    def __init__(self, console: Console, *, name: str, num_steps: int, done: int) -> None:
        self._console = console
        self._name = name
        self._num_steps = num_steps
        self._start, self._first = time.perf_counter(), done
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, console=console) if console.is_terminal else None
        self._task = self._bar.add_task(name, total=num_steps, completed=done, numbers="") if self._bar else None

    def __enter__(self) -> "StepLine":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def say(self, text: str) -> None:
        """Print one line, above the bar if there is one."""
        self._console.print(text, markup=False)

    def show_step(self, step: int, metrics: Metrics) -> None:
        """Move on by a training step."""
        self._move(step, step_numbers(metrics))

    def show_loss(self, step: int, loss: float) -> None:
        """Move on by a step of supervised training; without a terminal say so now and then only."""
        if self._bar or step % _LOSS_EVERY == 0 or step == self._num_steps:
            self._move(step, f"loss {loss:.3f}")

    def _move(self, step: int, numbers: str) -> None:
        if self._bar and self._task is not None:
            self._bar.update(self._task, completed=step, numbers=numbers)
            return
        passed = time.perf_counter() - self._start
        left = passed / max(step - self._first, 1) * (self._num_steps - step)
        remaining = f"  left {_clock(left)}" if step > self._first else ""
        self._console.print(f"{self._name} {step}/{self._num_steps}  {numbers}{remaining}", markup=False)


def step_numbers(metrics: Metrics) -> str:
    """Return the numbers of a step in one short line; those it does not have are left out."""
    kl = next((name for name in metrics if name.startswith("distill/reverse_kl")), "")
    forms = {
        "train/loss": "loss {:.4f}",
        kl: "kl {:.4f}",
        "rollout/accuracy": "acc {:.2f}",
        "eval/accuracy": "eval acc {:.3f}",
        "eval/reverse_kl": "eval kl {:.4f}",
        "rollout/logprob_gap_max": "gap {:.0e}",
        "perf/tokens_per_s": "{:,.0f} tok/s",
        "time/step_s": "{:.2f} s",
    }
    numbers = [form.format(metrics[name]) for name, form in forms.items() if name in metrics]
    return "  ".join([*numbers, *filter(None, [bottleneck(metrics)])])


def step_breakdown(history: Sequence[Mapping[str, float]]) -> list[tuple[str, str]]:
    """Return the median step time and the medians of its parts, as rows of a table."""
    rows = []
    for key, name in _STEP_PARTS.items():
        values = [m[key] for m in history if key in m]
        if values:
            rows.append((name, f"{statistics.median(values):.3f} s"))
    return rows


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"
