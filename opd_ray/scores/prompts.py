"""Training prompts of a run whose responses and scores were recorded: the recorded groups, by their place."""

from dataclasses import replace

import numpy as np

from opd_ray.config.schema import Config
from opd_ray.data.prompts import PromptSets
from opd_ray.protocol import Prompt
from opd_ray.routing import check_tasks, verifier_name
from opd_ray.scores.files import Recording
from opd_ray.scores.messages import prompt_key


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
