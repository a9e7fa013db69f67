"""What the parts say to each other: messages between actors, and the Protocols of the fleets.

Array suffixes: P prompt tokens, N flat response tokens of a group, G samples of a group, K support size, H pages of
65,536 ids beyond the first, D hidden size. Index t of any per-token array speaks of token t itself, never of the next
one. Log-probs are in nats.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from opd_ray.arrays import Bool, no_flags, no_ids
from opd_ray.arrays import Float32 as Float32
from opd_ray.arrays import Int32 as Int32
from opd_ray.arrays import UInt16 as UInt16
from opd_ray.comparison import Comparison

Metrics = Mapping[str, float]
RECORDED_VERSION = -1  # of a token that the policy of an earlier run sampled: no version of this run's student
Ref = Any  # a reference to a value in the object store: `ray.ObjectRef` outside tests


class Finish(IntEnum):
    """Why a response ended."""

    stop = 0
    length = 1


class Payload(StrEnum):
    """What a teacher is asked to say about each token; the objective decides."""

    sampled = "sampled"
    support = "support"
    hidden = "hidden"


class CannotGoOn(RuntimeError):
    """No further update is possible, through no fault of the learner: it can still be saved."""


def _check_length(owner: object, name: str, expected: int) -> None:
    given = len(getattr(owner, name))
    if given != expected:
        raise ValueError(f"{type(owner).__name__}.{name} has {given} entries, expected {expected}")


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingOptions:
    """How responses are drawn from the student."""

    num_samples: int  # responses to one prompt (G)
    max_response_tokens: int
    temperature: float  # 0 is greedy
    top_p: float
    support_size: int  # likeliest tokens of the student to carry along at every position (K); 0: none
    support_top_p: float  # of those, only the fewest that hold this mass


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One prompt, tokenised, as the data source hands it out."""

    ids_P: Int32  # [P] prompt tokens, chat template applied
    index: int  # position in the data source: the prompt's identity
    task: str  # decides teacher, sampling and weight
    verifier: str  # marks the responses
    answer: str | None  # reference answer; None: nothing to verify against
    teacher_ids_P: Int32 = field(default_factory=no_ids)  # what the teacher reads instead; [0]: the same


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateRequest:
    """Ask for the responses to one prompt. The same request always means the same samples."""

    prompt: Prompt
    sampling: SamplingOptions
    version: int  # oldest policy version that may serve this request
    seed: int  # of the group; sample g uses a function of (seed, g)
    step: int  # the update whose batch of prompts it belongs to; held out: the version that is evaluated
    position: int  # in that batch


@dataclass(frozen=True, slots=True, kw_only=True)
class TrajectoryGroup:
    """The G sampled responses to one prompt, flat over tokens."""

    prompt_ids: Int32  # [P]
    response_ids: Int32  # [N] sampled tokens, the end token included where there is one
    offsets: Int32  # [G+1] response g is response_ids[offsets[g]:offsets[g+1]]
    sampled_logprobs: Float32  # [N] at the rollout temperature, over all ids or (correct_top_p) the nucleus
    token_versions: Int32  # [N] version of the policy that sampled the token, or RECORDED_VERSION
    loss_mask: Bool  # [N] false: a token the policy did not choose
    support_ids: Int32  # [N,K] the student's own top-K at sampling time, -1 for none; K = 0 when not asked for
    rewards: Float32  # [G] of the task's verifier; [0] without a reference answer
    finish: npt.NDArray[np.int8]  # [G] values of `Finish`
    prompt_index: int
    task: str
    seed: int
    teacher_prompt_ids: Int32 = field(default_factory=no_ids)  # what the teacher reads for prompt_ids; [0]: the same

    def __post_init__(self) -> None:
        num_tokens = len(self.response_ids)
        for name in ("sampled_logprobs", "token_versions", "loss_mask", "support_ids"):
            _check_length(self, name, num_tokens)
        _check_length(self, "finish", len(self.offsets) - 1)
        _check_length(self, "rewards", len(self.offsets) - 1 if len(self.rewards) else 0)
        if self.offsets[0] != 0 or self.offsets[-1] != num_tokens:
            raise ValueError(f"TrajectoryGroup.offsets span {self.offsets[0]}..{self.offsets[-1]}, not 0..{num_tokens}")


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupSummary:
    """What the controller and the learner's fleet need to know of a group, without its tokens."""

    prompt_index: int
    task: str
    num_prompt_tokens: int
    response_lengths: tuple[int, ...]  # [G] tokens
    num_loss_tokens: int  # tokens with loss_mask true
    num_truncated: int  # responses that hit max_response_tokens
    rewards: tuple[float, ...]  # [G] of the task's verifier; empty without a reference answer
    oldest_version: int
    text: str  # prompt and first response, for people
    generate_s: float  # from the request's arrival at the worker to its last token
    repetition: float = 0.0  # share of 4-grams that the response had before, mean over responses
    span: tuple[str, float, float] = ("", 0.0, 0.0)  # worker, and from when to when it was at it, Unix seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreRequest:
    """What a teacher is asked to say about each token; the objective decides. The defaults ask for nothing more."""

    payload: Payload
    sampled_logprobs: bool = False  # also the log-prob of each sampled token, whatever the payload
    support: Literal["teacher", "student", "union"] = "teacher"  # of `support` alone, as all below: whose top
    top_k: int = 0
    top_p: float = 1.0  # below 1: the fewest of the teacher's top_k that hold this mass
    include_sampled: bool = False  # the sampled token joins the support
    normalised: bool = True  # over the full vocabulary; false: up to a constant per token, which may be cheaper


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledScore:
    """The teacher's log-prob of each sampled token: 4 bytes a token."""

    logprobs_N: Float32  # [N] full vocabulary, at the rollout temperature
    valid_N: Bool = field(default_factory=no_flags)  # [N] false: nothing is said of the token, no loss; [0]: all valid


@dataclass(frozen=True, slots=True, kw_only=True)
class SupportScore:
    """The teacher's log-probs on a small set of ids: 6K + 2H bytes a token, packed by `workers.support_codec`."""

    low_ids_NK: UInt16  # [N,K] the 16 low bits of each id; ids are distinct in a row
    page_starts_NH: UInt16  # [N,H] first column with an id of 65,536 (h + 1) or more; ids are sorted unless H = 0
    logprobs_NK: Float32  # [N,K] full vocabulary, at the rollout temperature; -inf: no id
    sampled_logprobs_N: Float32  # [N] of the sampled tokens; [0] when not asked for

    def __post_init__(self) -> None:
        if self.low_ids_NK.shape != self.logprobs_NK.shape:
            raise ValueError(f"SupportScore: ids {self.low_ids_NK.shape} and logprobs {self.logprobs_NK.shape} differ")
        _check_length(self, "page_starts_NH", len(self.low_ids_NK))


@dataclass(frozen=True, slots=True, kw_only=True)
class HiddenScore:
    """The teacher's final hidden state before each token: the exact full-vocabulary signal, 2D or 4D bytes a token."""

    hidden_ND: npt.NDArray[Any]  # [N,D] float32, or uint16 holding the bits of bfloat16
    sampled_logprobs_N: Float32  # [N] of the sampled tokens; [0] when not asked for


Score = SampledScore | SupportScore | HiddenScore


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreSummary:
    """What the controller needs to know of a score, without its arrays."""

    num_tokens: int  # response tokens scored
    num_bytes: int  # of the payload
    dropped_mass_sum: float  # probability of the ids that only the teacher has, summed over tokens; NaN: not computed
    score_s: float  # from the group's arrival at the worker to its score
    span: tuple[str, float, float] = ("", 0.0, 0.0)  # as of a group's summary
    fault: str = ""  # why there is no score (None instead); "": there is one


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupHandle:
    """A group on its way: two references that resolve when its last response is finished."""

    request: GenerateRequest
    summary: Ref  # -> GroupSummary
    group: Ref  # -> TrajectoryGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreHandle:
    """A score on its way."""

    teacher: str  # whose
    summary: Ref  # -> ScoreSummary
    score: Ref  # -> Score


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One update's worth of groups and their scores, dispatched and possibly unfinished."""

    step: int  # the update this batch is for
    groups: Sequence[GroupHandle]
    scores: Sequence[ScoreHandle]


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightBundle:
    """A published version of the student's weights: where the bytes lie and what they are."""

    version: int
    manifest: Ref  # -> WeightManifest (see workers.weights)
    buffer: Ref  # -> a uint8 array a tensor, or None where the senders bring the bytes
    senders: tuple[Any, ...] = ()  # the learner's ranks, where they write into the workers themselves


class Lasting(Protocol):
    """What has a state that outlives the run."""

    def save(self, folder: str) -> None:
        """Write it into a checkpoint's folder."""

    def restore(self, folder: str) -> None:
        """Load what `save` has written."""


class RolloutFleet(Protocol):
    """The pool of workers that sample from the student."""

    def generate(self, requests: Sequence[GenerateRequest]) -> list[GroupHandle]:
        """Dispatch requests; return at once."""

    def load(self, weights: WeightBundle) -> Metrics:
        """Give every worker a new version of the student; return timings."""

    def summaries(self, groups: Sequence[GroupHandle]) -> list[GroupSummary]:
        """Wait for groups and return their summaries, in order."""

    def first(self, groups: Sequence[GroupHandle], *, num_groups: int) -> list[int]:
        """Wait until as many groups are finished and return their positions, ascending."""


class TeacherFleet(Lasting, Protocol):
    """The pool of workers that score trajectories with the teacher; those that change have a state."""

    def score(self, groups: Sequence[GroupHandle], request: ScoreRequest) -> list[ScoreHandle]:
        """Dispatch scoring of groups, finished or not; return at once."""

    def summaries(self, scores: Sequence[ScoreHandle]) -> list[ScoreSummary]:
        """Wait for scores and return their summaries, in order. Raises CannotGoOn when a teacher is gone."""

    def follow(self, weights: WeightBundle) -> Metrics:
        """Show a new version of the student to teachers that are made of it; return timings."""


class Learner(Lasting, Protocol):
    """The student in training."""

    @property
    def version(self) -> int:
        """Return the version last published: while a batch is waited for, the number of updates taken."""

    def update(self, batch: Batch) -> Metrics:
        """Wait for the batch, take one optimizer update, return the step's metrics (`train/*`, `distill/*`, ...)."""

    def publish(self, version: int) -> WeightBundle:
        """Put the current weights into the object store under a version."""

    def wait_saved(self) -> None:
        """Wait until what the last `save` left to be written is. Raises OSError when it cannot be."""

    def compare(self, batch: Batch) -> Comparison:
        """Return how the student stands to the teacher: KL(student || teacher), exact on hidden states only."""

    def export(self, folder: str) -> None:
        """Write the student as a Hugging Face folder (safetensors and tokenizer)."""
