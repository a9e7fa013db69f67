"""Training prompts of a run whose responses and scores were recorded: the recorded groups, by their place."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from opd_ray.config.schema import Config
from opd_ray.data.prompts import PromptSets
from opd_ray.protocol import Prompt
from opd_ray.routing import check_tasks, verifier_name
from opd_ray.schedule import derive_seed
from opd_ray.scores.files import Recording
from opd_ray.scores.messages import prompt_key

_REPLACEMENT_STREAM = 1


class RecordedPrompts:
    """Endless batches of recorded groups: the first epoch in the order of the recording, each later one shuffled."""

    def __init__(self, prompts: Sequence[Prompt], *, num_prompts: int, seed: int) -> None:
        self._prompts = prompts
        self._num_prompts = num_prompts
        self._seed = seed

    def batch(self, step: int) -> list[Prompt]:
        """Return the groups of update `step`: positions step*n to (step+1)*n of the endless stream."""
        size = len(self._prompts)
        positions = range(step * self._num_prompts, (step + 1) * self._num_prompts)
        orders = {epoch: self._order(epoch) for epoch in {p // size for p in positions}}
        return [self._prompts[orders[p // size][p % size]] for p in positions]

    def replacement(self, step: int, *, position: int, attempt: int) -> Prompt:
        """Return another group for a position of update `step`: of its task, and not of that update if there is one.

        A function of (seed, step, position, attempt); the attempts at a position are different groups.
        """
        batch = self.batch(step)
        of_task = [prompt for prompt in self._prompts if prompt.task == batch[position].task]
        taken = {prompt.index for prompt in batch}
        others = [prompt for prompt in of_task if prompt.index not in taken] or of_task
        first = derive_seed(self._seed, _REPLACEMENT_STREAM, step, position)
        return others[(first + attempt) % len(others)]

    def _order(self, epoch: int) -> list[int]:
        size = len(self._prompts)
        if epoch == 0:
            return list(range(size))
        order: list[int] = np.random.default_rng(derive_seed(self._seed, epoch)).permutation(size).tolist()
        return order


def recorded_prompts(config: Config, recording: Recording, *, prompts: PromptSets) -> PromptSets:
    """Return the run's prompts with the recorded groups to train on, but for those whose prompt is held out.

    `Prompt.index` is the group's position in the index; its tokens stay in the shard. Raises ValueError when a task
    has no teacher, or nothing is left.
    """
    held_out = {prompt_key(prompt.ids_P) for prompt in prompts.held_out}
    train = [
        Prompt(
            ids_P=np.empty(0, dtype=np.int32),
            index=position,
            task=group.task,
            verifier=verifier_name(config, group.task),
            answer=None,
        )
        for position, group in enumerate(recording.groups)
        if group.prompt_key not in held_out
    ]
    if not train:
        raise ValueError(
            f"teacher.cache.path={recording.folder}: every recorded prompt is held out by this run; expected other"
            " held-out prompts (data.*, eval.num_prompts, seed)"
        )
    sets = replace(prompts, train=train, num_dropped=0, num_held_back=len(recording.groups) - len(train))
    check_tasks(config, sets.tasks)
    return sets
