"""The teacher's log-probs on the student's tokens: sums of spans, and text models whose log-probs are known."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opd_ray.data.alignment import Alignment, TokenText, align
from opd_ray.data.span_logprobs import SpreadLogprobs, spread
from opd_ray.objectives import OBJECTIVES, ObjectiveOptions, PolicyOptions, SampledSignal, Tokens

PIECES = st.tuples(*[st.lists(st.integers(1, 3), max_size=12)] * 2)


def cut(text: bytes, sizes: list[int]) -> list[bytes]:
    bounds = [*itertools.takewhile(lambda end: end < len(text), itertools.accumulate(sizes, initial=0)), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(bounds)]


def aligned(student: list[bytes], teacher: list[bytes]) -> Alignment:
    return align(TokenText.of(student), TokenText.of(teacher))


def spread_all(logprobs_M: np.ndarray, alignment: Alignment, sampled_N: np.ndarray) -> SpreadLogprobs:
    loss_mask_N = np.ones(len(sampled_N), dtype=np.bool_)
    return spread(logprobs_M, alignment=alignment, sampled_logprobs_N=sampled_N, loss_mask_N=loss_mask_N)


def draws(seed: int, size: int) -> np.ndarray:
    return -np.random.default_rng(seed).exponential(size=size).astype(np.float32)


@given(sizes=PIECES, seed=st.integers(0, 9))
def test_the_shares_of_a_span_sum_to_the_teachers_log_prob_and_cost_all_the_same(
    sizes: tuple[list[int], list[int]], seed: int
) -> None:
    text = bytes(range(20))
    alignment = aligned(cut(text, sizes[0]), cut(text, sizes[1]))
    sampled_N, logprobs_M = draws(seed, len(alignment.student_spans_N)), draws(seed + 1, len(alignment.teacher_spans_M))
    result = spread_all(logprobs_M, alignment, sampled_N)
    assert result.valid_N.all()
    assert result.logprobs_N.dtype == np.float32
    for span in range(len(alignment.covered_S)):
        of_student, of_teacher = alignment.student_spans_N == span, alignment.teacher_spans_M == span
        np.testing.assert_allclose(result.logprobs_N[of_student].sum(), logprobs_M[of_teacher].sum(), atol=1e-5)
        cost = sampled_N[of_student] - result.logprobs_N[of_student]
        np.testing.assert_allclose(cost, cost[0], atol=1e-5)


@given(sizes=st.lists(st.integers(1, 3), max_size=12), seed=st.integers(0, 9))
def test_equal_tokens_get_the_teachers_log_probs_to_the_bit(sizes: list[int], seed: int) -> None:
    pieces = cut(bytes(range(20)), sizes)
    logprobs_M = draws(seed, len(pieces))
    result = spread_all(logprobs_M, aligned(pieces, pieces), draws(seed + 1, len(pieces)))
    assert result.logprobs_N.tobytes() == logprobs_M.tobytes()


def test_a_student_token_alone_in_its_span_gets_the_sum_of_the_teachers_tokens() -> None:
    result = spread_all(np.float32([-1, -2]), aligned([b"ab"], [b"a", b"b"]), np.float32([-0.3]))
    assert result.logprobs_N.tolist() == [-3.0]


def test_a_span_that_the_teacher_does_not_cover_is_not_valid_and_costs_nothing() -> None:
    text = TokenText.of([b"a", b"b", b"c"])
    teacher = TokenText(symbols_B=text.symbols_B, starts_N=np.array([0]), ends_N=np.array([1]))
    result = spread_all(np.float32([-1]), align(text, teacher), np.float32([-0.25, -0.5, -0.75]))
    assert result.valid_N.tolist() == [True, False, False]
    assert result.logprobs_N.tolist() == [-1.0, -0.5, -0.75]


def test_a_span_with_a_token_that_the_policy_did_not_choose_is_not_valid() -> None:
    alignment = aligned([b"a", b"b", b"c", b"d"], [b"a", b"bc", b"d"])
    loss_mask_N = np.array([True, True, False, False])
    sampled_N, logprobs_M = np.float32([-1, -1, 0, 0]), np.float32([-2, -2, -2])
    result = spread(logprobs_M, alignment=alignment, sampled_logprobs_N=sampled_N, loss_mask_N=loss_mask_N)
    assert result.valid_N.tolist() == [True, False, False, False]


def test_an_empty_text_has_no_log_probs() -> None:
    nothing = np.empty(0, dtype=np.float32)
    assert len(spread_all(nothing, aligned([], []), nothing).logprobs_N) == 0


def test_lengths_that_do_not_fit_are_refused() -> None:
    alignment, two = aligned([b"a", b"b"], [b"ab"]), np.float32([-1, -1])
    with pytest.raises(ValueError, match="2 teacher log-probs for an alignment of 1 tokens"):
        spread_all(two, alignment, two)
    with pytest.raises(ValueError, match="1 sampled log-probs for an alignment of 2 tokens"):
        spread_all(two[:1], alignment, two[:1])
    with pytest.raises(ValueError, match="1 loss mask entries for an alignment of 2 tokens"):
        spread(two[:1], alignment=alignment, sampled_logprobs_N=two, loss_mask_N=np.array([True]))
    with pytest.raises(ValueError, match=r"expected \[N\] twice"):
        SpreadLogprobs(logprobs_N=two, valid_N=np.array([True]))


# Text models: the next byte, `a`, `b` or `c`, given the byte before; so every cut of a text has the text's log-prob.
LETTERS = b"abc"
LENGTH = 5
P, Q = (np.random.default_rng(seed).dirichlet(np.ones(3), size=4) for seed in (0, 1))
MERGES = {"student": (b"ab", b"ca", b"bb"), "teacher": (b"bc", b"ba", b"aa", b"cab")}


def log_prob(model: np.ndarray, text: bytes, start: int, end: int) -> float:
    """Of text[start:end] after text[:start]."""
    rows = [LETTERS.index(text[i - 1]) if i else 3 for i in range(start, end)]
    return sum(math.log(model[row, LETTERS.index(text[i])]) for row, i in zip(rows, range(start, end), strict=True))


def tokens(text: bytes, side: str) -> list[bytes]:
    """Cut off the longest merge, or one letter, until nothing is left."""
    pieces: list[bytes] = []
    while text:
        longest = max([m for m in MERGES[side] if text.startswith(m)], key=len, default=text[:1])
        pieces.append(longest)
        text = text[len(longest) :]
    return pieces


def token_logprobs(model: np.ndarray, pieces: list[bytes]) -> np.ndarray:
    text, bounds = b"".join(pieces), itertools.accumulate(map(len, pieces), initial=0)
    return np.float32([log_prob(model, text, a, b) for a, b in itertools.pairwise(bounds)])


def test_costs_of_text_models_are_those_of_the_text_whatever_the_tokens() -> None:
    mean_cost = divergence = 0.0
    for letters in itertools.product(LETTERS, repeat=LENGTH):
        text = bytes(letters)
        student, teacher = tokens(text, "student"), tokens(text, "teacher")
        alignment, sampled_N = aligned(student, teacher), token_logprobs(P, student)
        result = spread_all(token_logprobs(Q, teacher), alignment, sampled_N)
        bounds = list(itertools.accumulate(map(len, student), initial=0))
        for span in range(len(alignment.covered_S)):
            in_span = np.flatnonzero(alignment.student_spans_N == span)
            a, b = bounds[in_span[0]], bounds[in_span[-1] + 1]
            cost = (sampled_N - result.logprobs_N)[in_span].sum()
            assert cost == pytest.approx(log_prob(P, text, a, b) - log_prob(Q, text, a, b), abs=1e-5)
        total = log_prob(Q, text, 0, LENGTH)
        assert result.logprobs_N.sum() == pytest.approx(total, abs=1e-5)
        probability = math.exp(log_prob(P, text, 0, LENGTH))
        mean_cost += probability * float((sampled_N - result.logprobs_N).sum())
        divergence += probability * (log_prob(P, text, 0, LENGTH) - total)
    assert mean_cost == pytest.approx(divergence, abs=1e-5)
    assert divergence > 0.1


def test_a_teacher_with_the_students_text_model_costs_nothing_on_any_token() -> None:
    for text in (b"abcabcaab", b"cabbacab", b"bbbaaacab"):
        student, teacher = tokens(text, "student"), tokens(text, "teacher")
        sampled_N = token_logprobs(P, student)
        result = spread_all(token_logprobs(P, teacher), aligned(student, teacher), sampled_N)
        np.testing.assert_allclose(result.logprobs_N, sampled_N, atol=1e-6)


@settings(max_examples=20, deadline=None)
@given(sizes=PIECES, seed=st.integers(0, 9))
def test_the_sampled_objective_costs_spans_rightly_also_when_the_student_has_moved_on(
    sizes: tuple[list[int], list[int]], seed: int
) -> None:
    text = bytes(range(20))
    alignment = aligned(cut(text, sizes[0]), cut(text, sizes[1]))
    num_tokens = len(alignment.student_spans_N)
    logprobs_M, sampled_N = draws(seed, len(alignment.teacher_spans_M)), draws(seed + 1, num_tokens)
    result = spread_all(logprobs_M, alignment, sampled_N)
    generator = torch.Generator().manual_seed(seed)
    hidden_ND, head_VD = torch.randn(num_tokens, 4, generator=generator), torch.randn(7, 4, generator=generator)
    ids_N = torch.randint(7, (num_tokens,), generator=generator)
    now_N = (hidden_ND @ head_VD.T).log_softmax(-1).gather(1, ids_N[:, None]).squeeze(1)
    losses = OBJECTIVES["sampled"].losses(
        hidden_ND,
        head_VD,
        tokens=Tokens(
            ids_N=ids_N,
            offsets=torch.tensor([0, num_tokens]),
            mask_N=torch.from_numpy(result.valid_N),
            weights_N=torch.ones(num_tokens),
            sampler_logprobs_N=torch.from_numpy(sampled_N),
            advantages_N=torch.zeros(num_tokens),
        ),
        signal=SampledSignal(logprobs_N=torch.from_numpy(result.logprobs_N)),
        options=ObjectiveOptions(policy=PolicyOptions()),
    )
    spans_N, num_spans = alignment.student_spans_N, len(alignment.covered_S)
    cost_S = np.bincount(spans_N, weights=losses.divergence_N.numpy(), minlength=num_spans)
    teacher_S = np.bincount(alignment.teacher_spans_M, weights=logprobs_M)
    expected_S = np.bincount(spans_N, weights=now_N.numpy()) - teacher_S
    np.testing.assert_allclose(cost_S, expected_S, atol=1e-4)
