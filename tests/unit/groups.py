"""Groups and scores by hand, for the tests of the workers."""

from collections.abc import Sequence

import numpy as np

from opd_ray.protocol import Finish, TrajectoryGroup


def make_group(
    prompt: list[int],
    *responses: list[int],
    masked: tuple[int, ...] = (),
    truncated: tuple[int, ...] = (),
    rewards: Sequence[float] = (),
    task: str = "exact",
) -> TrajectoryGroup:
    """Return a group whose token n has the log-prob -n/10 and the version n.

    The tokens at `masked` were not chosen by the policy; the responses at `truncated` hit the limit.
    """
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
        rewards=np.array(rewards, dtype=np.float32),
        finish=np.array([Finish.length if i in truncated else Finish.stop for i in range(len(responses))], np.int8),
        prompt_index=0,
        task=task,
        seed=0,
    )
