"""The words at the start and at the end of a run: what will be done, and what came of it."""

import os
from collections.abc import Mapping, Sequence

from opd_ray.config.objective import ObjectiveConfig, ObjectiveKind
from opd_ray.config.schema import BatchMode, Config, TeacherConfig
from opd_ray.config.teacher import SelfUpdate, TeacherKind
from opd_ray.console import step_breakdown
from opd_ray.data.batches import mixed_counts
from opd_ray.data.lora import describe_adapters
from opd_ray.data.models import Models
from opd_ray.data.prompts import PromptSets
from opd_ray.protocol import Metrics, Payload
from opd_ray.requests import score_request, training_samples
from opd_ray.routing import recorded_scores, task_config, teachers_of
from opd_ray.state import RunDir
from opd_ray.weight_sync import chosen_sync

_BYTES_PER_ID = 6  # of a support, with its log-prob


def describe_run(config: Config, *, models: Models, prompts: PromptSets, run_dir: RunDir, step: int) -> list[str]:
    """Return the lines that say what the run is made of."""
    rollout, learner, teachers = config.rollout, config.learner, teachers_of(config)
    tasks = sorted({prompt.task for prompt in prompts.train})
    num_teacher_workers = sum(teacher.num_workers for teacher in teachers.by_name.values())
    dropped = f", {prompts.num_dropped} dropped" if prompts.num_dropped else ""
    dropped += f", {prompts.num_held_back} left out as equal to held-out ones" if prompts.num_held_back else ""
    return [
        f"student    {config.student.path}",
        *([f"adapters   {describe_adapters(config.student.lora, models.adapters)}"] if models.adapters else []),
        *(f"teacher    {_described(t)}{_taught(teachers.tasks_of(name))}" for name, t in teachers.by_name.items()),
        *_recorded(config, prompts),
        f"objective  {describe_objective(config.objective)}; {teacher_bytes_per_token(config, models):,} bytes a token"
        " from the teacher",
        f"prompts    {len(prompts.train):,} to train on, {len(prompts.held_out):,} held out{dropped}",
        f"batch      {describe_batch(config, tasks=tasks)}, max_staleness {config.max_staleness}",
        f"           {describe_updates(config, tasks=tasks)}",
        f"workers    {rollout.num_workers} rollout, {num_teacher_workers} teacher, {learner.num_ranks} learner"
        f" (ZeRO-{learner.zero_stage}, {learner.dtype.value})",
        f"placement  {describe_placement(config)}",
        f"steps      {step} to {config.num_steps}" + (" (resumed)" if step else ""),
        f"run dir    {run_dir.path}",
    ]


def describe_batch(config: Config, *, tasks: Sequence[str]) -> str:
    """Return how many trajectories an update has; tasks with samples of their own are counted one by one."""
    num_prompts = config.batch.num_prompts
    samples = {task: training_samples(config, task).num_samples for task in tasks}
    if len(set(samples.values())) == 1:
        (num_samples,) = set(samples.values())
        return f"{num_prompts} prompts x {num_samples} samples = {num_prompts * num_samples} trajectories an update"
    if config.batch.mode is BatchMode.sequential:
        each = ", ".join(f"{num_prompts * n} of {task} ({num_prompts} prompts x {n})" for task, n in samples.items())
        return f"one task an update, trajectories: {each}"
    counts = mixed_counts(num_prompts, {task: task_config(config, task).share for task in tasks})
    each = ", ".join(f"{task} {counts[task]} prompts x {n}" for task, n in samples.items())
    return f"{each} samples = {sum(counts[task] * n for task, n in samples.items())} trajectories an update"


def describe_placement(config: Config) -> str:
    """Return what each worker takes of the cluster, which cluster, and how weights travel."""
    rollout, learner, teachers = config.rollout, config.learner, teachers_of(config).by_name
    shares = [
        ("rollout", rollout.num_workers, rollout.cpus_per_worker, rollout.gpus_per_worker),
        *((name, t.num_workers, t.cpus_per_worker, t.gpus_per_worker) for name, t in teachers.items()),
        ("learner", learner.num_ranks, learner.cpus_per_rank, learner.gpus_per_rank),
    ]
    each = ", ".join(
        f"{name} {number} x ({cpus:g} CPU{f', {gpus:g} GPU' if gpus else ''})" for name, number, cpus, gpus in shares
    )
    address = config.cluster.address or os.environ.get("RAY_ADDRESS")
    where = f"the cluster at {address}" if address else "a cluster of this process"
    return f"{each}; {where}; weights by {chosen_sync(config).value}"


def describe_updates(config: Config, *, tasks: Sequence[str]) -> str:
    """Return into how many optimizer steps a batch goes, and how many response tokens it has at the most."""
    num_steps, num_prompts = config.learner.updates_per_batch, config.batch.num_prompts
    steps = (
        "1 optimizer step" if num_steps == 1 else f"{num_steps} optimizer steps of {num_prompts // num_steps} prompts"
    )
    sampling = {task: training_samples(config, task) for task in tasks}
    tokens = {task: options.num_samples * options.max_response_tokens for task, options in sampling.items()}
    if config.batch.mode is BatchMode.sequential:
        most = num_prompts * max(tokens.values())
    else:
        counts = mixed_counts(num_prompts, {task: task_config(config, task).share for task in tasks})
        most = sum(counts[task] * tokens[task] for task in tasks)
    return f"{steps}, at most {most:,} response tokens"


def teacher_bytes_per_token(config: Config, models: Models) -> int:
    """Return the size of the objective's teacher signal; of several teachers at most so much."""
    request = score_request(config.objective)
    sampled = 4 if request.sampled_logprobs or request.payload is Payload.sampled else 0
    match request.payload:
        case Payload.support:
            num_ids = request.top_k * (2 if request.support == "union" else 1) + request.include_sampled
            return _BYTES_PER_ID * num_ids + _page_bytes(models.vocab_size) + sampled
        case Payload.hidden:
            widths = [2 if t.dtype.value == "bfloat16" else 4 for t in teachers_of(config).by_name.values()]
            return models.teacher_hidden_size * max(widths) + sampled
        case Payload.sampled:
            return sampled


def _page_bytes(vocab_size: int) -> int:
    """Return what ids of more than 16 bits add to a token's support: 2 bytes for each further 65,536 of them."""
    return 2 * ((vocab_size - 1) // 2**16)


def describe_objective(config: ObjectiveConfig) -> str:
    """Return the objective in a few words."""
    match config.kind:
        case ObjectiveKind.sampled:
            return f"sampled, discount {config.discount:g}, baseline {config.baseline.value}"
        case ObjectiveKind.support:
            words = f"{config.support.value} top-{config.top_k}, tail {config.tail.value}"
            return f"support, {config.divergence.value}, {words}"
        case ObjectiveKind.full:
            return f"full, {config.divergence.value}"


def result_rows(
    summary: Metrics, *, history: Sequence[Mapping[str, float]], phases: Mapping[str, float]
) -> list[tuple[str, str]]:
    """Return the rows of the final table; with several tasks each has its own below that of all."""
    rows = [
        *_rows("teacher accuracy", summary, "teacher_accuracy", "{:.1%}"),
        *_rows("student accuracy before", summary, "student_accuracy_before", "{:.1%}"),
        *_rows("student accuracy after", summary, "student_accuracy_after", "{:.1%}"),
        *_rows("held-out reverse KL before", summary, "reverse_kl_before", "{:.4f} nats/token"),
        *_rows("held-out reverse KL after", summary, "reverse_kl_after", "{:.4f} nats/token"),
        *([_row("groups without a score", summary, "bad_groups", "{:.0f}")] if summary.get("bad_groups") else []),
        _row("response tokens/s (median step)", summary, "tokens_per_s", "{:,.0f}"),
        *step_breakdown(history),
    ]
    rows += [(f"seconds: {name}", f"{seconds:.1f}") for name, seconds in phases.items()]
    rows.append(_row("seconds: whole run", summary, "wall_s", "{:.1f}"))
    return rows


def _described(teacher: TeacherConfig) -> str:
    words = teacher.path
    if teacher.kind is TeacherKind.self:
        decay = f", decay {teacher.self.ema_decay:g}" if teacher.self.update is SelfUpdate.ema else ""
        words += f", the student itself ({teacher.self.update.value}{decay})"
    return words if teacher.context is None else f"{words}, with privileged context"


def _recorded(config: Config, prompts: PromptSets) -> list[str]:
    """Return the line of a run that samples nothing to train on."""
    folder = recorded_scores(config)
    if folder is None:
        return []
    return [f"scores     recorded in {folder}: {len(prompts.train):,} groups, which replace the training prompts"]


def _taught(tasks: Sequence[str]) -> str:
    return f" ({', '.join(tasks)})" if tasks else ""


def _rows(name: str, summary: Metrics, key: str, form: str) -> list[tuple[str, str]]:
    of_tasks = sorted(k for k in summary if k.startswith(f"{key}_"))
    return [_row(name, summary, key, form)] + [
        _row(f"  of task {k.removeprefix(f'{key}_')}", summary, k, form) for k in of_tasks
    ]


def _row(name: str, summary: Metrics, key: str, form: str) -> tuple[str, str]:
    return name, form.format(summary[key]) if key in summary else "not measured"


def closing_words(run_dir: RunDir) -> list[str]:
    """Return where everything is."""
    return [
        f"run dir {run_dir.path}",
        "  metrics.jsonl  one line a step       samples.jsonl  sampled texts",
        "  summary.json   the table's figures   config.yaml    the resolved configuration",
        "  export/        the student, for transformers and vLLM",
        "  logs/          the workers' own output",
    ]
