"""What holds for every objective: gradients that are formed once, with the loss."""

from dataclasses import fields, replace

import pytest
import torch
from objective_oracles import VARIANTS, Problem, assert_close, gradients, losses_of, part_of, random_problem

from opd_ray.objectives import OBJECTIVES, Losses, ObjectiveOptions, Tokens

PAYLOADS = {name: objective.payload(ObjectiveOptions()) for name, objective in OBJECTIVES.items()}
VARIANT = pytest.mark.parametrize(("name", "options"), VARIANTS.values(), ids=VARIANTS)


def without_gradient(problem: Problem) -> Problem:
    return replace(problem, hidden_ND=problem.hidden_ND.detach(), head_VD=problem.head_VD.detach())


def assert_same_values(actual: Losses, expected: Losses) -> None:
    for field in ("loss", "loss_N", "divergence_N", "sampled_logprobs_N"):
        assert torch.equal(getattr(actual, field), getattr(expected, field))
    assert_close(actual.stats, expected.stats, 0)


@VARIANT
def test_a_second_differentiation_is_refused(name: str, options: dict) -> None:
    problem = random_problem()
    loss = losses_of(name, problem, **options).loss
    gradients(loss, problem)
    with pytest.raises(RuntimeError, match="this loss was differentiated before; its gradients are formed once"):
        gradients(loss, problem)
    loss = losses_of(name, problem, **options).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="this loss was differentiated before"):
        loss.backward()


@VARIANT
def test_gradients_scale_with_the_loss_and_add_up_over_calls(name: str, options: dict) -> None:
    problem = random_problem()
    expected = gradients(losses_of(name, problem, **options).loss, problem)
    (-3 * losses_of(name, problem, **options).loss).backward()
    losses_of(name, problem, **options).loss.backward()
    for leaf, gradient in zip(problem.leaves(), expected, strict=True):
        torch.testing.assert_close(leaf.grad, -2 * gradient, rtol=0, atol=1e-12)


@VARIANT
def test_states_or_head_alone_may_want_a_gradient(name: str, options: dict) -> None:
    problem = random_problem()
    expected = gradients(losses_of(name, problem, **options).loss, problem)
    for field, gradient in zip(("hidden_ND", "head_VD"), expected, strict=True):
        alone = without_gradient(problem)
        leaf = getattr(alone, field).clone().requires_grad_()
        losses = losses_of(name, replace(alone, **{field: leaf}), **options)
        assert torch.equal(torch.autograd.grad(losses.loss, leaf)[0], gradient)


@VARIANT
def test_without_a_wish_for_gradients_the_values_are_the_same(name: str, options: dict) -> None:
    problem = random_problem(masked=(2,))
    expected = losses_of(name, problem, **options)
    plain = losses_of(name, without_gradient(problem), **options)
    with torch.no_grad():
        unrecorded = losses_of(name, problem, **options)
    for losses in (plain, unrecorded):
        assert not losses.loss.requires_grad
        assert_same_values(losses, expected)


@VARIANT
def test_results_besides_the_loss_are_detached(name: str, options: dict) -> None:
    losses = losses_of(name, random_problem(), diagnostic_tokens=4, **options)
    assert losses.loss.requires_grad
    assert losses.loss.shape == ()
    per_token = {field.name: getattr(losses, field.name) for field in fields(losses) if field.name != "loss"}
    for part in per_token.values():
        for tensor in part.values() if isinstance(part, dict) else [part]:
            assert not tensor.requires_grad


@VARIANT
def test_inputs_are_left_as_they_were(name: str, options: dict) -> None:
    """Gradients and logits are formed in place, in memory of their own."""
    problem, copy = random_problem(masked=(2,)), random_problem(masked=(2,))
    signal = problem.signal(OBJECTIVES[name].payload(ObjectiveOptions(**options)))
    before = {field.name: getattr(signal, field.name).clone() for field in fields(signal)}
    losses_of(name, problem, signal=signal, diagnostic_tokens=4, **options).loss.backward()
    for field, tensor in before.items():
        assert torch.equal(getattr(signal, field), tensor)
    for field in fields(problem.tokens):
        assert torch.equal(getattr(problem.tokens, field.name), getattr(copy.tokens, field.name))
    for field in ("hidden_ND", "head_VD", "teacher_hidden_ND", "teacher_head_VD"):
        assert torch.equal(getattr(problem, field), getattr(copy, field))


@VARIANT
def test_two_losses_may_be_formed_before_either_is_differentiated(name: str, options: dict) -> None:
    problem, other = random_problem(), random_problem(seed=1)
    expected = [gradients(losses_of(name, each, **options).loss, each) for each in (problem, other)]
    losses = [losses_of(name, each, **options).loss for each in (problem, other)]
    actual = [gradients(loss, each) for loss, each in zip(losses, (problem, other), strict=True)]
    for pair, expected_pair in zip(actual, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(pair, expected_pair, strict=True))


@VARIANT
def test_autocast_does_not_lower_the_precision(name: str, options: dict) -> None:
    problem = random_problem(dtype=torch.float32)
    expected = losses_of(name, problem, **options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = losses_of(name, problem, **options)
        actual_gradients = gradients(actual.loss, problem)
    assert_same_values(actual, expected)
    for gradient, other in zip(actual_gradients, gradients(expected.loss, problem), strict=True):
        assert torch.equal(gradient, other)


@pytest.mark.parametrize("chunk_tokens", [3, 512])
@VARIANT
def test_a_head_tied_to_the_input_embedding_collects_both_gradients(
    name: str, options: dict, chunk_tokens: int
) -> None:
    problem = random_problem()
    inputs_N = torch.arange(11) % 12
    head_VD = problem.head_VD.detach().clone().requires_grad_()
    tied = replace(problem, hidden_ND=torch.tanh(head_VD[inputs_N]), head_VD=head_VD)
    (both,) = torch.autograd.grad(losses_of(name, tied, chunk_tokens=chunk_tokens, **options).loss, head_VD)
    embedding_VD = head_VD.detach().clone().requires_grad_()
    apart = replace(problem, hidden_ND=torch.tanh(embedding_VD[inputs_N]), head_VD=head_VD)
    parts = torch.autograd.grad(losses_of(name, apart, **options).loss, (embedding_VD, head_VD))
    assert all(part.norm() > 0 for part in parts)
    torch.testing.assert_close(both, parts[0] + parts[1], rtol=0, atol=1e-12)


@VARIANT
def test_sampled_log_probs_are_those_of_the_whole_common_vocabulary(name: str, options: dict) -> None:
    problem = random_problem(masked=(0, 2))
    losses = losses_of(name, problem, temperature=0.8, chunk_tokens=3, **options)
    if name == "support" and options.get("tail", "renormalise") == "renormalise":
        assert losses.sampled_logprobs_N.shape == (0,)
    elif "policy" not in options or options["policy"].top_p == 1:
        expected_N = problem.sampled(problem.log_p(0.8).detach()) * problem.tokens.mask_N
        torch.testing.assert_close(losses.sampled_logprobs_N, expected_N, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_signals_of_another_length_are_refused(name: str) -> None:
    problem = random_problem()
    with pytest.raises(ValueError, match=r"\(11, 10, 11\) rows"):
        losses_of(name, replace(problem, hidden_ND=problem.hidden_ND[:10]))
    with pytest.raises(ValueError, match=r"\(11, 11, 10\) rows"):
        losses_of(name, problem, signal=part_of(random_problem(lengths=(10, 1)), 0, 1).signal(PAYLOADS[name]))


@pytest.mark.parametrize("field", ["mask_N", "weights_N", "sampler_logprobs_N", "advantages_N"])
def test_tokens_of_unequal_lengths_are_refused(field: str) -> None:
    tokens = random_problem().tokens
    given = {each.name: getattr(tokens, each.name) for each in fields(tokens)}
    with pytest.raises(ValueError, match=rf"ids_N \(11,\), {field} \(10,\), expected \[N\] twice"):
        Tokens(**{**given, field: given[field][:10]})


def test_a_mask_of_numbers_is_refused() -> None:
    tokens = random_problem().tokens
    with pytest.raises(ValueError, match=r"mask_N has dtype torch\.int64, expected torch\.bool"):
        replace(tokens, mask_N=tokens.mask_N.long())
