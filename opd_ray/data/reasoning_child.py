"""The process that marks responses by the rules of reasoning-gym's datasets, some of which evaluate them as Python."""

from functools import cache
from typing import Any

import reasoning_gym

from opd_ray.data.marking_child import serve
from opd_ray.data.reasoning_entries import from_text, stated_answer


def is_right(response: str, reference: str) -> bool:
    """Whether the dataset's own rule gives the answer that the response states full marks."""
    given = from_text(reference)
    answer = given["entry"]["answer"]  # None: many are right, of any form
    num_lines = None if answer is None else len(str(answer).strip().splitlines())
    score = _dataset(given["dataset"]).score_answer(stated_answer(response, num_lines=num_lines), given["entry"])
    return bool(score >= 1.0)


@cache
def _dataset(name: str) -> Any:
    return reasoning_gym.create_dataset(name, size=1, seed=0)


if __name__ == "__main__":
    serve(is_right)
