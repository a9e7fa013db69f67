"""The configuration of `python -m opd_ray.evaluate`."""

from dataclasses import dataclass
from typing import Any

from opd_ray.config.plain import key
from opd_ray.config.remote_code import check_engine_args
from opd_ray.config.schema import Dtype


@dataclass(kw_only=True, slots=True)
class EvaluateConfig:
    """One evaluation of one model."""

    model: str = key(..., words="Hugging Face folder or hub name, or a run dir")
    task: str | None = key(None, words="built-in task, reasoning_gym/<dataset>, or with data a verifier")
    data: str | None = key(None, words="JSONL or Parquet file of prompts with answers")
    num_prompts: int = key(256, words="prompts to make, or to take from the start of the file at most")
    num_samples: int = key(4, words="samples of each prompt: the k of avg@k and the largest k of pass@k")
    temperature: float = key(1.0, words="of the samples; the likeliest response is always taken as well")
    top_p: float = key(1.0, words="of the samples")
    max_prompt_tokens: int = key(4096, words="longer prompts are refused")
    max_response_tokens: int | None = key(
        None, words="length of a response at the most; else 1024, or the model's room"
    )
    seed: int = key(0, words="of the prompts that are made, and of the samples")
    dtype: Dtype = key(Dtype.bfloat16, words="of the weights: bfloat16 or float32")
    num_workers: int = key(1, words="engines side by side, each with the whole model")
    cpus_per_worker: float = key(1.0, words="of each engine")
    gpus_per_worker: float = key(0.0, words="of each engine; 0: it runs on CPUs")
    tensor_parallel_size: int = key(1, words="processes that each engine is cut over, with as many gpus_per_worker")
    threads_per_worker: int = key(0, words="CPU threads of each engine; 0: torch's own choice")
    engine_args: dict[str, Any] = key({}, words="passed to vLLM, engine_args.X=...")
    address: str | None = key(None, words="Ray cluster, host:port; else RAY_ADDRESS, else one of this process")
    output: str | None = key(None, words="JSON file of the results; else beside the model, or under runs/")

    def __post_init__(self) -> None:
        for name in ("num_prompts", "num_samples", "max_prompt_tokens", "max_response_tokens", "num_workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: expected an integer of at least 1")
        size, gpus = self.tensor_parallel_size, self.gpus_per_worker
        if size < 1 or (gpus and gpus < size and size > 1):
            raise ValueError(f"tensor_parallel_size={size}: expected 1 to gpus_per_worker={gpus:g}, a GPU a process")
        if self.temperature <= 0:
            raise ValueError(f"temperature={self.temperature}: expected a number above 0, greedy is measured anyway")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}: expected a number in (0, 1]")
        if self.task is None and self.data is None:
            raise ValueError("task is not given: expected a task, or data=<file> of prompts with answers")
        check_engine_args("engine_args", self.engine_args, path=self.model)
