"""The cut into chunks of tokens and the dtypes: agreement with naive formulas, and what is held in memory."""

import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from objective_oracles import (
    TAILS,
    VARIANTS,
    Problem,
    assert_agrees,
    assert_close,
    gradients,
    kl_terms,
    losses_of,
    naive_full,
    naive_sampled,
    naive_support,
    random_problem,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from opd_ray.objectives import OBJECTIVES, Losses, ObjectiveOptions, PolicyOptions, Tokens
from opd_ray.objectives.head import GatheredHead
from opd_ray.objectives.rows import blocks

CHUNKS = [1, 2, 3, 7, 1000]
MASKED = (0, 2, 6, 10)
DISCOUNTED = [{"policy": PolicyOptions(discount=discount, reward_clip=2.0)} for discount in (0.0, 0.9, 1.0)]
NAIVE = [
    *(("sampled", options) for options in DISCOUNTED),
    *(("support", {"tail": tail}) for tail in TAILS),
    ("full", {}),
]
NAIVE_IDS = ["sampled 0", "sampled 0.9", "sampled 1", *TAILS, "full"]


def naive_of(name: str, problem: Problem, options: dict[str, Any]) -> Tensor:
    if name == "sampled":
        return naive_sampled(problem, policy=options["policy"])
    if name == "support":
        return naive_support(problem, problem.signal("support"), tail=options["tail"], terms=kl_terms)
    return naive_full(problem)


@pytest.mark.parametrize("chunk_tokens", CHUNKS)
@pytest.mark.parametrize(("name", "options"), NAIVE, ids=NAIVE_IDS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_chunked_equals_naive_in_value_and_gradient(
    name: str, options: dict, chunk_tokens: int, dtype: torch.dtype, tolerance: float
) -> None:
    problem = random_problem(dtype=dtype, masked=MASKED)
    losses = losses_of(name, problem, chunk_tokens=chunk_tokens, **options)
    assert_agrees(losses, naive_of(name, problem, options), problem, tolerance=tolerance)
    for tensor in (losses.loss, losses.loss_N, losses.divergence_N, losses.sampled_logprobs_N, *losses.stats.values()):
        assert tensor.dtype == dtype


def everything(losses: Losses, problem: Problem) -> dict[str, Tensor]:
    hidden_gradient, head_gradient = gradients(losses.loss, problem)
    return {
        "loss": losses.loss.detach(),
        "loss_N": losses.loss_N,
        "divergence_N": losses.divergence_N,
        "sampled_logprobs_N": losses.sampled_logprobs_N,
        "hidden gradient": hidden_gradient,
        "head gradient": head_gradient,
        **losses.stats,
        **losses.diagnostics,
    }


@pytest.mark.parametrize("chunk_tokens", CHUNKS[:-1])
@pytest.mark.parametrize(("name", "options"), VARIANTS.values(), ids=VARIANTS)
def test_no_result_depends_on_the_size_of_a_chunk(name: str, options: dict, chunk_tokens: int) -> None:
    problem = random_problem(masked=MASKED)
    options = {**options, "diagnostic_tokens": 6}
    whole = everything(losses_of(name, problem, chunk_tokens=1000, **options), problem)
    assert_close(everything(losses_of(name, problem, chunk_tokens=chunk_tokens, **options), problem), whole, 1e-12)


@pytest.mark.parametrize(("name", "options"), NAIVE, ids=NAIVE_IDS)
def test_bfloat16_inputs_are_computed_in_float32(name: str, options: dict) -> None:
    problem = random_problem(dtype=torch.bfloat16)
    losses = losses_of(name, problem, chunk_tokens=2, **options)
    rounded = replace(
        problem,
        hidden_ND=problem.hidden_ND.detach().float().requires_grad_(),
        head_VD=problem.head_VD.detach().float().requires_grad_(),
    )
    exact = losses_of(name, rounded, chunk_tokens=2, **options)
    for field in ("loss", "loss_N", "divergence_N", "sampled_logprobs_N"):
        assert getattr(losses, field).dtype == torch.float32
        torch.testing.assert_close(getattr(losses, field), getattr(exact, field), rtol=1e-6, atol=1e-6)
    # Rounded to bfloat16 once, after adding up over the chunks.
    for actual, expected in zip(gradients(losses.loss, problem), gradients(exact.loss, rounded), strict=True):
        assert actual.dtype == torch.bfloat16
        torch.testing.assert_close(actual.float(), expected, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize(("name", "options"), VARIANTS.values(), ids=VARIANTS)
def test_each_gradient_has_the_dtype_of_its_tensor(name: str, options: dict) -> None:
    problem = random_problem(dtype=torch.float32)
    mixed = replace(problem, head_VD=problem.head_VD.detach().to(torch.bfloat16).requires_grad_())
    losses = losses_of(name, mixed, **options)
    assert [gradient.dtype for gradient in gradients(losses.loss, mixed)] == [torch.float32, torch.bfloat16]
    wide = replace(problem, hidden_ND=problem.hidden_ND.detach().double().requires_grad_())
    losses = losses_of(name, wide, **options)
    assert losses.loss_N.dtype == torch.float64
    assert [gradient.dtype for gradient in gradients(losses.loss, wide)] == [torch.float64, torch.float32]


class Memory(TorchDispatchMode):
    """Notes the largest tensor that any operation gives, and the most numbers alive at once, of 1000 and up."""

    largest = peak = 0

    def __init__(self) -> None:
        super().__init__()
        self._alive: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        del types
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor) and tensor.numel() >= 1000:
                self.largest = max(self.largest, tensor.numel())
                self._alive[id(tensor)] = tensor
                storages = [alive.untyped_storage() for alive in list(self._alive.values())]
                self.peak = max(self.peak, sum({s.data_ptr(): s.nbytes() for s in storages}.values()) // 4)
        return result


def long_problem(*, num_tokens: int, vocab_size: int, dim: int, dtype: torch.dtype = torch.float32) -> Problem:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    return Problem(
        hidden_ND=random(num_tokens, dim).requires_grad_(),
        head_VD=random(vocab_size, dim).requires_grad_(),
        teacher_hidden_ND=random(num_tokens, dim),
        teacher_head_VD=random(vocab_size, dim),
        tokens=Tokens(
            ids_N=torch.randint(vocab_size, (num_tokens,), generator=generator),
            offsets=torch.tensor([0, num_tokens]),
            mask_N=torch.ones(num_tokens, dtype=torch.bool),
            weights_N=torch.ones(num_tokens),
            sampler_logprobs_N=torch.zeros(num_tokens),
            advantages_N=torch.zeros(num_tokens),
        ),
        vocab_size=vocab_size,
    )


@pytest.mark.parametrize(("name", "options"), VARIANTS.values(), ids=VARIANTS)
def test_neither_pass_holds_logits_of_more_than_a_chunk(name: str, options: dict) -> None:
    num_tokens, vocab_size, dim, chunk_tokens = 384, 800, 8, 16
    problem = long_problem(num_tokens=num_tokens, vocab_size=vocab_size, dim=dim)
    chunk = chunk_tokens * vocab_size
    options = {"diagnostic_tokens": 4 * chunk_tokens, **options, "chunk_tokens": chunk_tokens}
    gathers = name == "support" and options.get("tail", "renormalise") == "renormalise"
    if gathers:
        options["diagnostic_tokens"] = 0
    with torch.no_grad():
        signal = problem.signal(OBJECTIVES[name].payload(ObjectiveOptions(**options)), top_k=2)
    with Memory() as memory:
        losses_of(name, problem, signal=signal, **options).loss.backward()
    # Renormalised, the largest are the gradients in states and head.
    smaller = dim * max(vocab_size, num_tokens)
    assert smaller < chunk
    assert memory.largest <= (smaller if gathers else chunk)
    assert memory.peak < num_tokens * vocab_size / 2


def test_gathered_rows_of_the_head_are_held_for_a_few_tokens_at_a_time() -> None:
    """N K D numbers would be as many as N V in one chunk of all tokens."""
    problem = long_problem(num_tokens=512, vocab_size=64, dim=16)
    signal = problem.signal("support", top_k=8)
    with Memory() as memory:
        chunked = losses_of("support", problem, signal=signal, chunk_tokens=16).loss
    assert memory.largest <= 512 * 16
    whole = losses_of("support", problem, signal=signal, chunk_tokens=512).loss
    torch.testing.assert_close(chunked, whole)


def test_without_a_wish_for_gradients_none_is_formed() -> None:
    problem = long_problem(num_tokens=16, vocab_size=800, dim=8)
    with torch.no_grad():
        signal = problem.signal("support", top_k=2)
        with Memory() as memory:
            losses_of("support", problem, signal=signal)
    assert memory.peak < 2 * 800 * 8  # the head itself is seen once


@pytest.mark.parametrize("num_ids", [2, 64, 10**6])
def test_gathered_rows_of_the_head_are_bounded_whatever_the_size_of_a_chunk(num_ids: int) -> None:
    head_VD, ids_NK = torch.empty(9, 4096, device="meta"), torch.empty(10**5, num_ids, device="meta", dtype=torch.int64)
    for chunk_tokens in (1, 192, 10**5):
        head = GatheredHead(head_VD, ids_NK=ids_NK, dtype=torch.float32, chunk_tokens=chunk_tokens)
        assert 1 <= head.chunk_tokens <= chunk_tokens
        assert head.chunk_tokens == 1 or head.chunk_tokens * num_ids * 4096 <= 2**24


@pytest.mark.parametrize("scale", [1, 400])
@pytest.mark.parametrize(("name", "options"), VARIANTS.values(), ids=VARIANTS)
def test_a_vocabulary_in_several_blocks_gives_what_one_block_gives(name: str, options: dict, scale: float) -> None:
    """The wider a chunk, the fewer columns are worked on at a time; logits of thousands overflow in no block."""
    problem = long_problem(num_tokens=1030, vocab_size=600, dim=4, dtype=torch.float64)
    assert len(list(blocks(torch.empty(515, 600)))) > 1
    assert len(list(blocks(torch.empty(103, 600)))) == 1
    problem = replace(problem, hidden_ND=(scale * problem.hidden_ND.detach()).requires_grad_())
    with torch.no_grad():
        signal = problem.signal(OBJECTIVES[name].payload(ObjectiveOptions(**options)))
    several, one = (
        everything(
            losses_of(name, problem, signal=signal, **options, chunk_tokens=chunk_tokens, diagnostic_tokens=1030),
            problem,
        )
        for chunk_tokens in (1030, 103)
    )
    assert all(tensor.isfinite().all() for tensor in several.values())
    assert_close(several, one, 1e-11 * scale)
