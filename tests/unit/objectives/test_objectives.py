"""What holds for every objective: chunks, dtypes, memory, agreement with a naive implementation."""

import pytest
import torch
from objective_oracles import Problem, losses_of, naive_losses, random_problem, weighted_gradients
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from opd_ray.objectives import (
    OBJECTIVES,
    HiddenSignal,
    ObjectiveOptions,
    SampledSignal,
    SupportSignal,
    Tokens,
)

NAMES = sorted(OBJECTIVES)
CHUNKS = [1, 3, 7, 11, 512]
MASKED = (0, 2, 6, 10)


@pytest.mark.parametrize("chunk_tokens", CHUNKS)
@pytest.mark.parametrize("name", NAMES)
def test_chunked_equals_naive_in_value_and_gradient(name: str, chunk_tokens: int) -> None:
    problem = random_problem(masked=MASKED)
    losses = losses_of(name, problem, chunk_tokens=chunk_tokens, discount=0.9, temperature=0.8)
    naive = naive_losses(name, problem, discount=0.9, temperature=0.8)
    assert losses.loss_N.dtype == torch.float32
    torch.testing.assert_close(losses.loss_N.double(), naive, rtol=1e-5, atol=1e-5)
    pairs = zip(weighted_gradients(losses.loss_N, problem), weighted_gradients(naive, problem), strict=True)
    for actual, expected in pairs:
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_inputs_are_computed_in_float32(name: str) -> None:
    problem = random_problem(dtype=torch.bfloat16)
    losses = losses_of(name, problem, chunk_tokens=2, discount=0.9)
    assert losses.loss_N.dtype == losses.divergence_N.dtype == losses.sampled_logprobs_N.dtype == torch.float32
    naive = naive_losses(name, problem, discount=0.9, temperature=1.0)
    torch.testing.assert_close(losses.loss_N.double(), naive, rtol=1e-5, atol=1e-5)
    # Rounded to bfloat16 once, after adding up over the chunks.
    pairs = zip(weighted_gradients(losses.loss_N, problem), weighted_gradients(naive, problem), strict=True)
    for actual, expected in pairs:
        assert actual.dtype == torch.bfloat16
        torch.testing.assert_close(actual, expected, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_autocast_does_not_lower_the_precision(name: str) -> None:
    problem = random_problem()
    expected = losses_of(name, problem)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = losses_of(name, problem)
    assert torch.equal(actual.loss_N, expected.loss_N)


@pytest.mark.parametrize("chunk_tokens", CHUNKS)
@pytest.mark.parametrize("name", NAMES)
def test_a_head_tied_to_the_input_embedding_collects_both_gradients(name: str, chunk_tokens: int) -> None:
    problem = random_problem()
    inputs = torch.arange(11) % 12
    results = []
    for naive in (False, True):
        head = problem.head_VD.detach().clone().requires_grad_()
        tied = Problem(
            hidden_ND=torch.tanh(head[inputs]),
            head_VD=head,
            teacher_hidden_ND=problem.teacher_hidden_ND,
            teacher_head_VD=problem.teacher_head_VD,
            tokens=problem.tokens,
            vocab_size=problem.vocab_size,
        )
        if naive:
            loss_N = naive_losses(name, tied, discount=0.9, temperature=1.0)
        else:
            loss_N = losses_of(name, tied, discount=0.9, chunk_tokens=chunk_tokens).loss_N
        results.append(torch.autograd.grad(loss_N.sum(), head)[0])
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_results_besides_the_loss_are_detached(name: str) -> None:
    losses = losses_of(name, random_problem())
    assert losses.loss_N.requires_grad
    assert not losses.divergence_N.requires_grad
    assert not losses.sampled_logprobs_N.requires_grad


@pytest.mark.parametrize("name", NAMES)
def test_sampled_log_probs_are_those_of_the_whole_common_vocabulary(name: str) -> None:
    problem = random_problem(masked=MASKED)
    losses = losses_of(name, problem, temperature=0.8, chunk_tokens=3)
    logits_NV = problem.hidden_ND.detach() @ problem.head_VD.detach()[: problem.vocab_size].T / 0.8
    expected = logits_NV.log_softmax(-1).gather(-1, problem.tokens.ids_N[:, None]).squeeze(-1) * problem.tokens.mask_N
    torch.testing.assert_close(losses.sampled_logprobs_N, expected, rtol=1e-5, atol=1e-5)


def teacher_equal_to_student(name: str, problem: Problem) -> SampledSignal | SupportSignal | HiddenSignal:
    hidden, head = problem.hidden_ND.detach(), problem.head_VD.detach()
    if name == "sampled":
        # What the student says of itself: any other way to compute it differs in the last bit of 5 nats.
        return SampledSignal(logprobs_N=losses_of(name, problem).sampled_logprobs_N)
    if name == "support":
        top = (hidden @ head[: problem.vocab_size].T).log_softmax(-1).topk(4, dim=-1)
        return SupportSignal(ids_NK=top.indices, logprobs_NK=top.values)
    return HiddenSignal(hidden_ND=hidden, head_VD=head)


@pytest.mark.parametrize("name", NAMES)
def test_a_teacher_equal_to_the_student_gives_no_loss_and_no_gradient(name: str) -> None:
    problem = random_problem()
    losses = OBJECTIVES[name].token_losses(
        problem.hidden_ND,
        problem.head_VD,
        tokens=problem.tokens,
        signal=teacher_equal_to_student(name, problem),
        options=ObjectiveOptions(vocab_size=problem.vocab_size, discount=0.9),
    )
    tolerance = 1e-6 if name == "support" else 0.0
    assert losses.divergence_N.abs().max() <= tolerance
    assert losses.loss_N.abs().max() <= tolerance
    for gradient in weighted_gradients(losses.loss_N, problem):
        assert gradient.abs().max() <= tolerance


@pytest.mark.parametrize("name", NAMES)
def test_signals_of_another_length_are_refused(name: str) -> None:
    problem = random_problem()
    with pytest.raises(ValueError, match=r"\(11, 10, 11\) rows"):
        OBJECTIVES[name].token_losses(
            problem.hidden_ND[:10],
            problem.head_VD,
            tokens=problem.tokens,
            signal=problem.signal(name),
            options=ObjectiveOptions(),
        )


class LargestTensor(TorchDispatchMode):
    """Notes the most elements that any operation's result has, forward and backward."""

    num_elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        del types
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self.num_elements = max(self.num_elements, tensor.numel())
        return result


@pytest.mark.parametrize("name", NAMES)
def test_neither_pass_holds_logits_of_more_than_a_chunk(name: str) -> None:
    num_tokens, vocab_size, dim, chunk_tokens = 128, 100, 4, 8
    generator = torch.Generator().manual_seed(0)
    problem = Problem(
        hidden_ND=torch.randn(num_tokens, dim, generator=generator).requires_grad_(),
        head_VD=torch.randn(vocab_size, dim, generator=generator).requires_grad_(),
        teacher_hidden_ND=torch.randn(num_tokens, dim, generator=generator),
        teacher_head_VD=torch.randn(vocab_size, dim, generator=generator),
        tokens=Tokens(
            ids_N=torch.randint(vocab_size, (num_tokens,), generator=generator),
            offsets=torch.tensor([0, num_tokens]),
            mask_N=torch.ones(num_tokens, dtype=torch.bool),
        ),
        vocab_size=vocab_size,
    )
    signal = problem.signal(name, top_k=3)
    kept = 0

    def keep(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += tensor.numel()
        return tensor

    options = ObjectiveOptions(chunk_tokens=chunk_tokens, diagnostic_tokens=0)
    with LargestTensor() as largest, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        losses = OBJECTIVES[name].token_losses(
            problem.hidden_ND, problem.head_VD, tokens=problem.tokens, signal=signal, options=options
        )
        losses.loss_N.sum().backward()
    # `support` makes no logits over the vocabulary, not even of a chunk.
    smaller = max(vocab_size, num_tokens) * dim
    assert smaller < chunk_tokens * vocab_size
    assert largest.num_elements <= (smaller if name == "support" else chunk_tokens * vocab_size)
    assert kept < num_tokens * vocab_size / 2
