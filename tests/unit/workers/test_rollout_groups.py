from types import SimpleNamespace

import numpy as np
import pytest
from fakes import make_prompt

from opd_ray.config.schema import RolloutConfig
from opd_ray.protocol import Finish, GenerateRequest, SamplingOptions
from workers.rollout.worker import build_group, logprobs_mode

REQUEST = GenerateRequest(
    prompt=make_prompt(7, task="sort"),
    sampling=SamplingOptions(num_samples=2, max_response_tokens=3, temperature=1.0, top_p=1.0),
    version=4,
    seed=11,
)


def completion(token_ids: list[int], logprobs: list[float], spans: list[tuple[int, int, str]], reason: str):
    """Return what vLLM gives: the sampled token's log-prob stands first at every position, here before a second."""
    return SimpleNamespace(
        token_ids=token_ids,
        logprobs=SimpleNamespace(
            logprobs=[value for pair in logprobs for value in (pair, -99.0)],
            start_indices=[2 * position for position in range(len(token_ids))],
        ),
        weight_versions=[SimpleNamespace(start=a, end=b, version=version) for a, b, version in spans],
        finish_reason=reason,
    )


GROUP = build_group(
    REQUEST,
    [
        completion([5, 6, 7], [-0.1, -0.2, -0.3], [(0, 2, "4"), (2, 3, "5")], "length"),
        completion([8], [-0.4], [(0, 1, "5")], "stop"),
    ],
)


def test_completions_are_laid_end_to_end():
    assert GROUP.response_ids.tolist() == [5, 6, 7, 8]
    assert GROUP.offsets.tolist() == [0, 3, 4]
    assert GROUP.finish.tolist() == [Finish.length, Finish.stop]
    assert GROUP.loss_mask.all()
    assert GROUP.support_ids.shape == (4, 0)


def test_the_logprobs_are_those_of_the_sampled_tokens():
    np.testing.assert_allclose(GROUP.sampled_logprobs, [-0.1, -0.2, -0.3, -0.4], rtol=1e-6)


def test_each_token_keeps_the_version_that_sampled_it():
    assert GROUP.token_versions.tolist() == [4, 4, 5, 5]


def test_the_group_knows_its_prompt():
    assert GROUP.prompt_ids is REQUEST.prompt.ids_P
    assert (GROUP.prompt_index, GROUP.task, GROUP.seed) == (7, "sort", 11)


def test_the_arrays_have_the_types_that_the_protocol_says():
    for name in ("prompt_ids", "response_ids", "offsets", "token_versions", "support_ids"):
        assert getattr(GROUP, name).dtype == np.int32
    assert GROUP.sampled_logprobs.dtype == np.float32
    assert GROUP.finish.dtype == np.int8


@pytest.mark.parametrize(
    ("temperature", "top_p", "mode"),
    [(1.0, 1.0, "raw_logprobs"), (1.0, 0.9, "raw_logprobs"), (0.7, 1.0, "processed_logprobs")],
)
def test_the_logprobs_are_over_the_whole_vocabulary_at_the_temperature(temperature: float, top_p: float, mode: str):
    assert logprobs_mode(RolloutConfig(temperature=temperature, top_p=top_p)) == mode
