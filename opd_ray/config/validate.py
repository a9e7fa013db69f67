"""Rules over several configuration fields; each message says what was given, what was expected, which key to change."""

from opd_ray.config.schema import Config, DataKind, ObjectiveKind
from opd_ray.data.tasks import TASKS, verifier


def validate(config: Config) -> None:
    """Raise ValueError for the first rule the configuration breaks."""
    for rule in (_modes, _data, _sampling, _objective, _batch, _micro_batch, _devices):
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
    _require(
        not config.deterministic,
        "deterministic=true: fixed engine batches are not built yet; equal seeds alone give runs that agree up to"
        " rounding",
    )


def _data(config: Config) -> None:
    data = config.data
    if data.kind is DataKind.task:
        known = ", ".join(sorted(TASKS))
        _require(data.task in TASKS, f"data.task={data.task}: expected a built-in task ({known})")
        return
    _require(data.path is not None, f"data.path is not given: data={data.kind.value} expects the path of a file")
    if data.task is not None:
        try:
            verifier(data.task)
        except ValueError as error:
            raise ValueError(f"data.task={data.task}: {error}") from None


def _sampling(config: Config) -> None:
    rollout = config.rollout
    _require(
        rollout.temperature == 1 or rollout.top_p == 1,
        f"rollout.temperature={rollout.temperature} with rollout.top_p={rollout.top_p}: vLLM gives log-probs either"
        " before both or after both, and the objective needs them after the temperature only; set one of them to 1",
    )


def _objective(config: Config) -> None:
    objective = config.objective
    _require(
        objective.kind is not ObjectiveKind.support or objective.top_k >= 2,
        f"objective.top_k={objective.top_k}: expected at least 2; renormalised over one token the loss is always 0",
    )


def _batch(config: Config) -> None:
    num_ranks = config.learner.num_ranks
    for key, given in (("batch.num_prompts", config.batch.num_prompts), ("eval.num_prompts", config.eval.num_prompts)):
        _require(
            given % num_ranks == 0,
            f"{key}={given}: expected a multiple of learner.num_ranks={num_ranks}, so that every rank gets as many"
            " groups",
        )


def _micro_batch(config: Config) -> None:
    longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    limit = config.learner.max_tokens_per_micro_batch
    _require(
        longest <= limit,
        f"learner.max_tokens_per_micro_batch={limit}: expected at least {longest}, the longest sequence"
        f" (data.max_prompt_tokens={config.data.max_prompt_tokens}"
        f" + rollout.max_response_tokens={config.rollout.max_response_tokens})",
    )


def _devices(config: Config) -> None:
    learner = config.learner
    _require(
        learner.gpus_per_rank in (0, 1),
        f"learner.gpus_per_rank={learner.gpus_per_rank}: expected 0 or 1; more GPUs are more ranks (learner.num_ranks)",
    )
