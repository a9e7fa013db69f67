"""The configuration of what a run uses besides its models: the Ray cluster, its evaluation, where metrics go."""

from dataclasses import dataclass
from enum import StrEnum


class TrackingKind(StrEnum):
    """The sink beside metrics.jsonl."""

    wandb = "wandb"
    tensorboard = "tensorboard"
    none = "none"


@dataclass(kw_only=True, slots=True)
class ClusterConfig:
    """The Ray cluster."""

    address: str | None = None  # None: RAY_ADDRESS if set (as in a submitted job), else a cluster of this process
    num_cpus: int | None = None  # CPUs of a cluster of this process; None: all of the machine
    placement_timeout_s: float = 600.0  # how long the workers wait for their place
    may_grow: bool = False  # an autoscaler adds nodes: a run larger than the cluster waits instead of being refused
    sleep: bool = False  # engines that share one GPU with the learner give their memory back while it updates
    threads_per_worker: int = 0  # CPU threads of torch in each worker; 0: torch's own choice


@dataclass(kw_only=True, slots=True)
class FaultConfig:
    """What happens when a worker dies or hangs."""

    max_restarts: int = 3  # of one worker in its place, and of all in a row without a new checkpoint; 0: none
    backoff_s: float = 2.0  # before the first of them; doubled before each other
    hang_timeout_s: float = 300.0  # without a sign of life a worker is killed
    start_timeout_s: float = 3600.0  # within which workers must have read their models
    call_timeout_s: float = 3600.0  # without an answer to a call (an update, a group) all workers are started again

    def __post_init__(self) -> None:
        if self.max_restarts < 0:
            raise ValueError(f"fault.max_restarts={self.max_restarts}: expected an integer of at least 0")
        for name in ("backoff_s", "hang_timeout_s", "start_timeout_s", "call_timeout_s"):
            least = 0.0 if name == "backoff_s" else 1.0
            if not getattr(self, name) >= least:
                raise ValueError(f"fault.{name}={getattr(self, name)}: expected a number of at least {least:g}")


@dataclass(kw_only=True, slots=True)
class EvalConfig:
    """Held-out evaluation of the student."""

    num_prompts: int = 64
    samples_per_prompt: int = 4  # the k of avg@k
    sweep_metric: str = "reverse_kl_after"  # the figure of summary.json that a sweep is told

    def __post_init__(self) -> None:
        for name in ("num_prompts", "samples_per_prompt"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"eval.{name}={value}: expected an integer of at least 1")


@dataclass(kw_only=True, slots=True)
class TrackingConfig:
    """Where metrics go besides metrics.jsonl."""

    kind: TrackingKind
    project: str = "opd-ray"
    entity: str | None = None
    group: str | None = None  # of runs that belong together; null: the sweep's name, or none
    log_checkpoints: bool = False  # also send every checkpoint and the final student, as W&B artifacts
    num_samples: int = 2  # sampled texts written to samples.jsonl a step
