"""What a run is made of besides its workers, read and checked before any of them starts."""

from collections.abc import Mapping
from dataclasses import dataclass

from opd_ray.config.schema import Config
from opd_ray.data.models import Models
from opd_ray.data.prompts import PromptSets, load_prompts
from opd_ray.data.teacher_context import check_teacher_room, longest_teacher_prompts
from opd_ray.replay import replayed
from opd_ray.requests import ObjectiveIds, objective_ids


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The models as the run uses them, the objective's ids and the prompts."""

    models: Models
    ids: ObjectiveIds
    prompts: PromptSets
    prompt_tokens: Mapping[str, int]  # of each teacher's longest prompt


def plan_run(config: Config, models: Models) -> Plan:
    """Read the prompts of a run on these models. Raises ValueError for what does not fit together."""
    ids = objective_ids(config.objective, tokenizer=models.tokenizer, vocab_size=models.vocab_size)
    prompts = load_prompts(config, tokenizer=models.tokenizer)
    models, prompts = replayed(config, models=models, prompts=prompts, ids=ids)
    prompt_tokens = longest_teacher_prompts(config, [*prompts.train, *prompts.held_out])
    check_teacher_room(config, prompt_tokens)
    return Plan(models=models, ids=ids, prompts=prompts, prompt_tokens=prompt_tokens)
