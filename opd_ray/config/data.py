"""The configuration of the prompts: where they come from, and which of them are used."""

from dataclasses import dataclass, field
from enum import StrEnum


class DataKind(StrEnum):
    """Where prompts come from."""

    task = "task"
    reasoning_gym = "reasoning_gym"
    jsonl = "jsonl"
    parquet = "parquet"


class LongPromptPolicy(StrEnum):
    """What to do with a prompt longer than `data.max_prompt_tokens`, or empty."""

    error = "error"
    drop = "drop"


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """Prompts to train on and prompts held out for evaluation."""

    kind: DataKind
    # built-in task (kind=task), dataset (kind=reasoning_gym), or the task of records that name none
    task: str | None = None
    tasks: list[str] = field(default_factory=list)  # several built-in tasks or datasets instead of one
    path: str | None = None  # JSONL or Parquet file
    eval_path: str | None = None  # held-out file; without it the last eval.num_prompts records of data.path
    num_prompts: int = 16384  # kind=task, reasoning_gym: size of the training set that is made, of each task
    max_prompt_tokens: int = 1024
    long_prompts: LongPromptPolicy = LongPromptPolicy.error

    def __post_init__(self) -> None:
        for name in ("num_prompts", "max_prompt_tokens"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"data.{name}={value}: expected an integer of at least 1")
