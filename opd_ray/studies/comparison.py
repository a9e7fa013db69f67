"""Run the demo once for each objective and seed, and compare accuracy and held-out KL against steps.

Every run starts from the same student and teacher; runs of one seed see the same prompts with the same sampling
seeds. Finished runs are kept and not run again. Writes comparison.json and comparison.png.
"""

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, NoReturn

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OBJECTIVES: Mapping[str, Sequence[str]] = {
    "sampled": ("objective=sampled",),
    "support, teacher top-4": ("objective=support", "objective.top_k=4", "objective.support=teacher"),
    "support, student top-4": ("objective=support", "objective.top_k=4", "objective.support=student"),
    "full": ("objective=full",),
}
_USER_ERROR, _RUN_FAILED = 2, 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """What one run measured on the held-out prompts."""

    objective: str
    seed: int
    steps: list[int]
    accuracy: list[float]  # greedy
    reverse_kl: list[float]  # exact, nats a token
    step_s: float  # median


def main() -> None:
    """Run the command line; a mistake of the user's is one line and exit code 2, a failed run exit code 1."""
    parser = argparse.ArgumentParser(prog="python -m opd_ray.studies.comparison", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/studies/comparison"), help="folder for runs and results")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    parser.add_argument("--steps", type=int, default=150, help="updates of each run")
    parser.add_argument("overrides", nargs="*", help="more overrides for every run, such as learner.lr=1e-3")
    arguments = parser.parse_args()
    for name in ("seeds", "steps"):
        if getattr(arguments, name) < 1:
            _fail(f"--{name} {getattr(arguments, name)}: expected at least 1", code=_USER_ERROR)
    console, curves = Console(), []
    runs = [(objective, seed) for seed in range(arguments.seeds) for objective in OBJECTIVES]
    for number, (objective, seed) in enumerate(runs, start=1):
        console.print(f"run {number}/{len(runs)}: {objective}, seed {seed}", highlight=False)
        folder = _run(objective, seed, out=arguments.out, num_steps=arguments.steps, overrides=arguments.overrides)
        curves.append(read_curve(folder, objective=objective, seed=seed))
    (arguments.out / "comparison.json").write_text(json.dumps([asdict(curve) for curve in curves], indent=1) + "\n")
    draw(curves, arguments.out / "comparison.png")
    console.print(table(curves))
    console.print(f"wrote comparison.json and comparison.png to {arguments.out}", highlight=False)


def read_curve(folder: Path, *, objective: str, seed: int) -> Curve:
    """Return what a finished run measured."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    evaluated = [line for line in lines if "eval/reverse_kl" in line]
    return Curve(
        objective=objective,
        seed=seed,
        steps=[line["step"] for line in evaluated],
        accuracy=[line["eval/accuracy"] for line in evaluated],
        reverse_kl=[line["eval/reverse_kl"] for line in evaluated],
        step_s=json.loads((folder / "summary.json").read_text())["step_s"],
    )


def table(curves: Sequence[Curve]) -> Table:
    """Return accuracy and held-out KL by step, mean over the seeds, and each seed's accuracy at the end."""
    groups = by_objective(curves)
    shown = Table(title="Accuracy (greedy) and held-out reverse KL in nats a token, mean over seeds", box=SIMPLE)
    shown.add_column("step", justify="right")
    for objective in groups:
        shown.add_column(objective, justify="right")
    for i, step in enumerate(curves[0].steps):
        means = [
            (mean(c.accuracy[i] for c in group), mean(c.reverse_kl[i] for c in group)) for group in groups.values()
        ]
        shown.add_row(str(step), *(f"{accuracy:.1%} {kl:.3f}" for accuracy, kl in means))
    for i, seed in enumerate(sorted({curve.seed for curve in curves})):
        ends = [f"{group[i].accuracy[-1]:.1%} {group[i].reverse_kl[-1]:.3f}" for group in groups.values()]
        shown.add_row(f"end, seed {seed}", *ends)
    return shown


def by_objective(curves: Sequence[Curve]) -> dict[str, list[Curve]]:
    """Return the curves of each objective, in the order of OBJECTIVES."""
    groups = {name: [curve for curve in curves if curve.objective == name] for name in OBJECTIVES}
    return {name: group for name, group in groups.items() if group}


def draw(curves: Sequence[Curve], path: Path) -> None:
    """Write the figure: a line for the mean over seeds, a band from the lowest to the highest."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    _draw_curves(left, {name: [c.accuracy for c in g] for name, g in by_objective(curves).items()}, curves[0].steps)
    _draw_curves(right, {name: [c.reverse_kl for c in g] for name, g in by_objective(curves).items()}, curves[0].steps)
    left.set(title="Exact answers, greedy", xlabel="update", ylabel="accuracy", ylim=(0, 1))
    right.set(title="KL(student || teacher), held out", xlabel="update", ylabel="nats a token", yscale="log")
    left.legend(loc="lower right")
    num_seeds = len({curve.seed for curve in curves})
    figure.suptitle(f"Objectives on the demo task, {num_seeds} seeds: mean, lowest and highest")
    figure.savefig(path, dpi=120)


def _draw_curves(axes: "Axes", values: Mapping[str, list[list[float]]], steps: list[int]) -> None:
    for name, of_seeds in values.items():
        columns = list(zip(*of_seeds, strict=True))
        (line,) = axes.plot(steps, [mean(column) for column in columns], marker="o", markersize=3, label=name)
        axes.fill_between(steps, list(map(min, columns)), list(map(max, columns)), color=line.get_color(), alpha=0.15)
    axes.grid(alpha=0.3)


def _run(objective: str, seed: int, *, out: Path, num_steps: int, overrides: Sequence[str]) -> Path:
    """Train one run unless it is there already; return its folder."""
    name = f"{''.join(c if c.isalnum() else '-' for c in objective)}-seed{seed}"
    folder = out / name
    arguments = [
        "experiment=demo",
        f"runs_dir={out}",
        f"name={name}",
        f"seed={seed}",
        f"num_steps={num_steps}",
        f"eval_every={max(1, num_steps // 6)}",
        "save_every=0",
        "teacher.evaluate=false",
        "tracking=none",
        *OBJECTIVES[objective],
        *overrides,
    ]
    done = folder / "arguments.json"
    if done.is_file() and json.loads(done.read_text()) == arguments:
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    finished = subprocess.run(
        [sys.executable, "-m", "opd_ray.train", *arguments], capture_output=True, text=True, check=False
    )
    if finished.returncode != 0:
        last = (finished.stderr or finished.stdout).strip().splitlines()
        _fail(f"{name}: {last[-1] if last else 'the run failed without a word'}", code=_RUN_FAILED)
    done.write_text(json.dumps(arguments))
    return folder


def _fail(message: str, *, code: int) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(code)


if __name__ == "__main__":
    main()
