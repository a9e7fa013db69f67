import numpy as np
import pytest
from fakes import make_prompt
from groups import make_group

from opd_ray.engine_checks import handful, leading_tokens


def test_a_handful_has_prompts_of_every_task_and_one_for_each_rank():
    prompts = [make_prompt(index, task=task) for task in ("sort", "copy") for index in range(9)]
    chosen = [(p.task, p.index) for p in handful(prompts, num_ranks=2)]
    assert chosen == [(task, index) for task in ("sort", "copy") for index in range(4)]
    assert len(handful(prompts, num_ranks=7)) == 14


GROUPS = [make_group([1, 2], [10, 11, 12], [13]), make_group([3], [20], [21, 22]), make_group([4], [30, 31, 32])]


@pytest.mark.parametrize(
    ("num_tokens", "ids"),
    [
        (1, [10]),
        (3, [10, 20, 30]),
        (4, [10, 11, 20, 30]),
        (5, [10, 11, 20, 30, 31]),  # the second response has only one: the third makes up for it
        (99, [10, 11, 12, 20, 30, 31, 32]),
    ],
)
def test_the_tokens_for_the_reference_are_the_first_of_each_groups_first_response(num_tokens: int, ids: list[int]):
    rows_N, samples = leading_tokens(GROUPS, num_tokens=num_tokens)
    flat_N = np.concatenate([group.response_ids for group in GROUPS])
    assert flat_N[rows_N].tolist() == ids
    assert np.concatenate([response_ids for _, response_ids in samples]).tolist() == ids
    prompts = {10: [1, 2], 20: [3], 30: [4]}
    assert [prompt_ids.tolist() for prompt_ids, _ in samples] == [prompts[i] for i in ids if i % 10 == 0]
