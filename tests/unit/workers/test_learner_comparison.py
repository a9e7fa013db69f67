"""A rank's part of the comparison: which tokens become points, which responses are traced, what their texts are."""

import numpy as np
import pytest
import torch
from groups import make_group
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from opd_ray.objectives import Losses
from opd_ray.protocol import SampledScore
from workers.learner.comparison import Comparer, stride_of, texts_of_tokens
from workers.learner.inputs import ScoredSequence, split_groups
from workers.learner.objective import sampled_tokens

Rows = list[float]


def sequences(prompt: int, *responses: list[int], masked: tuple[int, ...] = ()) -> list[ScoredSequence]:
    group = make_group([prompt], *responses, masked=masked)
    score = SampledScore(logprobs_N=np.zeros(sum(map(len, responses)), dtype=np.float32))
    return split_groups([group], [score], sampled_tokens([group], [score]), teachers=["teacher"])


def losses(student: Rows, *, kl: Rows, teacher: Rows | None = None, top: bool = False) -> Losses:
    stats = {"signal": torch.zeros(len(kl))}
    if teacher is not None:
        stats |= {"teacher_logprob": torch.tensor(teacher), "student_entropy": torch.full((len(kl),), 0.5)}
    if top:
        ids_NA = torch.arange(2).repeat(len(kl), 1)
        for whose in ("student", "teacher"):
            stats |= {f"{whose}_top_ids": ids_NA, f"{whose}_top_logprobs": -ids_NA.float()}
    return Losses(
        loss=torch.zeros(()),
        loss_N=torch.zeros(len(kl)),
        divergence_N=torch.tensor(kl),
        sampled_logprobs_N=torch.tensor(student),
        stats=stats,
        diagnostics={},
    )


def comparer(*, stride: int = 1) -> Comparer:
    return Comparer(stride=stride, text_of=lambda ids: f"prompt {ids[0]}", text_of_token="<{}>".format)


def test_sums_are_over_kept_tokens_and_points_are_where_they_are_in_the_response():
    collected = comparer()
    collected.add(
        losses([-1.0, 0.0, -3.0], kl=[0.25, 0.0, 0.5], teacher=[-2.0, 0.0, -1.0]), sequences(7, [4, 5, 6], masked=(1,))
    )
    result = collected.result()
    assert (result.kl_sum, result.num_tokens) == (0.75, 2)
    assert result.sums["negative_reward_fraction"] == 1
    assert result.points.ids_M.tolist() == [4, 6]
    assert result.points.positions_M.tolist() == [0, 2]
    assert result.points.rewards_M.tolist() == [-1.0, 2.0]
    assert result.token_texts == {4: "<4>", 6: "<6>"}
    assert result.traces == ()  # a response with masked tokens is none to show


def test_a_teacher_without_hidden_states_gives_its_logprob_of_the_sampled_token_alone():
    collected = comparer()
    collected.add(losses([-1.0, -2.0], kl=[1.5, -0.5]), sequences(7, [4, 5]))
    result = collected.result()
    assert result.points.teacher_logprobs_M.tolist() == [-2.5, -1.5]
    assert set(result.sums) == {"negative_reward_fraction"}
    assert result.traces[0].teacher_top == ()


def test_the_points_are_evenly_spread_over_micro_batches_and_stand_for_all_tokens():
    collected = comparer(stride=3)
    for first, num_tokens in ((0, 4), (4, 1), (5, 4)):
        ids = list(range(first, first + num_tokens))
        collected.add(losses([-1.0] * num_tokens, kl=[0.0] * num_tokens), sequences(7, ids))
    points = collected.result().points
    assert points.ids_M.tolist() == [0, 3, 6]
    assert points.weights_M.tolist() == [3, 3, 3]


def test_the_first_responses_to_different_prompts_are_traced_with_their_alternatives():
    collected = comparer()
    for prompt in (7, 8, 9):
        rows = [-1.0, -2.0, -3.0]
        collected.add(losses(rows, kl=[0.0] * 3, teacher=rows, top=True), sequences(prompt, [4, 5], [6]))
    traces = collected.result().traces
    assert [trace.prompt for trace in traces] == ["prompt 7", "prompt 8"]
    assert (traces[0].tokens, traces[0].student_logprobs) == (("<4>", "<5>"), (-1.0, -2.0))
    assert traces[0].teacher_top == ((("<0>", 0.0), ("<1>", -1.0)),) * 2


@pytest.mark.parametrize(("num_tokens", "stride"), [(0, 1), (4, 1), (5, 2), (8, 2), (9, 3)])
def test_no_more_points_than_allowed(num_tokens: int, stride: int):
    assert stride_of(num_tokens, max_points=4) == stride
    assert len(range(0, num_tokens, stride)) <= 4


def tokenizer(decoder: decoders.Decoder) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({"?": 0, "▁the": 1, "s": 2, "<0xE4>": 3, "▁": 4}, unk_token="?"))
    backend.decoder = decoder
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def test_a_token_keeps_its_space_and_a_part_of_a_character_can_be_told():
    llama = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    text_of = texts_of_tokens(tokenizer(llama))
    assert [text_of(id_) for id_ in range(6)] == ["?", " the", "s", "\\xe4", " ", "<5>"]


def test_a_tokenizer_without_bytes_gives_the_text_of_each_token_alone():
    assert texts_of_tokens(tokenizer(decoders.WordPiece("##")))(2) == "s"
