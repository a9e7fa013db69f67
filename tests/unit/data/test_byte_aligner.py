"""A whole group there and back again, between real tokenizers."""

import itertools

import numpy as np
import pytest
from alignment_tokenizers import CORPUS, STUDENT, TEACHER, TEACHERS, TEXTS, ids_of, token_map
from hypothesis import example, given, settings
from hypothesis import strategies as st

from opd_ray.data.byte_aligner import ByteAligner, TeacherGroup
from opd_ray.data.token_text import token_bytes
from opd_ray.protocol import Finish, SampledScore, TrajectoryGroup

ALIGNERS = {
    name: ByteAligner(STUDENT, tokenizer, token_map=token_map(tokenizer)) for name, tokenizer in TEACHERS.items()
}
SAME = ByteAligner(STUDENT, STUDENT, token_map={})
RESPONSES = st.lists(st.lists(st.integers(0, len(STUDENT) + 2), max_size=12), min_size=1, max_size=3)
PROMPT = ids_of(STUDENT, "<|im_start|>the answer<|im_end|>\n")


def group_of(responses: list[list[int]], *, prompt: list[int] = PROMPT) -> TrajectoryGroup:
    num_tokens = sum(map(len, responses))
    return TrajectoryGroup(
        prompt_ids=np.array(prompt, dtype=np.int32),
        response_ids=np.array(list(itertools.chain(*responses)), dtype=np.int32),
        offsets=np.cumsum([0, *map(len, responses)], dtype=np.int32),
        sampled_logprobs=np.linspace(-3, -0.1, num_tokens, dtype=np.float32),
        token_versions=np.zeros(num_tokens, dtype=np.int32),
        loss_mask=np.ones(num_tokens, dtype=np.bool_),
        support_ids=np.empty((num_tokens, 0), dtype=np.int32),
        rewards=np.empty(0, dtype=np.float32),
        finish=np.full(len(responses), Finish.stop, dtype=np.int8),
        prompt_index=5,
        task="exact",
        seed=0,
    )


def ramp(group: TeacherGroup) -> np.ndarray:
    return -np.arange(1, len(group.response_ids) + 1, dtype=np.float32) / 8


def test_a_group_there_and_back() -> None:
    end, tool = (TEACHER.convert_tokens_to_ids(token) for token in ("<eos>", "[TOOL]"))
    texts = ["the thinking answer<|im_end|>", "12<tool_call>def größer<|im_end|>"]
    group = group_of([ids_of(STUDENT, text) for text in texts])
    there = ALIGNERS["byte level"].to_teacher(group)
    expected = [[*ids_of(TEACHER, "the thinking answer"), end]]
    expected += [[*ids_of(TEACHER, "12"), tool, *ids_of(TEACHER, "def größer"), end]]
    assert [there.response_ids[a:b].tolist() for a, b in itertools.pairwise(there.offsets)] == expected
    back = there.to_student(ramp(there), group=group)
    assert back.valid_N.all()
    assert len(SampledScore(logprobs_N=back.logprobs_N).logprobs_N) == len(group.response_ids)
    for a, b, c, d in zip(group.offsets, group.offsets[1:], there.offsets, there.offsets[1:], strict=False):
        assert back.logprobs_N[a:b].sum() == pytest.approx(ramp(there)[c:d].sum(), abs=1e-4)
        assert back.logprobs_N[b - 1] == ramp(there)[d - 1]  # the end token has the log-prob of its counterpart


def test_the_prompt_is_read_for_itself_with_its_special_tokens() -> None:
    there = ALIGNERS["byte level"].to_teacher(group_of([[]]))
    end = TEACHER.convert_tokens_to_ids("<eos>")
    start = ids_of(TEACHER, "<|im_start|>the answer")  # has no counterpart, so it is text
    assert there.prompt_ids.tolist() == [*start, end, *ids_of(TEACHER, "\n")]
    assert there.prompt_ids.dtype == np.int32


def test_special_tokens_of_both_tokenizers_need_no_entry() -> None:
    pad = STUDENT.convert_tokens_to_ids("<|pad|>")
    there = ALIGNERS["byte level"].to_teacher(group_of([[pad]]))
    assert there.response_ids.tolist() == [TEACHER.convert_tokens_to_ids("<|pad|>")]


@pytest.mark.parametrize("name", ALIGNERS)
@given(text=TEXTS)
@example(text="".join(CORPUS[:5]) + "e\u0301🙂")
@settings(max_examples=30, deadline=None)
def test_log_probs_of_any_text_sum_alike_on_both_sides(name: str, text: str) -> None:
    group = group_of([ids_of(STUDENT, text), ids_of(STUDENT, "the<|im_end|>")])
    there = ALIGNERS[name].to_teacher(group)
    back = there.to_student(ramp(there), group=group)
    alignment = there.alignment
    valid_S = np.bincount(alignment.student_spans_N, weights=back.valid_N) > 0
    for span in np.flatnonzero(valid_S):
        given_ = ramp(there)[alignment.teacher_spans_M == span].sum()
        assert back.logprobs_N[alignment.student_spans_N == span].sum() == pytest.approx(given_, abs=1e-3)
    assert back.valid_N[group.offsets[1] :].all()
    if name == "byte level":
        assert back.valid_N.all()


@pytest.mark.parametrize("name", ALIGNERS)
@given(responses=RESPONSES)
@settings(max_examples=40, deadline=None)
def test_any_ids_come_back_with_finite_log_probs(name: str, responses: list[list[int]]) -> None:
    group = group_of(responses)
    there = ALIGNERS[name].to_teacher(group)
    back = there.to_student(ramp(there), group=group)
    assert len(there.offsets) == len(group.offsets)
    assert np.isfinite(back.logprobs_N).all()
    assert (back.logprobs_N[~back.valid_N] == group.sampled_logprobs[~back.valid_N]).all()


@given(responses=RESPONSES)
@settings(max_examples=40, deadline=None)
def test_equal_tokenizers_change_nothing_whatever_the_student_wrote(responses: list[list[int]]) -> None:
    responses = [[id_ for id_ in response if id_ < len(STUDENT)] for response in responses]
    group = group_of(responses)
    there = SAME.to_teacher(group)
    assert there.prompt_ids.tobytes() == group.prompt_ids.tobytes()
    assert there.response_ids.tobytes() == group.response_ids.tobytes()
    assert there.offsets.tobytes() == group.offsets.tobytes()
    back = there.to_student(ramp(there), group=group)
    assert back.logprobs_N.tobytes() == ramp(there).tobytes()
    assert back.valid_N.all()


def test_a_table_may_change_tokens_between_equal_tokenizers() -> None:
    aligner = ByteAligner(STUDENT, STUDENT, token_map={"<|im_end|>": "<|pad|>"})
    there = aligner.to_teacher(group_of([ids_of(STUDENT, "the<|im_end|>")]))
    assert there.response_ids.tolist() == ids_of(STUDENT, "the<|pad|>")


@pytest.mark.parametrize("name", ALIGNERS)
@pytest.mark.parametrize("num_tokens", [0, 1])
def test_a_response_of_no_token_or_one(name: str, num_tokens: int) -> None:
    group = group_of([ids_of(STUDENT, "the")[:num_tokens], ids_of(STUDENT, "<|im_end|>")[:num_tokens]])
    there = ALIGNERS[name].to_teacher(group)
    back = there.to_student(ramp(there), group=group)
    assert back.logprobs_N.tolist() == ([ramp(there)[:-1].sum(), ramp(there)[-1]] if num_tokens else [])
    assert back.valid_N.all()


@pytest.mark.parametrize("name", ["byte level", "normalising", "byte fallback"])
def test_a_character_cut_at_the_end_is_one_last_span_that_is_not_valid(name: str) -> None:
    responses = [[*ids_of(STUDENT, "the"), *ids_of(STUDENT, "🙂")[:n]] for n in (1, 2, 3, 4)]
    assert token_bytes(STUDENT)[responses[0][-1]] == b"\xf0"
    group = group_of(responses)
    there = ALIGNERS[name].to_teacher(group)
    valid_N = there.to_student(ramp(there), group=group).valid_N
    assert valid_N.tolist() == [True, False, True, False, False, True, False, False, False, *[True] * 5]
    assert there.alignment.student_spans_N[:9].tolist() == [0, 1, 2, 3, 3, 4, 5, 5, 5]


def test_an_id_of_a_padded_row_has_no_bytes_and_shares_the_span_that_follows() -> None:
    nameless = len(STUDENT) + 1
    end = ids_of(STUDENT, "<|im_end|>")
    group = group_of([[*end, nameless, *end], [nameless]])
    there = ALIGNERS["byte level"].to_teacher(group)
    assert there.alignment.student_spans_N.tolist() == [0, 1, 1, 2]
    assert there.to_student(ramp(there), group=group).valid_N.tolist() == [True, True, True, False]


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="prompt 5 has no token to the teacher"):
        ALIGNERS["byte level"].to_teacher(group_of([[1]], prompt=[]))


@pytest.mark.parametrize(
    ("names", "named"),
    [
        ({"<|im_end|>": "<eos>", "<tool>": "[TOOL]"}, "'<tool>', which is no token of the student's vocabulary"),
        ({"<|im_end|>": "<end>"}, "'<end>', which is no token of the teacher's vocabulary"),
        ({}, r"end token '<\|im_end\|>' is unknown to the teacher.*teacher.token_map.*own is '<eos>'"),
    ],
)
def test_a_table_that_cannot_be_is_refused_by_name(names: dict[str, str], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        ByteAligner(STUDENT, TEACHER, token_map=names)


def test_lengths_that_do_not_fit_are_refused() -> None:
    there = ALIGNERS["byte level"].to_teacher(group_of([[1, 2]]))
    with pytest.raises(ValueError, match="expected equal counts"):
        TeacherGroup(
            prompt_ids=there.prompt_ids,
            response_ids=there.response_ids[:1],
            offsets=there.offsets,
            alignment=there.alignment,
        )
    with pytest.raises(ValueError, match="3 teacher log-probs"):
        there.to_student(np.zeros(3, dtype=np.float32), group=group_of([[1, 2]]))
