"""Measures before the first step: the teachers' own accuracy, and their engines against their checkpoints."""

import workers
from opd_ray.config.schema import Config
from opd_ray.console import RunConsole
from opd_ray.data.teacher_context import with_room
from opd_ray.engine_checks import EngineTest, teacher_gaps
from opd_ray.evaluation import HeldOut, greedy_summaries
from opd_ray.metrics import mean_reward
from opd_ray.protocol import GroupSummary, Metrics
from opd_ray.routing import teacher_key, teachers_of
from opd_ray.state import RunDir


def measure_teacher(config: Config, *, held_out: HeldOut, console: RunConsole) -> Metrics:
    """Return the greedy accuracy of the teachers that are to be evaluated, on held-out prompts of their tasks."""
    teachers, summaries = teachers_of(config), list[GroupSummary]()
    for name, teacher in teachers.by_name.items():
        mine = held_out.of_task({p.task for p in held_out.prompts if teachers.name_of(p.task) == name})
        if teacher.evaluate and mine.prompts:
            with (
                console.phase(f"evaluate {teacher_key(name).removesuffix('.path')}"),
                workers.teacher_sampler(
                    with_room(config, [p.teacher_ids_P for p in mine.prompts]), teacher, log_dir=RunDir.of(config).logs
                ) as sampler,
            ):
                summaries += greedy_summaries(mine.as_teacher_reads(), sampler)
    return mean_reward("teacher_accuracy", summaries)


def measure_engines(config: Config, *, held_out: HeldOut, vocab_size: int, console: RunConsole) -> Metrics:
    """Compare teachers with their checkpoints where reference_tokens asks for it."""
    if not any(teacher.reference_tokens for teacher in teachers_of(config).by_name.values()):
        return {}
    test = EngineTest(
        config=config,
        vocab_size=vocab_size,
        temperature=config.rollout.temperature,
        log_dir=RunDir.of(config).logs,
    )
    with console.phase("compare teachers with their checkpoints"):
        return teacher_gaps(test, prompts=held_out.prompts)
