"""Puts a run's loop together from its configuration, its fleets and what it uses besides them."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from ray.exceptions import RayError

from opd_ray.checkpoints import DiskCheckpoints
from opd_ray.config.schema import Config
from opd_ray.controller import Fleets, Loop
from opd_ray.data.batches import ShuffledPrompts, TaskPrompts
from opd_ray.data.prompts import PromptSets
from opd_ray.dispatch import Dispatcher
from opd_ray.evaluation import FleetEvaluator, HeldOut
from opd_ray.protocol import CannotGoOn
from opd_ray.requests import held_out_request, held_out_samples, score_request, training_samples
from opd_ray.routing import recorded_scores, task_config
from opd_ray.schedule import Schedule, derive_seed
from opd_ray.screen import TeacherScreen
from opd_ray.services import PromptSource, Quarantine, Tracker
from opd_ray.window import GroupWindow

_HELD_OUT_SEED_STREAM = 3


def held_out(config: Config, prompts: PromptSets) -> HeldOut:
    """Return the held-out prompts and how they are answered."""
    return HeldOut(
        prompts=prompts.held_out,
        sampling={task: held_out_samples(config, task) for task in prompts.tasks},
        seed=derive_seed(config.seed, _HELD_OUT_SEED_STREAM),
    )


def build_loop(  # noqa: PLR0913 - everything a run is made of
    config: Config,
    *,
    fleets: Fleets,
    training: Fleets,
    prompts: PromptSets,
    checkpoints: DiskCheckpoints,
    tracker: Tracker,
    quarantine: Quarantine,
    stoppable: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> Loop:
    """Return the loop. fleets: those that evaluate; training: the same, recorded, or a recording in their place."""
    schedule = Schedule(
        num_steps=config.num_steps,
        max_staleness=config.max_staleness,
        eval_every=config.eval_every,
        save_every=config.save_every,
    )
    dispatcher = Dispatcher(
        rollout=training.rollout,
        teacher=training.teacher,
        prompts=_prompt_source(config, prompts),
        sampling={task: training_samples(config, task) for task in prompts.tasks},
        asked=score_request(config.objective),
        seed=config.seed,
    )
    return Loop(
        schedule=schedule,
        fleets=training,
        window=GroupWindow(
            dispatcher=dispatcher,
            schedule=schedule,
            num_prompts=config.batch.num_prompts,
            overprovision=config.rollout.overprovision,
        ),
        screen=TeacherScreen(
            dispatcher=dispatcher, max_bad_fraction=config.batch.max_bad_fraction, quarantine=quarantine
        ),
        evaluator=FleetEvaluator(
            held_out=held_out(config, prompts),
            fleets=fleets,
            asked=held_out_request(config),
            quarantine=quarantine,
            keep=tracker.compare,
        ),
        checkpoints=checkpoints,
        tracker=tracker,
        stoppable=stoppable,
    )


def run_saved(loop: Loop, *, step: int, checkpoints: DiskCheckpoints) -> None:
    """Run the loop from an update. When no further one is possible a checkpoint of the last is written; the error,
    CannotGoOn, says so after the cause."""
    try:
        loop.run(step)
        checkpoints.settle()
    except CannotGoOn as cause:
        try:
            words = checkpoints.save_last(loop.fleets.learner, loop.fleets.teacher, loop.window)
        except (RayError, OSError) as fault:
            words = f"no checkpoint could be written: {fault}"
        cause.args = (f"{cause}; {words}",)
        raise


def _prompt_source(config: Config, prompts: PromptSets) -> PromptSource:
    if recorded_scores(config) is not None:
        return ShuffledPrompts(
            prompts.train, num_prompts=config.batch.num_prompts, seed=config.seed, first_in_order=True
        )
    return TaskPrompts(
        prompts.train,
        num_prompts=config.batch.num_prompts,
        shares={task: task_config(config, task).share for task in prompts.tasks},
        mode=config.batch.mode,
        seed=config.seed,
    )
