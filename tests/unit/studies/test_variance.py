"""The study of bias and variance against what is known without it: exact gradients, bounds, power laws."""

import json
from pathlib import Path

import pytest
import torch

from opd_ray.studies import variance
from opd_ray.studies.variance_study import DISCOUNTS, ESTIMATORS
from opd_ray.studies.variance_tabular import (
    Estimator,
    TabularProblem,
    branches_problem,
    contexts_of,
    enumerate_sequences,
    exact_moments,
    growth_exponent,
    moments,
    objective_gradient,
    positions_problem,
    relative_bias,
    sample_sequences,
    sequence_gradients,
    tree_problem,
)

_TOKEN_LEVEL, _CAUSAL, _SEQUENCE = ESTIMATORS[0], ESTIMATORS[-2], ESTIMATORS[-1]


def _tree(length: int) -> TabularProblem:
    return tree_problem(vocab_size=3, length=length, seed=0)


def _bias(problem: TabularProblem, estimator: Estimator) -> float:
    mean_CV = exact_moments(problem, estimator=estimator).mean_CV
    return relative_bias(mean_CV, gradient_CV=objective_gradient(problem))


@pytest.mark.parametrize("length", [1, 2, 3, 4])
@pytest.mark.parametrize("estimator", [_CAUSAL, _SEQUENCE], ids=lambda e: e.name)
def test_the_undiscounted_gradients_are_unbiased(length: int, estimator: Estimator) -> None:
    assert _bias(_tree(length), estimator) < 1e-9
    assert _bias(branches_problem(length + 1), estimator) < 1e-9  # of one token it costs nothing


def test_the_bias_of_a_discount_appears_with_the_second_token() -> None:
    assert _bias(_tree(1), _TOKEN_LEVEL) < 1e-9
    for length in (2, 3, 4):
        biases = [_bias(_tree(length), estimator) for estimator in ESTIMATORS[:-1]]
        assert biases == sorted(biases, reverse=True)
        assert biases[0] > 0.05


def test_the_variance_grows_with_the_discount_and_most_with_past_costs() -> None:
    for length in (3, 4):
        variances = [exact_moments(_tree(length), estimator=estimator).variance for estimator in ESTIMATORS]
        assert variances == sorted(variances)


@pytest.mark.parametrize("length", [1, 3, 6])
def test_the_variance_stays_below_the_bound_that_grows_with_the_third_power(length: int) -> None:
    for problem in (_tree(length), positions_problem(length), branches_problem(length)):
        log_p_CV = problem.logits_CV.log_softmax(-1)
        largest_cost = float((log_p_CV - problem.log_q_CV).abs().max())
        largest_score = 2**0.5  # |onehot - p|
        bound = largest_cost**2 * largest_score**2 * length**2
        assert exact_moments(problem, estimator=_CAUSAL).variance <= bound * (length + 1) / 2
        assert exact_moments(problem, estimator=_SEQUENCE).variance <= bound * length
        assert exact_moments(problem, estimator=_TOKEN_LEVEL).variance <= bound


def test_the_positions_problem_has_the_variance_of_its_closed_form() -> None:
    # independent tokens with scores of their own: var = sum_t E[R_t^2 |g_t|^2] - |E[R_t g_t]|^2, by hand for T = 1
    problem = positions_problem(1)
    costs_V = problem.logits_CV.log_softmax(-1)[0] - problem.log_q_CV[0]
    mean_V = (costs_V - costs_V.mean()) / 3
    expected = float((costs_V.square() * 2 / 3).mean() - mean_V.square().sum())  # |onehot - 1/3|^2 = 2/3
    assert exact_moments(problem, estimator=_TOKEN_LEVEL).variance == pytest.approx(expected, rel=1e-12)
    longer = exact_moments(positions_problem(5), estimator=_TOKEN_LEVEL).variance
    assert longer == pytest.approx(5 * expected, rel=1e-12)


def test_the_contexts_of_a_tree_are_its_prefixes() -> None:
    problem = _tree(3)
    ids_ST = enumerate_sequences(problem)
    contexts_ST = contexts_of(problem, ids_ST)
    prefixes = {
        (int(context), tuple(ids_S[:t].tolist()))
        for ids_S, contexts_S in zip(ids_ST, contexts_ST, strict=True)
        for t, context in enumerate(contexts_S)
    }
    assert len(ids_ST) == 27
    assert len(prefixes) == len({c for c, _ in prefixes}) == len({p for _, p in prefixes}) == 13


def test_sampling_estimates_the_enumerated_variance() -> None:
    problem = branches_problem(5)
    ids_ST = sample_sequences(problem, num_sequences=4096, seed=0)
    gradients_SCV = sequence_gradients(problem, ids_ST, estimator=_CAUSAL)
    sampled = moments(gradients_SCV, probabilities_S=torch.full((4096,), 1 / 4096, dtype=torch.float64))
    assert sampled.variance == pytest.approx(exact_moments(problem, estimator=_CAUSAL).variance, rel=0.1)


@pytest.mark.parametrize("power", [1.0, 2.5, 4.0])
def test_the_exponent_of_a_power_law_is_exact(power: float) -> None:
    lengths = (2, 3, 8, 20)
    assert growth_exponent(lengths, [0.3 * length**power for length in lengths]) == pytest.approx(power, abs=1e-12)


def test_a_quick_run_writes_numbers_and_a_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("sys.argv", ["variance", "--quick", "--out", str(tmp_path)])
    variance.main()
    results = json.loads((tmp_path / "variance.json").read_text())
    assert set(results) == {"settings", "growth", "teacher_distance", "control", "seconds"}
    assert {row["problem"] for row in results["growth"]} == {"tree", "positions", "branches"}
    assert [row["discount"] for row in results["control"]] == list(DISCOUNTS)
    for row in results["control"]:
        assert len(row["runs"][0]["variance"]) == results["settings"]["control"]["iterations"]
    first = [row["runs"][0]["variance"][0] for row in results["control"]]
    assert first == sorted(first)  # all discounts start from the same policy and samples
    assert (tmp_path / "variance.png").read_bytes().startswith(b"\x89PNG")


def test_a_mistake_on_the_command_line_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr("sys.argv", ["variance", "--out", str(tmp_path / "file")])
    with pytest.raises(SystemExit, match="2"):
        variance.main()
    assert capsys.readouterr().err.splitlines() == [f"error: --out {tmp_path / 'file'}: File exists"]
