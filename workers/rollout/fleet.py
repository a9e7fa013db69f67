"""The pool of rollout workers: deals requests out, hands references on."""

import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import ray

from opd_ray.config.objective import ObjectiveConfig
from opd_ray.config.schema import RolloutConfig
from opd_ray.config.student import LoraConfig
from opd_ray.protocol import GenerateRequest, GroupHandle, GroupSummary, Metrics, WeightBundle
from workers.fleet import Berth, in_calls, kill, spawn
from workers.rollout.turns import Turn
from workers.rollout.worker import RolloutWorker, logprob_args
from workers.sync.deliver import catch_up, deliver
from workers.sync.receiver import NotPreparedError
from workers.waiting import answers, finished


class RayRolloutFleet:
    """`RolloutFleet` on Ray actors."""

    def __init__(  # noqa: PLR0913 - what a pool of engines depends on
        self,
        *,
        model_path: str,
        config: RolloutConfig,
        objective: ObjectiveConfig,
        max_model_tokens: int,
        berth: Berth,
        deterministic: bool = False,
        lora: LoraConfig | None = None,
        max_restarts: int = 0,
        worker_class: type = RolloutWorker,
    ) -> None:
        """max_restarts: how often each worker is started anew; only where nothing but weights is lost with it."""
        arguments = {
            "model_path": model_path,
            "config": config,
            "max_model_tokens": max_model_tokens,
            "logprob_args": logprob_args(config, objective),
            "lora": lora,
        }
        self._workers = spawn(
            worker_class, berth=berth, arguments=arguments, concurrent=True, max_restarts=max_restarts
        )
        self._deterministic = deterministic
        self._groups_per_call = config.groups_per_call
        self._unfinished: list[list[Any]] = [[] for _ in self._workers]  # summaries of each worker's groups
        self._num_turns = [0] * len(self._workers)
        self._weights: WeightBundle | None = None  # the last version, for workers that miss it
        self._loading = threading.Lock()

    @property
    def workers(self) -> Sequence[Any]:
        """Return the actors, for a learner that writes into them."""
        return self._workers

    def wait_ready(self) -> None:
        """Block until every engine is built."""
        answers([worker.ready.remote() for worker in self._workers])

    def generate(self, requests: Sequence[GenerateRequest]) -> list[GroupHandle]:
        """Dispatch requests; return at once. Each goes to the worker with the fewest unfinished sequences.

        Deterministic: to the workers in turn, one round for each.
        """
        if self._deterministic:
            return self._generate_in_turn(requests)
        self._unfinished = [_unfinished(refs) for refs in self._unfinished]
        handles: list[GroupHandle] = []
        for of_call in in_calls(requests, self._groups_per_call, num_workers=len(self._workers)):
            loads = [len(refs) for refs in self._unfinished]
            index = loads.index(min(loads))
            of_worker = self._generate(index, of_call, [None] * len(of_call))
            self._unfinished[index] += [handle.summary for handle in of_worker]
            handles += of_worker
        return handles

    def load(self, weights: WeightBundle) -> Metrics:
        """Give every worker a new version, or none when one cannot take it; blocks until all hold it."""
        start = time.perf_counter()
        turns = [self._next_turn(index) for index in range(len(self._workers))] if self._deterministic else None
        with self._loading:
            try:
                seconds = deliver(self._workers, weights, turns)
            except NotPreparedError:  # one was started anew in between
                catch_up(self._workers, weights)
                seconds = time.perf_counter() - start
            self._weights = weights
        return {"time/publish_s": time.perf_counter() - start, "time/load_s": seconds}

    def catch_up(self) -> int:
        """Give the last version to workers that do not hold it; return how many that were. Any thread may call it."""
        with self._loading:
            return 0 if self._weights is None else catch_up(self._workers, self._weights)

    def summaries(self, groups: Sequence[GroupHandle]) -> list[GroupSummary]:
        """Wait for groups and return their summaries, in order."""
        summaries: list[GroupSummary] = answers([group.summary for group in groups])
        return summaries

    def first(self, groups: Sequence[GroupHandle], *, num_groups: int) -> list[int]:
        """Wait until as many groups are finished and return their positions, ascending."""
        if num_groups <= 0:
            return []
        refs = [group.summary for group in groups]
        return sorted(map(refs.index, finished(refs, num_refs=num_groups)))

    def sleep(self) -> None:
        """Have every worker give its GPU's memory back; all that was asked must be answered."""
        answers([worker.sleep.remote() for worker in self._workers])

    def wake(self) -> None:
        """Have every worker take its memory again; they serve once a version is loaded."""
        answers([worker.wake.remote() for worker in self._workers])

    def close(self) -> None:
        """End the workers."""
        kill(self._workers)

    def _generate_in_turn(self, requests: Sequence[GenerateRequest]) -> list[GroupHandle]:
        num_workers = len(self._workers)
        rounds = [
            self._next_turn(i, size=len(requests[i::num_workers])) for i in range(min(num_workers, len(requests)))
        ]
        return [
            handle
            for i, request in enumerate(requests)
            for handle in self._generate(
                i % num_workers, [request], [replace(rounds[i % num_workers], index=i // num_workers)]
            )
        ]

    def _generate(
        self, index: int, requests: Sequence[GenerateRequest], turns: Sequence[Turn | None]
    ) -> list[GroupHandle]:
        call = self._workers[index].generate_all.options(num_returns=2 * len(requests))
        refs = call.remote(requests, turns)
        return [
            GroupHandle(request=request, summary=summary, group=group)
            for request, summary, group in zip(requests, refs[::2], refs[1::2], strict=True)
        ]

    def _next_turn(self, index: int, *, size: int = 1) -> Turn:
        self._num_turns[index] += 1
        return Turn(number=self._num_turns[index] - 1, size=size)


def _unfinished(refs: list[Any]) -> list[Any]:
    if not refs:
        return []
    _, unfinished = ray.wait(refs, num_returns=len(refs), timeout=0, fetch_local=False)
    return list(unfinished)
