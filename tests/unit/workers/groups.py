"""Groups and scores by hand, for the tests of the workers."""

import numpy as np

from opd_ray.protocol import TrajectoryGroup


def make_group(prompt: list[int], *responses: list[int], masked: tuple[int, ...] = ()) -> TrajectoryGroup:
    """Return a group whose token n has the log-prob -n/10 and the version n; the tokens at `masked` have no loss."""
    num_tokens = sum(map(len, responses))
    loss_mask = np.ones(num_tokens, dtype=np.bool_)
    loss_mask[list(masked)] = False
    return TrajectoryGroup(
        prompt_ids=np.array(prompt, dtype=np.int32),
        response_ids=np.array([token for response in responses for token in response], dtype=np.int32),
        offsets=np.cumsum([0, *map(len, responses)]).astype(np.int32),
        sampled_logprobs=(-np.arange(num_tokens) / 10).astype(np.float32),
        token_versions=np.arange(num_tokens, dtype=np.int32),
        loss_mask=loss_mask,
        support_ids=np.empty((num_tokens, 0), dtype=np.int32),
        finish=np.zeros(len(responses), dtype=np.int8),
        prompt_index=0,
        task="exact",
        seed=0,
    )
