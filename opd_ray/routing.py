"""Who teaches which task, and how its responses are drawn: the part of a configuration that depends on the task."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from opd_ray.config.data import DataKind
from opd_ray.config.schema import Config, TaskConfig, TeacherConfig

DEFAULT_TEACHER = "teacher"


@dataclass(frozen=True, slots=True, kw_only=True)
class Teachers:
    """The distinct teachers of a run: tasks that name the same one share its workers."""

    by_name: dict[str, TeacherConfig]
    of_task: dict[str, str]  # task -> name; empty: the default teaches all

    def name_of(self, task: str) -> str:
        """Return the name of the task's teacher."""
        return self.of_task[task] if self.of_task else DEFAULT_TEACHER

    def tasks_of(self, name: str) -> list[str]:
        """Return the tasks that are given to a teacher by name; none: all, as they come."""
        return [task for task, teacher in self.of_task.items() if teacher == name]


def teachers_of(config: Config) -> Teachers:
    """Return the run's teachers; each is named by the first task it teaches."""
    if not config.teachers:
        return Teachers(by_name={DEFAULT_TEACHER: config.teacher}, of_task={})
    by_name: dict[str, TeacherConfig] = {}
    of_task = {}
    for task, teacher in config.teachers.items():
        # What a teacher reads for a prompt is made before it comes to the workers: one pool serves several contexts.
        same = [name for name, other in by_name.items() if replace(other, context=teacher.context) == teacher]
        of_task[task] = same[0] if same else task
        by_name.setdefault(of_task[task], teacher)
    return Teachers(by_name=by_name, of_task=of_task)


def context_of(config: Config, task: str) -> str | None:
    """Return the template of what the task's teacher reads for a prompt; None: the prompt itself."""
    if not config.teachers:
        return config.teacher.context
    return config.teachers[task].context if task in config.teachers else None


def teacher_key(name: str) -> str:
    """Return the configuration key of a teacher's path."""
    return "teacher.path" if name == DEFAULT_TEACHER else f"teachers.{name}.path"


def recorded_scores(config: Config) -> str | None:
    """Return the folder of recorded scores that teaches; None: the teachers are alive."""
    caches = [teacher.cache for teacher in teachers_of(config).by_name.values()]
    return caches[0].path if caches[0] is not None else None


def task_config(config: Config, task: str) -> TaskConfig:
    """Return what is particular to a task."""
    return config.tasks[task] if task in config.tasks else TaskConfig()


def verifier_name(config: Config, task: str) -> str:
    """Return the name of the verifier of a task's responses."""
    made = "reasoning_gym" if config.data.kind is DataKind.reasoning_gym else task
    return task_config(config, task).verifier or made


def max_response_tokens(config: Config) -> int:
    """Return the longest response of any task."""
    return max([config.rollout.max_response_tokens, *(t.max_response_tokens or 0 for t in config.tasks.values())])


def check_tasks(config: Config, tasks: Iterable[str]) -> None:
    """Raise ValueError when a task of the prompts has no teacher, or the configuration speaks of a task without any."""
    present = sorted(set(tasks))
    for task in present:
        if config.teachers and task not in config.teachers:
            raise ValueError(
                f"task {task!r} has no teacher: teachers has entries for {', '.join(sorted(config.teachers))}; add"
                f" teachers.{task}, or leave teachers out so that `teacher` teaches all"
            )
    for key, given in (("teachers", config.teachers), ("tasks", config.tasks)):
        unknown = sorted(set(given) - set(present))
        if unknown:
            raise ValueError(f"{key}.{unknown[0]}: no prompt has this task; the prompts have {', '.join(present)}")
