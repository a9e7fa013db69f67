from collections.abc import Sequence

import pytest
import torch
from groups import make_group

from opd_ray.protocol import TrajectoryGroup
from workers.teacher.errors import BadScore
from workers.teacher.rows import response_states

GROUP = make_group([1, 2, 3], [4, 5, 6], [], [4, 5, 7, 8], [9])


def states_of(group: TrajectoryGroup, *, left_out: Sequence[int] = (0, 0, 0, 0)) -> list[torch.Tensor]:
    """Return states that name what they have read: row t of a sequence is its first t + 1 tokens as one number."""
    states = []
    for sample, num_rows in enumerate(left_out):
        ids = [*group.prompt_ids, *group.response_ids[group.offsets[sample] : group.offsets[sample + 1]]]
        prefixes = [float("".join(map(str, ids[: t + 1]))) for t in range(len(ids))]
        states.append(torch.tensor(prefixes, dtype=torch.float64)[num_rows:, None])
    return states


EXPECTED = [123, 1234, 12345, 123, 1234, 12345, 123457, 123]


def test_a_token_is_predicted_by_the_state_that_has_read_everything_before_it():
    assert response_states(states_of(GROUP), GROUP).squeeze(1).tolist() == EXPECTED


@pytest.mark.parametrize(
    "left_out",
    [
        (0, 2, 2, 2),  # less than the prompt
        (0, 0, 3, 3),  # all of the prompt
        (3, 0, 3, 3),
        (3, 3, 3, 0),
        (0, 0, 5, 3),  # and the start of a response
        (5, 0, 0, 3),
        (0, 0, 4, 0),
        (2, 1, 3, 0),
    ],
)
def test_rows_that_the_engine_took_from_its_cache_are_those_of_another_sample(left_out: Sequence[int]):
    states = states_of(GROUP, left_out=left_out)
    assert response_states(states, GROUP).squeeze(1).tolist() == EXPECTED


def test_a_prompt_of_one_token_may_be_left_out_as_well():
    group = make_group([1], [4, 5], [4, 6])
    assert response_states(states_of(group, left_out=(0, 2)), group).squeeze(1).tolist() == [1, 14, 1, 14]


@pytest.mark.parametrize("left_out", [(3, 3, 3, 3), (0, 0, 0, 4)])
def test_rows_that_no_sample_has_are_missed(left_out: Sequence[int]):
    with pytest.raises(BadScore, match=r"prompt 0: the engine left out [12] states that no sample of it has"):
        response_states(states_of(GROUP, left_out=left_out), GROUP)


def test_more_rows_than_tokens_are_refused():
    states = states_of(GROUP)
    states[2] = torch.cat([states[2][:1], states[2]])
    with pytest.raises(BadScore, match="the engine gave more states than tokens"):
        response_states(states, GROUP)
