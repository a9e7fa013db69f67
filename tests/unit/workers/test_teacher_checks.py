import pickle
from dataclasses import replace

import numpy as np
import pytest
from groups import make_group

from workers.teacher.checks import check_ids
from workers.teacher.errors import BadScore

GROUP = make_group([1, 2, 29], [4, 5], [6, 7, 8])


def test_a_group_of_ids_that_both_models_know_passes():
    check_ids(GROUP, vocab_size=30)


@pytest.mark.parametrize("id_", [30, 152_000, -1])
def test_a_sampled_id_outside_the_common_vocabulary_is_refused_by_place_and_name(id_: int):
    response_ids = GROUP.response_ids.copy()
    response_ids[3:] = id_
    group = replace(GROUP, response_ids=response_ids, prompt_index=7)
    with pytest.raises(BadScore, match=rf"prompt 7: response token 3 has id {id_}, expected 0 to 29, the ids that"):
        check_ids(group, vocab_size=30)


def test_a_prompt_is_looked_at_too():
    with pytest.raises(BadScore, match="prompt token 2 has id 29, expected 0 to 28"):
        check_ids(GROUP, vocab_size=29)


def test_a_refusal_travels_between_processes():
    refusal = pickle.loads(pickle.dumps(BadScore("prompt 7: why")))  # noqa: S301 - our own bytes
    assert isinstance(refusal, BadScore)
    assert str(refusal) == "prompt 7: why"
    assert isinstance(refusal, ValueError)


def test_an_empty_response_passes():
    check_ids(replace(make_group([1], []), response_ids=np.empty(0, dtype=np.int32)), vocab_size=30)
