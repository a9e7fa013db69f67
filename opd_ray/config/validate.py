"""Rules over several configuration fields; each message says what was given, what was expected, which key to change."""

from typing import Any

from opd_ray.config.data import DataKind
from opd_ray.config.devices import check_devices
from opd_ray.config.objective import (
    BaselineKind,
    ObjectiveConfig,
    ObjectiveKind,
    RatioKind,
    SignalUse,
    SupportSource,
    TailKind,
)
from opd_ray.config.offload import check_zero_options
from opd_ray.config.remote_code import check_remote_code
from opd_ray.config.schema import Config, SkippedPolicy
from opd_ray.config.teacher import AlignmentKind, SelfUpdate, TeacherKind
from opd_ray.data.reasoning import check_dataset
from opd_ray.data.tasks import TASKS, verifier
from opd_ray.routing import max_response_tokens, teacher_key, teachers_of, verifier_name
from opd_ray.weight_sync import chosen_sync


def validate(config: Config) -> None:
    """Raise ValueError for the first rule the configuration breaks."""
    for rule in (
        _modes,
        _data,
        _self_teachers,
        _sampling,
        _objective,
        _cache,
        _batch,
        _micro_batch,
        check_zero_options,
        check_devices,
        check_remote_code,
        chosen_sync,
    ):
        rule(config)


def validate_vocabulary(config: Config, *, vocab_size: int) -> None:
    """Raise ValueError when the objective asks for more tokens than the two models share."""
    objective = config.objective
    _require(
        objective.kind is not ObjectiveKind.support or objective.top_k <= vocab_size,
        f"objective.top_k={objective.top_k}: expected at most {vocab_size}, the tokens that student and teacher share",
    )


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)


def _modes(config: Config) -> None:
    over, staleness = config.rollout.overprovision, config.max_staleness
    _require(
        over == 0 or staleness >= 1,
        f"rollout.overprovision={over} with max_staleness={staleness}: expected max_staleness of at least 1, groups"
        " that an update leaves are learned from one update later",
    )
    if not config.deterministic:
        return
    _require(
        over == 0,
        f"rollout.overprovision={over} with deterministic=true: expected 0, which groups finish first is a matter of"
        " timing",
    )
    for name, teacher in teachers_of(config).by_name.items():
        _require(
            teacher.kind is not TeacherKind.http,
            f"{teacher_key(name).removesuffix('path')}kind=http with deterministic=true: a server batches requests as"
            " they come; expected another kind of teacher",
        )


def _data(config: Config) -> None:
    data = config.data
    for task, special in config.tasks.items():
        if special.verifier is not None:
            _check_verifier(f"tasks.{task}.verifier", special.verifier)
    if data.kind in (DataKind.task, DataKind.reasoning_gym):
        known = ", ".join(sorted(TASKS))
        for task in data.tasks or [str(data.task)]:
            key = "data.tasks" if data.tasks else "data.task"
            if data.kind is DataKind.reasoning_gym:
                check_dataset(key, task)
            else:
                _require(task in TASKS, f"{key}={task}: expected a built-in task ({known})")
        return
    _require(data.path is not None, f"data.path is not given: data={data.kind.value} expects the path of a file")
    _require(
        not data.tasks,
        f"data.tasks={data.tasks} with data={data.kind.value}: expected data=task or data=reasoning_gym; the"
        " records of a file name their own tasks",
    )
    if data.task is not None:
        _check_verifier("data.task", verifier_name(config, data.task))


def _self_teachers(config: Config) -> None:
    for name, teacher in teachers_of(config).by_name.items():
        _require(
            teacher.kind is not TeacherKind.self or teacher.path == config.student.path,
            f"{teacher_key(name)}={teacher.path} with kind=self: expected student.path={config.student.path}, or leave"
            " it out",
        )
        key = teacher_key(name).removesuffix(".path")
        _require(
            config.student.lora.wanted is None or teacher.self.update is SelfUpdate.frozen,
            f"{key}.self.update={teacher.self.update.value} with student.lora.rank={config.student.lora.rank}: expected"
            f" {key}.self.update=frozen or student.lora.rank=0; adapters are published without the weights to average",
        )


def _check_verifier(key: str, name: str) -> None:
    try:
        verifier(name)
    except ValueError as error:
        raise ValueError(f"{key}={name}: {error}") from None


def _sampling(config: Config) -> None:
    rollout, correct = config.rollout, config.objective.correct_top_p
    for key, top_p in _with_tasks(config, "top_p"):
        _require(
            rollout.temperature == 1 or top_p == 1 or correct,
            f"rollout.temperature={rollout.temperature} with {key}={top_p}: vLLM gives log-probs either"
            " before both or after both, and the objective needs them after the temperature only; set one of them to"
            " 1, or with objective=sampled objective.correct_top_p=true",
        )
        _require(
            top_p == rollout.top_p or not correct,
            f"objective.correct_top_p=true with {key}={top_p}: expected rollout.top_p={rollout.top_p}, the correction"
            " knows one nucleus for all tasks",
        )


def _with_tasks(config: Config, name: str) -> list[tuple[str, Any]]:
    """Return key and value of an option of the rollout, and of the tasks that have one of their own."""
    of_tasks = [(f"tasks.{task}.{name}", getattr(special, name)) for task, special in config.tasks.items()]
    return [(f"rollout.{name}", getattr(config.rollout, name)), *((k, v) for k, v in of_tasks if v is not None)]


def _objective(config: Config) -> None:
    objective = config.objective
    match objective.kind:
        case ObjectiveKind.sampled:
            _sampled(config)
        case ObjectiveKind.support:
            _support(config)
    _require(
        objective.kind is ObjectiveKind.sampled or objective.use_as is not SignalUse.reward,
        f"objective.use_as=reward with objective={objective.kind.value}: a divergence at a prefix does not depend on"
        " the token that was sampled there, so as a detached reward its policy gradient is zero in expectation (at"
        " discount 0); expected loss or auto",
    )
    for key, given in _sampled_only(objective).items():
        _require(
            objective.kind is ObjectiveKind.sampled or not given,
            f"objective.{key} with objective={objective.kind.value}: expected objective=sampled, the others have no"
            " reward to change",
        )


def _sampled_only(objective: ObjectiveConfig) -> dict[str, bool]:
    """Return the keys that change `sampled` alone, and whether they are set."""
    return {
        "discount": objective.discount > 0,
        "baseline": objective.baseline is not BaselineKind.none,
        "reward_clip": objective.reward_clip is not None,
        "task_reward_weight": objective.task_reward_weight > 0,
        "correct_top_p": objective.correct_top_p,
    }


def _sampled(config: Config) -> None:
    objective = config.objective
    _require(
        objective.use_as is not SignalUse.loss,
        "objective.use_as=loss with objective=sampled: the gradient of log p(y) - log q(y) has no teacher in it and is"
        " zero in expectation; expected reward or auto (a policy gradient), or objective=support or full",
    )
    for key, samples in _with_tasks(config, "samples_per_prompt"):
        _require(
            objective.baseline is not BaselineKind.group_mean or samples > 1,
            f"objective.baseline=group_mean with {key}={samples}: expected at least 2, the mean is over a prompt's"
            " other samples",
        )
        _require(
            objective.task_reward_weight == 0 or samples > 1,
            f"objective.task_reward_weight={objective.task_reward_weight} with {key}={samples}: expected at least 2,"
            " rewards are compared within a prompt's samples",
        )
    _require(
        not objective.correct_top_p or config.rollout.top_p < 1,
        "objective.correct_top_p=true with rollout.top_p=1: there is no nucleus to correct for",
    )
    num_updates = config.learner.updates_per_batch
    for key, given, most in (("max_staleness", config.max_staleness, 0), ("learner.updates_per_batch", num_updates, 1)):
        _require(
            objective.ratio is not RatioKind.none or given <= most,
            f"objective.ratio=none with objective=sampled and {key}={given}: by then the student is not the policy"
            " that sampled, and the policy gradient must weigh the samples; expected truncated or ppo",
        )


def _support(config: Config) -> None:
    objective = config.objective
    _require(
        objective.top_k >= 2 or objective.tail is not TailKind.renormalise,
        f"objective.top_k={objective.top_k}: expected at least 2; renormalised over one token, loss and gradient are"
        " always 0",
    )
    limit = config.rollout.engine_args.get("max_logprobs", objective.top_k)
    _require(
        objective.support is SupportSource.teacher or limit == -1 or objective.top_k <= limit,
        f"objective.top_k={objective.top_k}: the rollout engine gives at most"
        f" rollout.engine_args.max_logprobs={limit} log-probs a token; raise it or leave it out",
    )


def _cache(config: Config) -> None:
    """Recorded scores come with recorded responses, so that they teach everything or nothing."""
    named = {teacher_key(name).removesuffix(".path"): t for name, t in teachers_of(config).by_name.items()}
    paths = {key: None if teacher.cache is None else teacher.cache.path for key, teacher in named.items()}
    _require(
        len(set(paths.values())) == 1,
        "; ".join(f"{key}.cache.path={path}" for key, path in paths.items())
        + ": expected the same of all teachers, responses and scores are recorded together",
    )
    if set(paths.values()) == {None}:
        return
    _require(not config.record_scores, "record_scores=true with kind=cache: these scores are recorded already")
    for key, teacher in named.items():
        _require(
            teacher.alignment is AlignmentKind.none and not teacher.evaluate,
            f"{key}.kind=cache with alignment={teacher.alignment.value} and evaluate={teacher.evaluate}: expected"
            " none and false, there is no engine",
        )
    _require(
        config.learner.on_skipped_steps is SkippedPolicy.end,
        "learner.on_skipped_steps=rollback with kind=cache: expected end, no other prompts are recorded",
    )
    objective = config.objective
    _require(
        objective.kind is not ObjectiveKind.sampled or objective.ratio is not RatioKind.none,
        "objective.ratio=none with objective=sampled and kind=cache: recorded responses are another policy's, and the"
        " policy gradient must weigh them; expected truncated or ppo, or objective=support or full",
    )


def _batch(config: Config) -> None:
    num_ranks, num_updates = config.learner.num_ranks, config.learner.updates_per_batch
    for key, given in (("batch.num_prompts", config.batch.num_prompts), ("eval.num_prompts", config.eval.num_prompts)):
        _require(
            given % num_ranks == 0,
            f"{key}={given}: expected a multiple of learner.num_ranks={num_ranks}, so that every rank gets as many"
            " groups",
        )
    _require(
        config.batch.num_prompts % (num_ranks * num_updates) == 0,
        f"batch.num_prompts={config.batch.num_prompts}: expected a multiple of learner.num_ranks={num_ranks} times"
        f" learner.updates_per_batch={num_updates}, so that every rank gets as many groups of every update",
    )


def _micro_batch(config: Config) -> None:
    longest = config.data.max_prompt_tokens + max_response_tokens(config)
    limit = config.learner.max_tokens_per_micro_batch
    _require(
        longest <= limit,
        f"learner.max_tokens_per_micro_batch={limit}: expected at least {longest}, the longest sequence"
        f" (data.max_prompt_tokens={config.data.max_prompt_tokens}"
        f" + max_response_tokens={max_response_tokens(config)}, the largest of rollout and tasks)",
    )
