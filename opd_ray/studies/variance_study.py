"""What the study measures, with which settings: `run_study` returns everything as numbers.

T is the number of tokens of a sequence; gradients are in nats per unit of a logit or weight.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean

import torch

from opd_ray.studies import variance_tabular as tabular
from opd_ray.studies.variance_control import ControlRun, ControlSettings, roll_out, train
from opd_ray.studies.variance_tabular import Estimator, TabularProblem

DISCOUNTS = (0.0, 0.25, 0.5, 0.75, 1.0)
ESTIMATORS = (
    *(Estimator(name=f"gamma {discount:g}", discount=discount) for discount in DISCOUNTS),
    Estimator(name="sequence", discount=1.0, past_costs=True),
)
LONG_PROBLEMS: dict[str, Callable[[int], TabularProblem]] = {
    "positions": tabular.positions_problem,
    "branches": tabular.branches_problem,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class StudySettings:
    """How much is measured."""

    seed: int
    control: ControlSettings
    vocab_size: int = 3
    tree_lengths: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7)  # enumerated: V^T sequences
    num_trees: int = 5
    long_lengths: tuple[int, ...] = (8, 16, 32, 64, 128, 256)  # sampled
    long_sequences: int = 8192
    fitted_lengths: int = 3  # growth exponents are fitted to this many of the largest T
    control_repeats: int = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class GrowthRow:
    """An estimator on one kind of problem; the tuples have one entry per length T."""

    problem: str
    estimator: Estimator
    lengths: tuple[int, ...]
    bias: tuple[float, ...]  # |E[g] - grad J| / |grad J|; empty where sequences are sampled
    variance: tuple[float, ...]  # trace of the covariance of one sequence's gradient
    exponent: float  # of the variance in T


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlRow:
    """A discount on the control problem, repeated with several seeds that all discounts share."""

    discount: float
    runs: tuple[ControlRun, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """All that the study measures."""

    settings: StudySettings
    growth: tuple[GrowthRow, ...]
    teacher_distance: float  # mean final distance of the control problem's teachers
    control: tuple[ControlRow, ...]
    seconds: float


def default_settings(seed: int) -> StudySettings:
    """Return the study: about two minutes on one core."""
    return StudySettings(seed=seed, control=ControlSettings(iterations=150))


def quick_settings(seed: int) -> StudySettings:
    """Return a look at every part in a few seconds; its numbers are rough."""
    return StudySettings(
        seed=seed,
        control=ControlSettings(iterations=5, evaluation_trajectories=256),
        tree_lengths=(1, 2, 3, 4),
        num_trees=2,
        long_lengths=(8, 16, 32),
        long_sequences=512,
        control_repeats=2,
    )


def measure_tree(settings: StudySettings, *, estimator: Estimator) -> GrowthRow:
    """Return exact bias and variance, each the mean over several random trees."""
    biases, variances = [], []
    for length in settings.tree_lengths:
        pairs = []
        for seed in range(settings.seed, settings.seed + settings.num_trees):
            problem = tabular.tree_problem(vocab_size=settings.vocab_size, length=length, seed=seed)
            moments = tabular.exact_moments(problem, estimator=estimator)
            gradient_CV = tabular.objective_gradient(problem)
            pairs.append((tabular.relative_bias(moments.mean_CV, gradient_CV=gradient_CV), moments.variance))
        biases.append(mean(bias for bias, _ in pairs))
        variances.append(mean(variance for _, variance in pairs))
    return GrowthRow(
        problem="tree",
        estimator=estimator,
        lengths=settings.tree_lengths,
        bias=tuple(biases),
        variance=tuple(variances),
        exponent=_exponent(settings.tree_lengths, variances, settings),
    )


def measure_long(name: str, settings: StudySettings, *, estimator: Estimator) -> GrowthRow:
    """Return the variance over sampled sequences, the same ones for every estimator."""
    variances = []
    probabilities_S = torch.full((settings.long_sequences,), 1 / settings.long_sequences, dtype=torch.float64)
    for length in settings.long_lengths:
        problem = LONG_PROBLEMS[name](length)
        ids_ST = tabular.sample_sequences(problem, num_sequences=settings.long_sequences, seed=settings.seed)
        gradients_SCV = tabular.sequence_gradients(problem, ids_ST, estimator=estimator)
        variances.append(tabular.moments(gradients_SCV, probabilities_S=probabilities_S).variance)
    return GrowthRow(
        problem=name,
        estimator=estimator,
        lengths=settings.long_lengths,
        bias=(),
        variance=tuple(variances),
        exponent=_exponent(settings.long_lengths, variances, settings),
    )


def measure_control(settings: StudySettings, *, discount: float) -> ControlRow:
    """Return the training runs of one discount."""
    seeds = range(settings.seed, settings.seed + settings.control_repeats)
    return ControlRow(
        discount=discount, runs=tuple(train(settings.control, discount=discount, seed=seed) for seed in seeds)
    )


def run_study(settings: StudySettings) -> Results:
    """Measure everything."""
    start = time.perf_counter()
    growth = [measure_tree(settings, estimator=estimator) for estimator in ESTIMATORS]
    for name in LONG_PROBLEMS:
        growth += [measure_long(name, settings, estimator=estimator) for estimator in ESTIMATORS]
    teachers = roll_out(
        None,
        settings.control,
        num_trajectories=settings.control.evaluation_trajectories,
        generator=torch.Generator().manual_seed(settings.seed),
    )
    return Results(
        settings=settings,
        growth=tuple(growth),
        teacher_distance=teachers.final_distance,
        control=tuple(measure_control(settings, discount=discount) for discount in DISCOUNTS),
        seconds=time.perf_counter() - start,
    )


def _exponent(lengths: Sequence[int], variances: Sequence[float], settings: StudySettings) -> float:
    largest = slice(-settings.fitted_lengths, None)
    return tabular.growth_exponent(lengths[largest], variances[largest])
