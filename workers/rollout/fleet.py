"""The pool of rollout workers: deals requests out, hands references on."""

import time
from collections.abc import Sequence
from typing import Any

import ray

from opd_ray.config.objective import ObjectiveConfig
from opd_ray.config.schema import RolloutConfig
from opd_ray.config.student import LoraConfig
from opd_ray.protocol import GenerateRequest, GroupHandle, GroupSummary, Metrics, WeightBundle
from workers.fleet import Berth, kill, spawn
from workers.rollout.worker import RolloutWorker, logprob_args


class RayRolloutFleet:
    """`RolloutFleet` on Ray actors."""

    def __init__(  # noqa: PLR0913 - what an engine is built from
        self,
        *,
        model_path: str,
        config: RolloutConfig,
        objective: ObjectiveConfig,
        max_model_tokens: int,
        berth: Berth,
        lora: LoraConfig | None = None,
        worker_class: type = RolloutWorker,
    ) -> None:
        arguments = {
            "model_path": model_path,
            "config": config,
            "max_model_tokens": max_model_tokens,
            "logprob_args": logprob_args(config, objective),
            "lora": lora,
        }
        self._workers = spawn(worker_class, berth=berth, arguments=arguments, concurrent=True)
        self._num_dealt = 0

    def wait_ready(self) -> None:
        """Block until every engine is built."""
        ray.get([worker.ready.remote() for worker in self._workers])

    def generate(self, requests: Sequence[GenerateRequest]) -> list[GroupHandle]:
        """Dispatch requests to the workers in turn; return at once."""
        return [self._generate(request) for request in requests]

    def load(self, weights: WeightBundle) -> Metrics:
        """Give every worker a new version; blocks until all hold it."""
        start = time.perf_counter()
        seconds = ray.get([worker.load.remote(weights.manifest, weights.buffer) for worker in self._workers])
        return {"time/publish_s": time.perf_counter() - start, "time/load_s": max(seconds)}

    def summaries(self, groups: Sequence[GroupHandle]) -> list[GroupSummary]:
        """Wait for groups and return their summaries, in order."""
        summaries: list[GroupSummary] = ray.get([group.summary for group in groups])
        return summaries

    def close(self) -> None:
        """End the workers."""
        kill(self._workers)

    def _generate(self, request: GenerateRequest) -> GroupHandle:
        worker: Any = self._workers[self._num_dealt % len(self._workers)]
        self._num_dealt += 1
        summary, group = worker.generate.options(num_returns=2).remote(request)
        return GroupHandle(task=request.prompt.task, summary=summary, group=group)
