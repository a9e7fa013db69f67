import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from opd_ray.objectives.equivalence import Equivalence
from opd_ray.protocol import Payload, ScoreRequest
from workers.teacher.head import TeacherHead
from workers.teacher.products import OutputMatrix

NUM_ROWS, HIDDEN_SIZE = 40, 8
CLASSES = ((7, 3, 30), (12, 39))
CPU = torch.device("cpu")


def make_case(num_tokens: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return states, head and sampled ids."""
    generator = torch.Generator().manual_seed(num_tokens)
    hidden_ND = torch.randn(num_tokens, HIDDEN_SIZE, generator=generator).to(dtype)
    head_VD = torch.randn(NUM_ROWS, HIDDEN_SIZE, generator=generator).to(dtype)
    return hidden_ND, head_VD, torch.randint(NUM_ROWS, (num_tokens,), generator=generator)


def make_student_ids(num_tokens: int, num_ids: int = 5) -> torch.Tensor:
    """Return distinct ids in every row, the last of them -1 in every second row."""
    generator = torch.Generator().manual_seed(1000 + num_tokens)
    ids_NK = torch.rand(num_tokens, NUM_ROWS, generator=generator).argsort(-1)[:, :num_ids]
    ids_NK[::2, -1] = -1
    return ids_NK


def make_head(head_VD: torch.Tensor, *, temperature: float = 1.0, classes: Sequence[Sequence[int]] = ()) -> TeacherHead:
    equivalence = Equivalence.of(classes, device=CPU)
    return TeacherHead(head_VD, vocab_size=len(head_VD), temperature=temperature, equivalence=equivalence)


def sampled_of(head: TeacherHead, hidden_ND: torch.Tensor, ids_N: torch.Tensor) -> torch.Tensor:
    """Return the log-probs [N] of a `sampled` payload."""
    none_NK = torch.empty(len(ids_N), 0, dtype=torch.int64)
    request = ScoreRequest(payload=Payload.sampled)
    return head.score(hidden_ND, ids_N=ids_N, student_ids_NK=none_NK, request=request).sampled_logprobs_N


def support_of(head: TeacherHead, hidden_ND: torch.Tensor, **given: Any) -> tuple[torch.Tensor, ...]:
    """Return ids [N,K], log-probs [N,K] and the sampled tokens' log-probs."""
    said = head.score(hidden_ND, **given)
    return said.ids_NK, said.logprobs_NK, said.sampled_logprobs_N


def naive_logprobs(
    hidden_ND: torch.Tensor,
    head_VD: torch.Tensor,
    temperature: float = 1.0,
    classes: Sequence[Sequence[int]] = (),
) -> torch.Tensor:
    """Return log-probs [N,V] in float64, the whole mass of each class at its first id and none at the others."""
    p_NV = (hidden_ND.double() @ head_VD.double().T / temperature).softmax(-1)
    for first, *others in classes:
        for other in others:
            p_NV[:, first] += p_NV[:, other]
            p_NV[:, other] = 0
    return p_NV.log()


def canonical(id_: int, classes: Sequence[Sequence[int]]) -> int:
    return next((class_[0] for class_ in classes if id_ in class_), id_)


def naive_columns(logprobs_V: list[float], given: list[int], request: ScoreRequest, sampled: int) -> list[int]:
    """Return a row's ids, one column after the other; all ids given are canonical."""
    by_mass = sorted(range(len(logprobs_V)), key=lambda id_: -logprobs_V[id_])
    columns, mass = [], 0.0
    for id_ in by_mass[: 0 if request.support == "student" else request.top_k]:
        columns.append(id_ if mass < request.top_p or request.top_p == 1 else -1)
        mass += np.exp(logprobs_V[id_])
    columns += given if request.support != "teacher" else []
    columns += [sampled] if request.include_sampled else []
    return [-1 if id_ in columns[:place] else id_ for place, id_ in enumerate(columns)]


def a_request(**given: object) -> ScoreRequest:
    return ScoreRequest(payload=Payload.support, **{"top_k": 6, **given})


@pytest.mark.parametrize("num_tokens", [1, 5, 512, 513, 1100])  # a chunk holds 512
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampled_logprobs_are_those_of_the_whole_vocabulary_at_the_temperature(num_tokens: int, temperature: float):
    hidden_ND, head_VD, ids_N = make_case(num_tokens)
    given_N = sampled_of(make_head(head_VD, temperature=temperature), hidden_ND, ids_N)
    expected_N = naive_logprobs(hidden_ND, head_VD, temperature).gather(1, ids_N[:, None]).squeeze(1)
    assert given_N.dtype is torch.float32
    torch.testing.assert_close(given_N.double(), expected_N, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("num_tokens", [1, 512, 513])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_support_of_the_teacher_is_its_likeliest_tokens_with_logprobs_over_the_whole_vocabulary(
    num_tokens: int, temperature: float
):
    hidden_ND, head_VD, ids_N = make_case(num_tokens)
    ids_NK, logprobs_NK, sampled_N = support_of(
        make_head(head_VD, temperature=temperature),
        hidden_ND,
        ids_N=ids_N,
        student_ids_NK=make_student_ids(num_tokens),
        request=a_request(),
    )
    expected_NK, expected_ids_NK = naive_logprobs(hidden_ND, head_VD, temperature).topk(6)
    assert (ids_NK.dtype, logprobs_NK.dtype, sampled_N.dtype) == (torch.int32, torch.float32, torch.float32)
    assert torch.equal(ids_NK.long(), expected_ids_NK)
    torch.testing.assert_close(logprobs_NK.double(), expected_NK, atol=1e-5, rtol=1e-5)
    assert len(sampled_N) == 0


def test_bfloat16_states_and_head_are_multiplied_in_float32():
    hidden_ND, head_VD, ids_N = make_case(7, torch.bfloat16)
    given_N = sampled_of(make_head(head_VD), hidden_ND, ids_N)
    expected_N = naive_logprobs(hidden_ND, head_VD).gather(1, ids_N[:, None]).squeeze(1)
    torch.testing.assert_close(given_N.double(), expected_N, atol=1e-5, rtol=1e-5)
    request = a_request(support="student", normalised=False)
    ids_NK, logits_NK, _ = support_of(
        make_head(head_VD), hidden_ND, ids_N=ids_N, student_ids_NK=make_student_ids(7)[:, :4], request=request
    )
    expected_NK = (hidden_ND.double() @ head_VD.double().T).gather(1, ids_NK.long())
    assert logits_NK.dtype is torch.float32
    torch.testing.assert_close(logits_NK.double(), expected_NK, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("num_top", [1, 6, NUM_ROWS])
def test_the_probabilities_add_up_to_one_over_the_whole_vocabulary_only(num_top: int):
    hidden_ND, head_VD, ids_N = make_case(9)
    _, logprobs_NK, _ = support_of(
        make_head(head_VD), hidden_ND, ids_N=ids_N, student_ids_NK=make_student_ids(9), request=a_request(top_k=num_top)
    )
    gap = 1 - float(logprobs_NK.exp().sum(-1).min())
    assert abs(gap) < 1e-5 if num_top == NUM_ROWS else gap > 0.01


REQUESTS = [
    a_request(support=source, include_sampled=include, top_p=top_p, normalised=normalised, sampled_logprobs=sampled)
    for source, include, top_p, normalised, sampled in itertools.product(
        ("teacher", "student", "union"), (False, True), (1.0, 0.6), (True, False), (False, True)
    )
]


@pytest.mark.parametrize("num_tokens", [6, 513])
@pytest.mark.parametrize("classes", [(), CLASSES])
@pytest.mark.parametrize("request_", REQUESTS)
def test_every_request_is_answered_as_a_literal_loop_in_float64_answers_it(
    request_: ScoreRequest, classes: Sequence[Sequence[int]], num_tokens: int
):
    hidden_ND, head_VD, ids_N = make_case(num_tokens)
    student_ids_NK = make_student_ids(num_tokens)
    ids_NK, logprobs_NK, sampled_N = support_of(
        make_head(head_VD, temperature=0.7, classes=classes),
        hidden_ND,
        ids_N=ids_N,
        student_ids_NK=student_ids_NK,
        request=request_,
    )
    naive_NV = naive_logprobs(hidden_ND, head_VD, 0.7, classes)
    expected_NK = [
        naive_columns(logprobs, [canonical(i, classes) for i in given], request_, canonical(sampled, classes))
        for logprobs, given, sampled in zip(naive_NV.tolist(), student_ids_NK.tolist(), ids_N.tolist(), strict=True)
    ]
    assert ids_NK.tolist() == expected_NK
    present_NK = ids_NK >= 0
    naive_NK = naive_NV.gather(1, ids_NK.long().clamp(min=0))
    difference_NK = (logprobs_NK.double() - naive_NK).where(present_NK, torch.nan)
    constant_N1 = 0 if request_.normalised else difference_NK.nanmean(-1, keepdim=True)
    assert float((difference_NK - constant_N1)[present_NK].abs().max()) < 2e-5
    if request_.sampled_logprobs:
        canonical_N1 = torch.tensor([[canonical(i, classes)] for i in ids_N.tolist()])
        torch.testing.assert_close(
            sampled_N.double(), naive_NV.gather(1, canonical_N1).squeeze(1), atol=1e-5, rtol=1e-5
        )
    else:
        assert len(sampled_N) == 0


def test_the_top_p_mass_keeps_the_fewest_of_the_likeliest_tokens_that_hold_it_and_at_least_one():
    # softmax of these logits: 0.5, 0.25, 0.125, 0.125
    head = make_head(torch.tensor([[0.5], [0.25], [0.125], [0.125]]).log())
    kept = {}
    for top_p in (0.01, 0.5, 0.51, 0.75, 0.76, 0.8751, 1.0):
        ids_NK, _, _ = support_of(
            head,
            torch.ones(1, 1),
            ids_N=torch.tensor([3]),
            student_ids_NK=torch.empty(1, 0, dtype=torch.int64),
            request=a_request(top_k=4, top_p=top_p),
        )
        kept[top_p] = int((ids_NK >= 0).sum())
    assert kept[0.01] == 1
    assert kept[0.51] == 2
    assert kept[0.76] == 3
    assert kept[0.8751] == 4
    assert kept[1.0] == 4


def test_a_token_is_left_out_where_the_likelier_ones_hold_exactly_the_mass_and_none_where_all_of_it_is_asked_for():
    even, sure = make_head(torch.zeros(2, 1)), make_head(torch.tensor([[0.0], [-30.0], [-40.0]]))
    given = {"ids_N": torch.tensor([0]), "student_ids_NK": torch.empty(1, 0, dtype=torch.int64)}
    ids_NK, _, _ = support_of(even, torch.ones(1, 1), request=a_request(top_k=2, top_p=0.5), **given)
    assert int((ids_NK >= 0).sum()) == 1
    ids_NK, _, _ = support_of(sure, torch.ones(1, 1), request=a_request(top_k=3), **given)
    assert ids_NK.tolist() == [[0, 1, 2]]


def test_an_id_that_a_column_further_left_has_is_given_once():
    head = make_head(torch.tensor([[3.0], [2.0], [1.0], [0.0]]))
    ids_NK, _, _ = support_of(
        head,
        torch.ones(2, 1),
        ids_N=torch.tensor([2, 0]),
        student_ids_NK=torch.tensor([[1, 3], [2, -1]]),
        request=a_request(support="union", top_k=2, include_sampled=True),
    )
    assert ids_NK.tolist() == [[0, 1, -1, 3, 2], [0, 1, 2, -1, -1]]


def test_a_student_id_that_the_teachers_top_p_left_out_comes_back_as_the_students():
    head = make_head(torch.tensor([[3.0], [2.0], [1.0], [0.0]]))
    ids_NK, logprobs_NK, _ = support_of(
        head,
        torch.ones(1, 1),
        ids_N=torch.tensor([0]),
        student_ids_NK=torch.tensor([[1, 3]]),
        request=a_request(support="union", top_k=2, top_p=0.5),
    )
    assert ids_NK.tolist() == [[0, -1, 1, 3]]
    torch.testing.assert_close(logprobs_NK[0, 2], torch.tensor([3.0, 2.0, 1.0, 0.0]).log_softmax(-1)[1])


@pytest.mark.parametrize("include_sampled", [False, True])
@pytest.mark.parametrize("num_tokens", [6, 513])
def test_where_a_constant_may_be_missing_only_the_rows_of_the_given_ids_are_read(
    num_tokens: int, include_sampled: bool
):
    hidden_ND, head_VD, _ = make_case(num_tokens)
    used = torch.tensor([4, 9, 17])
    unread_VD = torch.full_like(head_VD, torch.nan)
    unread_VD[used] = head_VD[used]
    head, generator = make_head(unread_VD, temperature=0.7), torch.Generator().manual_seed(0)
    student_ids_NK = used[torch.rand(num_tokens, 3, generator=generator).argsort(-1)]
    ids_N = used[torch.randint(3, (num_tokens,), generator=generator)]
    ids_NK, logits_NK, sampled_N = support_of(
        head,
        hidden_ND,
        ids_N=ids_N,
        student_ids_NK=student_ids_NK,
        request=a_request(support="student", normalised=False, include_sampled=include_sampled),
    )
    assert torch.equal(ids_NK[:, :3].long(), student_ids_NK)
    expected_NK = (hidden_ND.double() @ head_VD.double().T / 0.7).gather(1, student_ids_NK)
    torch.testing.assert_close(logits_NK[:, :3].double(), expected_NK, atol=1e-5, rtol=1e-5)
    assert ids_NK[:, 3:].tolist() == ([[-1]] * num_tokens if include_sampled else [[]] * num_tokens)
    assert len(sampled_N) == 0


@pytest.mark.parametrize(
    "given",
    [{"normalised": True}, {"normalised": False, "sampled_logprobs": True}, {"normalised": False, "support": "union"}],
)
def test_whatever_needs_the_normaliser_reads_the_whole_head(given: dict[str, object]):
    hidden_ND, head_VD, _ = make_case(4)
    head_VD[20] = torch.nan
    _, logprobs_NK, _ = support_of(
        make_head(head_VD),
        hidden_ND,
        ids_N=torch.full((4,), 2),
        student_ids_NK=torch.tensor([[4, 9]] * 4),
        request=a_request(**{"support": "student", **given}),
    )
    assert logprobs_NK[:, -1].isnan().all()


def test_the_mass_of_a_class_is_summed_before_the_likeliest_tokens_are_chosen():
    # Ids 2 and 3 have 0.2 each and are one outcome of 0.4, more than id 0 with 0.35 and id 1 with 0.25.
    head = make_head(torch.tensor([[0.35], [0.25], [0.2], [0.2]]).log(), classes=[[3, 2]])
    states, student_ids = torch.ones(1, 1), torch.tensor([[2, 3]])
    ids_NK, logprobs_NK, sampled_N = support_of(
        head,
        states,
        ids_N=torch.tensor([2]),
        student_ids_NK=student_ids,
        request=a_request(top_k=2, sampled_logprobs=True),
    )
    assert ids_NK.tolist() == [[3, 0]]
    torch.testing.assert_close(logprobs_NK.exp(), torch.tensor([[0.4, 0.35]]))
    torch.testing.assert_close(sampled_N.exp(), torch.tensor([0.4]))
    both_N = sampled_of(head, states.expand(2, 1), torch.tensor([2, 3]))
    torch.testing.assert_close(both_N.exp(), torch.tensor([0.4, 0.4]))
    union_NK, _, _ = support_of(
        head,
        states,
        ids_N=torch.tensor([2]),
        student_ids_NK=student_ids,
        request=a_request(support="union", top_k=2, include_sampled=True),
    )
    assert union_NK.tolist() == [[3, 0, -1, -1, -1]]


def test_ids_of_the_student_that_the_teacher_lacks_are_no_ids():
    head = make_head(torch.tensor([[3.0], [2.0], [1.0], [0.0]]))
    for normalised in (True, False):
        ids_NK, _, _ = support_of(
            head,
            torch.ones(1, 1),
            ids_N=torch.tensor([0]),
            student_ids_NK=torch.tensor([[1, 4, 3, 99]]),
            request=a_request(support="student", normalised=normalised),
        )
        assert ids_NK.tolist() == [[1, -1, 3, -1]]


DROPPED_VOCAB_SIZES = [NUM_ROWS - 1, 33, 32, 31, 5]  # the head keeps 40 rows


@pytest.mark.parametrize("vocab_size", DROPPED_VOCAB_SIZES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("num_tokens", [5, 513])
def test_the_softmax_is_over_the_common_vocabulary_and_the_mass_beyond_it_is_counted(
    vocab_size: int, temperature: float, num_tokens: int
):
    hidden_ND, head_RD, _ = make_case(num_tokens)
    equivalence = Equivalence.of([(0, 3)], device=CPU)
    head = TeacherHead(head_RD, vocab_size=vocab_size, temperature=temperature, equivalence=equivalence)
    said = head.score(
        hidden_ND,
        ids_N=torch.full((num_tokens,), 4),
        student_ids_NK=make_student_ids(num_tokens),
        request=a_request(top_k=vocab_size, sampled_logprobs=True),
    )
    whole_NR = naive_logprobs(hidden_ND, head_RD, temperature)
    expected_NV = naive_logprobs(hidden_ND, head_RD[:vocab_size], temperature, [(0, 3)])
    assert said.ids_NK[:, :-1].sort(-1).values.tolist() == [[i for i in range(vocab_size) if i != 3]] * num_tokens
    given_NK = expected_NV.gather(1, said.ids_NK[:, :-1].long())
    torch.testing.assert_close(said.logprobs_NK[:, :-1].double(), given_NK, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(said.sampled_logprobs_N.double(), expected_NV[:, 4], atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(
        said.dropped_mass_N.double(), whole_NR[:, vocab_size:].exp().sum(-1), atol=1e-6, rtol=1e-5
    )


@pytest.mark.parametrize(
    "request_",
    [ScoreRequest(payload=Payload.hidden), a_request(support="student", normalised=False)],
    ids=["hidden", "logits alone"],
)
def test_the_dropped_mass_is_not_computed_where_the_normaliser_is_not(request_: ScoreRequest):
    hidden_ND, head_RD, ids_N = make_case(3)
    for vocab_size, holds in ((NUM_ROWS - 1, torch.isnan), (NUM_ROWS, lambda mass_N: mass_N == 0)):
        head = TeacherHead(head_RD, vocab_size=vocab_size, temperature=1.0, equivalence=Equivalence.of((), device=CPU))
        said = head.score(hidden_ND, ids_N=ids_N, student_ids_NK=make_student_ids(3), request=request_)
        assert holds(said.dropped_mass_N).tolist() == [True] * 3


def test_hidden_states_come_with_the_sampled_logprobs_if_asked_for_and_nothing_else():
    hidden_ND, head_VD, ids_N = make_case(6)
    head = make_head(head_VD)
    for sampled in (False, True):
        request = ScoreRequest(payload=Payload.hidden, sampled_logprobs=sampled)
        said = head.score(hidden_ND, ids_N=ids_N, student_ids_NK=make_student_ids(6), request=request)
        assert said.ids_NK.shape == said.logprobs_NK.shape == (6, 0)
        expected_N = sampled_of(head, hidden_ND, ids_N) if sampled else torch.empty(0)
        assert torch.equal(said.sampled_logprobs_N, expected_N)


def test_a_head_with_fewer_rows_than_the_common_vocabulary_is_refused():
    with pytest.raises(ValueError, match="the teacher's head has 40 rows, expected at least 41"):
        TeacherHead(make_case(1)[1], vocab_size=41, temperature=1.0, equivalence=Equivalence.of((), device=CPU))


def test_the_scores_of_a_group_outlive_the_next_call():
    hidden_ND, head_VD, ids_N = make_case(6)
    head = make_head(head_VD)
    first = sampled_of(head, hidden_ND, ids_N)
    before = first.clone()
    sampled_of(head, -hidden_ND, ids_N)
    assert torch.equal(first, before)


@pytest.mark.parametrize("num_ids", [0, 1, 5])
def test_rows_gathered_as_on_a_gpu_give_the_logits_that_a_cpu_samples(num_ids: int):
    hidden_ND, head_VD, _ = make_case(7)
    matrix = OutputMatrix(head_VD, temperature=0.7)
    ids_NK = make_student_ids(7)[:, :num_ids].clamp(min=0)
    gathered_NK = matrix._gathered(hidden_ND / 0.7, ids_NK)
    assert gathered_NK.shape == (7, num_ids)
    torch.testing.assert_close(gathered_NK, matrix.logits_at(hidden_ND, ids_NK))
