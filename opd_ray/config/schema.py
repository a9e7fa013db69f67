"""The configuration: every key, its type and its default, once.

A key without a default must be given. YAML groups under `configs/` hold choices, never a default of their own.
Rules over one field are checked in `__post_init__` here; rules over several fields stand in `validate.py`.
"""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from opd_ray.config.data import DataConfig
from opd_ray.config.objective import ObjectiveConfig
from opd_ray.config.services import ClusterConfig, EvalConfig, FaultConfig, TrackingConfig
from opd_ray.config.student import LoraConfig
from opd_ray.config.teacher import (
    AlignmentKind,
    CacheTeacherConfig,
    HttpTeacherConfig,
    SelfTeacherConfig,
    TeacherKind,
    check_context,
)
from opd_ray.config.weight_sync import WeightSync


class ResumePolicy(StrEnum):
    """What to do with a run dir that already holds a run."""

    never = "never"
    auto = "auto"
    overwrite = "overwrite"


class BatchMode(StrEnum):
    """How the tasks share an update."""

    mixed = "mixed"  # every update has prompts of every task
    sequential = "sequential"  # one task an update, in turn


class LrSchedule(StrEnum):
    """Learning-rate schedule after the warm-up."""

    constant = "constant"
    linear = "linear"
    cosine = "cosine"


class SkippedPolicy(StrEnum):
    """What follows from too many steps in a row that were left out."""

    end = "end"  # of the run, with a checkpoint
    rollback = "rollback"  # to the checkpoint before them; the updates since are taken on other prompts


class Dtype(StrEnum):
    """Floating-point type of weights and activations."""

    float32 = "float32"
    bfloat16 = "bfloat16"


def _require(holds: bool, key: str, given: object, expected: str) -> None:
    if not holds:
        raise ValueError(f"{key}={given}: expected {expected}")


@dataclass(kw_only=True, slots=True)
class TinyModelConfig:
    """A small model that the run itself trains by supervision on a built-in task when its folder is missing."""

    tasks: list[str] = field(default_factory=lambda: ["sort"])  # in equal parts
    num_layers: int = 2
    hidden_size: int = 128
    num_heads: int = 4
    num_steps: int = 300
    batch_size: int = 128
    lr: float = 3e-3
    tied_embeddings: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_layers", "hidden_size", "num_heads", "num_steps", "batch_size"):
            _require(getattr(self, name) >= 1, f"*.build.{name}", getattr(self, name), "an integer of at least 1")
        _require(len(self.tasks) >= 1, "*.build.tasks", self.tasks, "at least one built-in task")


@dataclass(kw_only=True, slots=True)
class StudentConfig:
    """The model that is trained: a Hugging Face folder or hub name."""

    path: str
    build: TinyModelConfig | None = None
    lora: LoraConfig = field(default_factory=LoraConfig)


@dataclass(kw_only=True, slots=True)
class TeacherConfig:
    """The model that scores, and its pool of workers."""

    # kind=http: of its tokenizer alone; kind=cache: read for its output head, with hidden states only; kind=self: the
    # student's, need not be given; nor that of `teacher` where `teachers` are given
    path: str
    kind: TeacherKind = TeacherKind.vllm
    http: HttpTeacherConfig | None = None  # kind=http: where it is served
    cache: CacheTeacherConfig | None = None  # kind=cache: what was recorded
    self: SelfTeacherConfig = field(default_factory=SelfTeacherConfig)  # kind=self: how it follows the student
    context: str | None = None  # privileged context: what it reads for a prompt; holds {prompt}, may hold {answer}
    alignment: AlignmentKind = AlignmentKind.none
    token_map: dict[str, str] = field(default_factory=dict)  # alignment=bytes: student token -> teacher token
    build: TinyModelConfig | None = None
    dtype: Dtype = Dtype.bfloat16
    num_workers: int = 1
    cpus_per_worker: float = 1.0
    gpus_per_worker: float = 0.0
    evaluate: bool = False  # also measure the teacher's own accuracy before training
    # on how many response tokens its engine is compared with its checkpoint, read by transformers in float32 on CPUs:
    # before a run and by the doctor; null: by the doctor alone, on a few, where the weights are small; 0: never
    reference_tokens: int | None = None
    engine_args: dict[str, Any] = field(default_factory=dict)  # passed to vLLM untouched

    def __post_init__(self) -> None:
        _require(self.num_workers >= 1, "teacher.num_workers", self.num_workers, "an integer of at least 1")
        tokens = self.reference_tokens
        _require(tokens is None or tokens >= 0, "teacher.reference_tokens", tokens, "an integer of at least 0, or null")
        served = self.http is not None
        _require(served == (self.kind is TeacherKind.http), "teacher.http", self.http, "urls exactly with kind=http")
        if self.kind is TeacherKind.self:
            _require(self.build is None, "teacher.build", "{...}", "null with kind=self, student.build makes the model")
            _require(self.alignment is AlignmentKind.none, "teacher.alignment", self.alignment, "none with kind=self")
        else:
            _require(self.self == SelfTeacherConfig(), "teacher.self", self.self, "its default unless kind=self")
        if self.context is not None:
            check_context(self.context)
        recorded = self.cache is not None
        _require(
            recorded == (self.kind is TeacherKind.cache), "teacher.cache", self.cache, "path exactly with kind=cache"
        )


@dataclass(kw_only=True, slots=True)
class BatchConfig:
    """One step's worth of prompts: what is sampled, scored and learned from between two publications."""

    num_prompts: int = 32
    mode: BatchMode = BatchMode.mixed  # with several tasks
    max_bad_fraction: float = 0.1  # of num_prompts; more groups without a score end the run. Above 0 one is allowed

    def __post_init__(self) -> None:
        _require(self.num_prompts >= 1, "batch.num_prompts", self.num_prompts, "an integer of at least 1")
        limit = self.max_bad_fraction
        _require(0 <= limit <= 1, "batch.max_bad_fraction", limit, "a number from 0 to 1")


@dataclass(kw_only=True, slots=True)
class TaskConfig:
    """What is particular to the prompts of one task. null: as the rollout group says."""

    verifier: str | None = None  # marks the responses; null: the task's own name
    share: float = 1.0  # of a mixed batch's prompts, or of the updates in sequential mode, relative to other tasks
    loss_weight: float = 1.0  # of its tokens' losses
    samples_per_prompt: int | None = None
    max_response_tokens: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        _require(self.share > 0, "tasks.*.share", self.share, "a number above 0")
        _require(self.loss_weight >= 0, "tasks.*.loss_weight", self.loss_weight, "a number of at least 0")
        for name in ("samples_per_prompt", "max_response_tokens"):
            value = getattr(self, name)
            _require(value is None or value >= 1, f"tasks.*.{name}", value, "an integer of at least 1, or null")
        _require(self.top_p is None or 0 < self.top_p <= 1, "tasks.*.top_p", self.top_p, "a number in (0, 1], or null")


@dataclass(kw_only=True, slots=True)
class RolloutConfig:
    """Sampling from the student, and its pool of vLLM workers."""

    samples_per_prompt: int = 4
    max_response_tokens: int = 1024
    temperature: float = 1.0
    top_p: float = 1.0
    dtype: Dtype = Dtype.bfloat16
    update_in_flight: bool = True  # running sequences go on under new weights; false: they finish under the old first
    overprovision: float = 0.0  # more groups in flight, of batch.num_prompts: an update learns from the first to finish
    groups_per_call: int = 1  # travel and leave together, to be scored too: for short responses, whose calls cost more
    num_workers: int = 1
    cpus_per_worker: float = 1.0
    gpus_per_worker: float = 0.0
    weight_sync: WeightSync = WeightSync.auto
    engine_args: dict[str, Any] = field(default_factory=dict)  # passed to vLLM untouched

    def __post_init__(self) -> None:
        _require(0 <= self.overprovision <= 1, "rollout.overprovision", self.overprovision, "a number from 0 to 1")
        for name in ("samples_per_prompt", "max_response_tokens", "groups_per_call", "num_workers"):
            _require(getattr(self, name) >= 1, f"rollout.{name}", getattr(self, name), "an integer of at least 1")
        _require(self.temperature > 0, "rollout.temperature", self.temperature, "a number above 0")
        _require(0 < self.top_p <= 1, "rollout.top_p", self.top_p, "a number in (0, 1]")


@dataclass(kw_only=True, slots=True)
class LearnerConfig:
    """The DeepSpeed ranks and their optimizer."""

    num_ranks: int = 1
    zero_stage: int = 2
    dtype: Dtype = Dtype.bfloat16
    lr: float = 1e-6
    lr_schedule: LrSchedule = LrSchedule.constant
    warmup_steps: int = 0  # optimizer steps, of num_steps * updates_per_batch
    updates_per_batch: int = 1  # optimizer steps, each on its part of the batch's prompts
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.95
    max_grad_norm: float = 1.0
    spike_factor: float = 0.0  # a step whose gradient norm is above so many medians of the last 32 is left out; 0: none
    max_skipped_steps: int = 5  # updates in a row left out for gradients that spike or are not finite
    on_skipped_steps: SkippedPolicy = SkippedPolicy.end  # what more of them in a row do
    max_tokens_per_micro_batch: int = 8192
    packing: bool = True  # sequences end to end without padding; false: for models with an attention of their own
    gradient_checkpointing: bool = False
    gradient_noise: bool = False  # measure how far micro-batches' gradients differ; reads each gradient once more
    cpus_per_rank: float = 1.0
    gpus_per_rank: float = 0.0
    engine_args: dict[str, Any] = field(default_factory=dict)  # merged into the DeepSpeed configuration

    def __post_init__(self) -> None:
        _require(self.num_ranks >= 1, "learner.num_ranks", self.num_ranks, "an integer of at least 1")
        _require(self.zero_stage in (0, 1, 2, 3), "learner.zero_stage", self.zero_stage, "0, 1, 2 or 3")
        _require(self.lr > 0, "learner.lr", self.lr, "a number above 0")
        _require(self.updates_per_batch >= 1, "learner.updates_per_batch", self.updates_per_batch, "at least 1")
        for name in ("warmup_steps", "max_skipped_steps"):
            _require(getattr(self, name) >= 0, f"learner.{name}", getattr(self, name), "an integer of at least 0")
        factor = self.spike_factor
        _require(factor == 0 or factor > 1, "learner.spike_factor", factor, "a number above 1, or 0")
        limit = self.max_tokens_per_micro_batch
        _require(limit >= 1, "learner.max_tokens_per_micro_batch", limit, "an integer of at least 1")


@dataclass(kw_only=True, slots=True)
class Config:
    """One run."""

    name: str
    num_steps: int
    seed: int = 0
    deterministic: bool = False
    max_staleness: int = 0
    eval_every: int = 0  # 0: only before and after
    save_every: int = 0  # 0: no checkpoints, only the final export
    save_total_limit: int = 3  # the newest so many checkpoints are kept; 0: all
    async_save: bool = False  # checkpoints are copied into the machine's memory and written while training goes on
    max_failed_saves: int = 3  # checkpoints in a row that cannot be written before the run ends
    resume: ResumePolicy = ResumePolicy.never
    runs_dir: str = "runs"
    record_scores: bool = False  # write all groups to train on and their scores to the run dir, for teacher=cache
    student: StudentConfig
    teacher: TeacherConfig
    teachers: dict[str, TeacherConfig] = field(default_factory=dict)  # by task; empty: `teacher` teaches all
    tasks: dict[str, TaskConfig] = field(default_factory=dict)  # by task; one without an entry has the defaults
    data: DataConfig
    batch: BatchConfig = field(default_factory=BatchConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    objective: ObjectiveConfig
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    fault: FaultConfig = field(default_factory=FaultConfig)
    tracking: TrackingConfig

    def __post_init__(self) -> None:
        _require(self.num_steps >= 1, "num_steps", self.num_steps, "an integer of at least 1")
        for name in ("max_staleness", "eval_every", "save_every", "save_total_limit", "max_failed_saves"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "an integer of at least 0")
        allowed = bool(self.name) and all(c.isalnum() or c in "._-" for c in self.name) and self.name[0] != "."
        _require(allowed, "name", repr(self.name), "letters, digits, '.', '_' and '-', not starting with '.'")
