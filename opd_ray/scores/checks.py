"""Whether a recording can teach this run: each refusal says what was recorded, what is asked, which key to change."""

from collections.abc import Sequence
from typing import Any

from opd_ray.config.objective import BaselineKind, ObjectiveKind
from opd_ray.config.schema import Config
from opd_ray.protocol import Payload, ScoreRequest
from opd_ray.requests import score_request
from opd_ray.routing import max_response_tokens
from opd_ray.scores.files import Recording
from opd_ray.scores.manifest import Manifest, vocabulary_key

_SUPPORT_KEYS = {  # of `objective` -> of `ScoreRequest`
    "support": "support",
    "top_k": "top_k",
    "support_top_p": "top_p",
    "include_sampled": "include_sampled",
}


def check_recording(
    config: Config, recording: Recording, *, tokenizer: Any, vocab_size: int, equivalent_ids: Sequence[Sequence[int]]
) -> None:
    """Raise ValueError when a recording's scores are not what this run's objective needs, or its shards are damaged.

    tokenizer is the student's, vocab_size the rows of its head; equivalent_ids are those of this run's objective.
    """
    manifest, where = recording.manifest, f"teacher.cache.path={recording.folder}"
    if not recording.groups:
        raise ValueError(f"{where}: no update was recorded there; expected at least one")
    if manifest.vocabulary_key != vocabulary_key(tokenizer) or manifest.vocab_size > vocab_size:
        raise ValueError(
            f"{where}: was recorded over another vocabulary ({manifest.vocab_size:,} tokens of {manifest.student});"
            f" expected a student.path with the same token map, and a head with as many rows (it has {vocab_size:,})"
        )
    if manifest.temperature != config.rollout.temperature:
        raise ValueError(
            f"{where}: log-probs were recorded at rollout.temperature={manifest.temperature:g}; expected the same of"
            f" this run, given {config.rollout.temperature:g}"
        )
    given = tuple(tuple(ids) for ids in equivalent_ids)
    _require(
        score_request(config.objective).payload is Payload.hidden or manifest.equivalent_ids == given,
        f"objective.equivalent_tokens: {where} was recorded with the classes {manifest.equivalent_ids} of ids, this"
        f" run's are {given}; expected the same",
    )
    _check_lengths(config, recording, where=where)
    if config.objective.kind is ObjectiveKind.sampled:
        _check_sampled(config, recording, where=where)
    recording.verify(checksums=all(t.cache is None or t.cache.verify for t in _teachers(config)))


def check_offered(asked: ScoreRequest, manifest: Manifest, *, where: str) -> None:
    """Raise ValueError when the recorded scores do not hold what the objective asks."""
    held = manifest.asked
    if asked.sampled_logprobs or asked.payload is Payload.sampled:
        _require(
            held.sampled_logprobs or held.payload is Payload.sampled,
            f"{where}: holds {held.payload.value} payloads without the sampled tokens' log-probs, which this objective"
            " needs; record with an objective that asks for them (objective=sampled, objective.weight.drift_rate,"
            " objective.tail=sampled_corrected), or change objective",
        )
    _require(
        asked.payload in (held.payload, Payload.sampled),
        f"{where}: holds {held.payload.value} payloads, and this objective needs {asked.payload.value}; expected"
        f" objective={'full' if held.payload is Payload.hidden else held.payload.value}, or another recording",
    )
    if asked.payload is Payload.support:
        for key, name in _SUPPORT_KEYS.items():
            given, recorded = getattr(asked, name), getattr(held, name)
            _require(given == recorded, f"objective.{key}={given}: {where} was recorded with {recorded}; expected that")
        _require(
            held.normalised or not asked.normalised,
            f"{where}: log-probs are known up to a constant per token (recorded with objective.tail=renormalise), and"
            " this objective.tail needs them whole; expected objective.tail=renormalise",
        )


def _check_lengths(config: Config, recording: Recording, *, where: str) -> None:
    groups = recording.groups
    for what, key, longest, limit in (
        (
            "prompt",
            "data.max_prompt_tokens",
            max(group.num_prompt_tokens for group in groups),
            config.data.max_prompt_tokens,
        ),
        (
            "response",
            "rollout.max_response_tokens",
            max(max(group.response_lengths) for group in groups),
            max_response_tokens(config),
        ),
    ):
        _require(longest <= limit, f"{key}={limit}: {where} holds a {what} of {longest} tokens; expected at least that")


def _check_sampled(config: Config, recording: Recording, *, where: str) -> None:
    """Check what the policy gradient must know of the policy that sampled, which is none of this run's."""
    objective, manifest = config.objective, recording.manifest
    for key, given, recorded in (
        ("rollout.top_p", config.rollout.top_p, manifest.top_p),
        ("objective.correct_top_p", objective.correct_top_p, manifest.correct_top_p),
    ):
        _require(
            given == recorded,
            f"{key}={given}: {where} was sampled with {recorded}, and the importance ratio needs the same; expected"
            " that, or objective=support or full",
        )
    compares = objective.baseline is BaselineKind.group_mean or objective.task_reward_weight > 0
    _require(
        not compares or all(len(group.response_lengths) > 1 for group in recording.groups),
        f"{where}: holds prompts with a single response; objective.baseline=group_mean and objective.task_reward_weight"
        " compare a prompt's responses, expected at least 2",
    )
    _require(
        objective.task_reward_weight == 0 or all(group.has_rewards for group in recording.groups),
        f"objective.task_reward_weight={objective.task_reward_weight}: {where} holds responses without a reward;"
        " expected 0",
    )


def _teachers(config: Config) -> list[Any]:
    return [config.teacher, *config.teachers.values()]


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)
