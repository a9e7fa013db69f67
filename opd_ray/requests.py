"""What a configuration asks of the fleets: how to sample, what the teacher must say, which ids its tokens are."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from opd_ray.config.objective import BaselineKind, ObjectiveConfig, ObjectiveKind, SupportSource, TailKind
from opd_ray.config.schema import Config, TeacherConfig
from opd_ray.config.teacher import AlignmentKind, SelfUpdate, TeacherKind
from opd_ray.data.token_text import token_bytes
from opd_ray.protocol import Payload, SamplingOptions, ScoreRequest
from opd_ray.routing import recorded_scores, task_config, teachers_of


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectiveIds:
    """The token ids that the objective's configuration names by text."""

    masked: tuple[int, ...]  # of objective.mask.tokens
    equivalent: tuple[tuple[int, ...], ...]  # of objective.equivalent_tokens


def objective_ids(config: ObjectiveConfig, *, tokenizer: Any, vocab_size: int | None = None) -> ObjectiveIds:
    """Look the tokens up. Raises ValueError for text that is not one token of the vocabulary, for equivalent tokens
    beyond the vocab_size that student and teacher share, and for text masks on a tokenizer whose tokens cannot be
    turned into text."""
    if config.mask.text or config.mask.format is not None:
        token_bytes(tokenizer)
    vocabulary: dict[str, int] = tokenizer.get_vocab()

    def ids(key: str, tokens: Sequence[str]) -> tuple[int, ...]:
        for token in tokens:
            if token not in vocabulary:
                raise ValueError(
                    f"objective.{key} names {token!r}, which is no token of the student's vocabulary; for text that may"
                    " be cut into several tokens use objective.mask.text"
                )
        return tuple(vocabulary[token] for token in tokens)

    for token in (token for tokens in config.equivalent_tokens for token in tokens):
        if vocab_size is not None and vocabulary.get(token, 0) >= vocab_size:
            raise ValueError(
                f"objective.equivalent_tokens names {token!r}, id {vocabulary[token]}: expected ids below {vocab_size},"
                " the tokens that student and teacher share"
            )
    return ObjectiveIds(
        masked=ids("mask.tokens", config.mask.tokens),
        equivalent=tuple(ids("equivalent_tokens", tokens) for tokens in config.equivalent_tokens),
    )


def training_samples(config: Config, task: str) -> SamplingOptions:
    """Return how responses to a task's prompts are drawn to train on."""
    objective = config.objective
    from_student = objective.kind is ObjectiveKind.support and objective.support is not SupportSource.teacher
    return _sampling(
        config,
        task,
        num_samples=task_config(config, task).samples_per_prompt or config.rollout.samples_per_prompt,
        support_size=objective.top_k if from_student else 0,
        support_top_p=objective.support_top_p,
    )


def held_out_samples(config: Config, task: str) -> SamplingOptions:
    """Return how responses to a task's held-out prompts are drawn."""
    return _sampling(config, task, num_samples=config.eval.samples_per_prompt, support_size=0, support_top_p=1.0)


def score_request(config: ObjectiveConfig) -> ScoreRequest:
    """Return what the teacher must say so that the objective can be computed."""
    drift = config.weight.drift_rate > 0
    match config.kind:
        case ObjectiveKind.sampled:
            hidden = config.baseline is BaselineKind.kl
            return ScoreRequest(
                payload=Payload.hidden if hidden else Payload.sampled, sampled_logprobs=drift and hidden
            )
        case ObjectiveKind.full:
            return ScoreRequest(payload=Payload.hidden, sampled_logprobs=drift)
        case ObjectiveKind.support:
            sampled_tail = config.tail in (TailKind.sampled_corrected, TailKind.sampled_uncorrected)
            return ScoreRequest(
                payload=Payload.support,
                sampled_logprobs=drift or sampled_tail,
                support=config.support.value,
                top_k=config.top_k,
                top_p=config.support_top_p,
                include_sampled=config.include_sampled,
                normalised=config.tail is not TailKind.renormalise,
            )


def has_engine(teacher: TeacherConfig) -> bool:
    """Return whether a teacher is an engine of this run that shares the student's tokens."""
    return teacher.kind is not TeacherKind.http and teacher.alignment is AlignmentKind.none


def follows_student(teacher: TeacherConfig) -> bool:
    """Return whether a teacher's weights change with the student's."""
    return teacher.kind is TeacherKind.self and teacher.self.update is SelfUpdate.ema


def gives_hidden_states(teacher: TeacherConfig) -> bool:
    """Return whether a teacher's final hidden states can be had, and its head read once for all."""
    return has_engine(teacher) and not follows_student(teacher)


def head_is_read(config: Config, teacher: TeacherConfig) -> bool:
    """Return whether the learner needs a teacher's output head, with which hidden states become log-probs."""
    if teacher.kind is TeacherKind.cache:
        return score_request(config.objective).payload is Payload.hidden
    return gives_hidden_states(teacher)


def held_out_request(config: Config) -> ScoreRequest | None:
    """Return what teachers must say for the held-out KL: the exact signal where all of them can give it.

    None: their scores were recorded, and they say nothing of new responses.
    """
    if recorded_scores(config) is not None:
        return None
    exact = all(gives_hidden_states(teacher) for teacher in teachers_of(config).by_name.values())
    return ScoreRequest(payload=Payload.hidden if exact else Payload.sampled)


def check_offered(request: ScoreRequest, *, offered: frozenset[Payload], teacher: str) -> None:
    """Raise ValueError when a teacher cannot give what the objective needs."""
    if request.payload not in offered:
        gives = ", ".join(sorted(offered))
        needs = {
            Payload.hidden: "objective=full and objective.baseline=kl need the teacher's hidden states",
            Payload.support: "objective=support needs the teacher's log-probs on a set of tokens",
            Payload.sampled: "objective=sampled needs the teacher's log-prob of the sampled token",
        }[request.payload]
        raise ValueError(f"teacher {teacher} gives only {gives}: {needs}; change objective or teacher")


def _sampling(
    config: Config, task: str, *, num_samples: int, support_size: int, support_top_p: float
) -> SamplingOptions:
    special = task_config(config, task)
    return SamplingOptions(
        num_samples=num_samples,
        max_response_tokens=special.max_response_tokens or config.rollout.max_response_tokens,
        temperature=config.rollout.temperature,
        top_p=special.top_p or config.rollout.top_p,
        support_size=support_size,
        support_top_p=support_top_p,
    )
