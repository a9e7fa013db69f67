"""What a group must be for a teacher to score it."""

import numpy as np

from opd_ray.protocol import Int32, TrajectoryGroup
from workers.teacher.errors import BadScore


def check_ids(group: TrajectoryGroup, *, vocab_size: int) -> None:
    """Raise BadScore, naming the first, when a token's id is not below `vocab_size`, the common vocabulary.

    The student may sample such an id where its head has more rows than the teacher's. Both distributions are cut to
    the common range, so neither gives it a probability, and no made-up log-prob is right: a very low one would be the
    batch's largest reward and its whole gradient. It must not reach the engine either, whose embedding may lack it.
    """
    for name, ids in (("prompt", group.prompt_ids), ("response", group.response_ids)):
        place = _first_outside(ids, vocab_size=vocab_size)
        if place is not None:
            raise BadScore(
                f"prompt {group.prompt_index}: {name} token {place} has id {ids[place]}, expected 0 to"
                f" {vocab_size - 1}, the ids that student and teacher share"
            )


def _first_outside(ids: Int32, *, vocab_size: int) -> int | None:
    places = np.flatnonzero((ids < 0) | (ids >= vocab_size))
    return int(places[0]) if len(places) else None
