"""Which of the engine's rows are the states before a group's response tokens.

Suffixes: T tokens of a sequence, N flat response tokens of a group, D hidden size.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from opd_ray.protocol import Int32, TrajectoryGroup
from workers.teacher.errors import BadScore


def response_states(states: Sequence[Tensor], group: TrajectoryGroup) -> Tensor:
    """Return [N,D]: row n is the state that predicts response token n.

    states: one [T,D] a sequence, row t predicts token t + 1. The engine leaves out the leading rows of a sequence whose
    keys it had already; they were computed for another sample of the group that starts with the same tokens, provided
    that the group's requests share cached prefixes with no others. Raises BadScore for more rows than tokens, and for
    rows left out that no sample has.
    """
    responses = [group.response_ids[a:b] for a, b in zip(group.offsets[:-1], group.offsets[1:], strict=True)]
    missing = [1 + len(response) - len(rows_TD) for response, rows_TD in zip(responses, states, strict=True)]
    if min(missing) <= -len(group.prompt_ids):
        raise BadScore(
            f"prompt {group.prompt_index}: the engine gave more states than tokens, as after a preemption; give it more"
            " memory for keys and values (teacher.engine_args.kv_cache_memory_bytes)"
        )
    known: dict[int, Tensor] = {}  # sample -> its row after the prompt, then those after each response token
    for sample in np.argsort(missing, kind="stable").tolist():
        rows_TD, num_missing = states[sample], missing[sample]
        if num_missing > 0:
            sibling_TD = known[_sibling(sample, known, responses, num_rows=num_missing, group=group)]
            rows_TD = torch.cat([sibling_TD[:num_missing], rows_TD])
        known[sample] = rows_TD[max(0, -num_missing) :]
    return torch.cat([known[sample][: len(response)] for sample, response in enumerate(responses)])


def _sibling(
    sample: int, known: Mapping[int, Tensor], responses: Sequence[Int32], *, num_rows: int, group: TrajectoryGroup
) -> int:
    """Return a sample whose first rows are this one's too."""
    shared = responses[sample][: num_rows - 1]  # all that these rows have read of the response
    for sibling in known:
        if np.array_equal(responses[sibling][: num_rows - 1], shared):
            return sibling
    raise BadScore(f"prompt {group.prompt_index}: the engine left out {num_rows} states that no sample of it has")
