"""Show the study's results to people: one figure and four tables."""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE
from rich.table import Table

from opd_ray.studies.variance_study import LONG_PROBLEMS, ControlRow, GrowthRow, Results
from opd_ray.studies.variance_tabular import Estimator

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_TINY = 1e-6  # below it a number is shown as rounding error
_LAST_ITERATIONS = 10  # averaged where the table shows a run's end
_STUDY_ORDERS = {0.0: "T^2", 1.0: "T^4"}  # arXiv 2603.25562, by discount
_GUIDES = (2, 3, 4)  # powers of T drawn beside the measured growth


def tables(results: Results) -> list[Table]:
    """Return bias and variance on the trees, growth exponents, and the control problem."""
    trees = _rows(results, "tree")
    return [
        _lengths_table(
            "Bias relative to the gradient of the sequence KL: exact, tree", trees, values=[row.bias for row in trees]
        ),
        _lengths_table("Variance: exact, tree", trees, values=[row.variance for row in trees]),
        _growth_table(results),
        _control_table(results),
    ]


def draw(results: Results, path: Path) -> None:
    """Write the figure: exact bias, growth of the variance, variance while training, distance after training."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 9.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2)
    _draw_bias(axes[0, 0], results)
    _draw_growth(axes[0, 1], results)
    _draw_training(axes[1, 0], results)
    _draw_distances(axes[1, 1], results)
    figure.suptitle("Gradients of the reverse KL, from token-level ($\\gamma = 0$) to sequence-level ($\\gamma = 1$)")
    figure.savefig(path, dpi=120)


def _rows(results: Results, problem: str) -> list[GrowthRow]:
    return [row for row in results.growth if row.problem == problem]


def _order(estimator: Estimator) -> str:
    return "T^2" if estimator.discount < 1 else "T^3"


def _study_order(estimator: Estimator) -> str:
    return _STUDY_ORDERS.get(estimator.discount, "")


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE, pad_edge=False)
    table.add_column("estimator", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _lengths_table(title: str, rows: Sequence[GrowthRow], *, values: Sequence[Sequence[float]]) -> Table:
    table = _table(title, [f"T={length}" for length in rows[0].lengths])
    for row, row_values in zip(rows, values, strict=True):
        table.add_row(row.estimator.name, *map(_number, row_values))
    return table


def _number(value: float) -> str:
    return f"{value:.0e}" if value < _TINY else f"{value:.3g}"


def _growth_table(results: Results) -> Table:
    problems = ["tree", *LONG_PROBLEMS]
    title = "Growth exponent of the variance in T"
    table = _table(title, [*problems, "sharp bound", "study's bound"])
    for rows in zip(*(_rows(results, problem) for problem in problems), strict=True):
        estimator = rows[0].estimator
        exponents = [f"{row.exponent:.2f}" for row in rows]
        table.add_row(estimator.name, *exponents, _order(estimator), _study_order(estimator))
    num_fitted = results.settings.fitted_lengths
    spans = [f"{row.problem} {row.lengths[-num_fitted]}..{row.lengths[-1]}" for row in rows]
    table.caption = f"fitted to T of {', '.join(spans)}"
    return table


def _control_table(results: Results) -> Table:
    settings = results.settings.control
    table = _table(
        f"Control problem, {settings.iterations} iterations; distance of the teachers {results.teacher_distance:.3f}",
        ["var first", "var last", "noise", "KL mean", "KL last", "distance"],
    )
    table.caption = f"noise: last variance / |mean gradient|^2, about {settings.num_micro_batches} without any signal"
    for row in results.control:
        last = slice(-_LAST_ITERATIONS, None)
        distances = [run.final_distance for run in row.runs]
        table.add_row(
            f"gamma {row.discount:g}",
            f"{mean(run.variance[0] for run in row.runs):.3g}",
            f"{mean(value for run in row.runs for value in run.variance[last]):.3g}",
            f"{mean(value for run in row.runs for value in run.noise[last]):.2f}",
            f"{mean(value for run in row.runs for value in run.token_kl):.3f}",
            f"{mean(run.final_token_kl for run in row.runs):.3f}",
            f"{mean(distances):.3f}±{stdev(distances):.3f}",
        )
    return table


def _draw_bias(axes: "Axes", results: Results) -> None:
    for row in _rows(results, "tree"):
        if not row.estimator.past_costs:
            axes.plot(row.lengths, row.bias, marker="o", **_style(row.estimator.discount))
    axes.set_xticks(_rows(results, "tree")[0].lengths)
    axes.set(
        title="Bias, exact: random tree students",
        xlabel="sequence length T",
        ylabel="|E[g] - grad J| / |grad J|",
        ylim=(-0.02, None),
    )
    axes.legend()


def _draw_growth(axes: "Axes", results: Results) -> None:
    rows = _rows(results, "branches")
    for row in rows:
        style = _style(row.estimator.discount)
        if row.estimator.past_costs:
            style |= {"linestyle": ":", "label": "all costs of the sequence"}
        axes.loglog(row.lengths, row.variance, marker="o", **style)
    lengths, start = rows[0].lengths, max(row.variance[0] for row in rows)
    for power in _GUIDES:
        guide = [start * (length / lengths[0]) ** power for length in lengths]
        axes.loglog(lengths, guide, color="grey", linestyle="--", linewidth=0.8)
        axes.annotate(f"$T^{power}$", (lengths[-1], guide[-1]), color="grey", xytext=(5, 0), textcoords="offset points")
    axes.minorticks_off()
    axes.set_xticks(lengths, [str(length) for length in lengths])
    axes.set(
        title="Growth of the variance: one token decides what the rest costs",
        xlabel="sequence length T",
        ylabel="variance of one sequence's gradient",
    )
    axes.legend()


def _draw_training(axes: "Axes", results: Results) -> None:
    for row in results.control:
        axes.semilogy(_mean_over_runs(row), **_style(row.discount))
    axes.set(
        title=f"Variance while training: control problem, T = {results.settings.control.horizon}",
        xlabel="iteration",
        ylabel="variance of a micro-batch's gradient",
    )
    axes.legend()


def _mean_over_runs(row: ControlRow) -> list[float]:
    return [mean(values) for values in zip(*(run.variance for run in row.runs), strict=True)]


def _draw_distances(axes: "Axes", results: Results) -> None:
    for index, row in enumerate(results.control):
        distances = [run.final_distance for run in row.runs]
        color = _style(row.discount)["color"]
        axes.bar(index, mean(distances), yerr=stdev(distances), color=color, capsize=4)
    axes.axhline(results.teacher_distance, color="black", linestyle="--", label="teachers")
    names = [_label(row.discount) for row in results.control]
    iterations = results.settings.control.iterations
    axes.set(
        title=f"Distance to the target after {iterations} iterations ({len(row.runs)} seeds, ± 1 s.d.)",
        ylabel="mean |state - target|",
    )
    axes.set_xticks(range(len(names)), names)
    axes.legend()


def _style(discount: float) -> dict[str, Any]:
    """Return a line's color and label."""
    from matplotlib import colormaps

    return {"color": colormaps["viridis"](0.9 * (1 - discount)), "label": _label(discount)}


def _label(discount: float) -> str:
    return f"$\\gamma = {discount:g}$"
