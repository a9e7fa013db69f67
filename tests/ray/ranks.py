"""Learner ranks in processes of their own, without Ray: a script of a test runs in each and sees the worker's parts."""

import socket
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from multiprocessing import get_context
from typing import Any, TypeVar

import pytest
import torch
from helpers import compose_config
from learners import EPS, GROUPS, learner_arguments_of, summary_of

from opd_ray.config.schema import Config
from opd_ray.config.student import LoraConfig
from opd_ray.config.validate import validate
from opd_ray.protocol import Score, TrajectoryGroup
from workers.learner.fleet import rank_batches
from workers.learner.report import RankReport
from workers.learner.worker import LearnerWorker
from workers.weights import read_tensors

_DEADLINE_S = 180
_Result = TypeVar("_Result")
Tensors = dict[str, torch.Tensor]


class Rank:
    """What a script is given: how to open a worker of this rank, and its share of a batch."""

    def __init__(self, config: Config, *, index: int, port: int) -> None:
        self.config = config
        self._index = index
        self._port = port

    def open(self) -> LearnerWorker:
        """Return a new worker, its student as it was loaded."""
        worker = LearnerWorker(config=self.config.learner, **learner_arguments_of(self.config))
        worker.setup(rank=self._index, master_address="127.0.0.1", master_port=self._port)
        return worker

    def update(
        self,
        worker: LearnerWorker,
        scores: Sequence[Score],
        groups: Sequence[TrajectoryGroup] = GROUPS,
        *,
        version: int = 0,
    ) -> RankReport:
        """Take one update on this rank's share of the groups."""
        learner = self.config.learner
        share, batch = rank_batches(
            [summary_of(group) for group in groups],
            teachers=["teacher"] * len(groups),
            num_ranks=learner.num_ranks,
            max_tokens=learner.max_tokens_per_micro_batch,
            padded=not learner.packing,
            hidden_size=64,
            version=version,
        )[self._index]
        return worker.update(batch, *(groups[i] for i in share), *(scores[i] for i in share))


class Ranks:
    """As many processes as there are ranks; each keeps what it has imported from one script to the next."""

    def __init__(self, processes: Sequence[ProcessPoolExecutor]) -> None:
        self._processes = processes
        self._port = _free_port()

    def run(self, script: Callable[..., _Result], config: Config, *arguments: Any) -> _Result:
        """Run a script on all ranks; return what rank 0 returns."""
        futures = [
            process.submit(_run, script, Rank(config, index=index, port=self._port), arguments)
            for index, process in enumerate(self._processes)
        ]
        first, *_ = [future.result(timeout=_DEADLINE_S) for future in futures]
        return first


def rank_config(*, student: str, teacher: str, lora: LoraConfig | None = None, **learner: Any) -> Config:
    """Return a validated configuration of a float32 learner whose first step of AdamW is nearly the gradient."""
    config = compose_config(
        [
            *("name=test", "num_steps=8", "tracking=none", "cluster=local", "data.task=sort", "objective=full"),
            *(f"student.path={student}", f"teacher.path={teacher}", "batch.num_prompts=4"),
            *("data.max_prompt_tokens=8", "rollout.max_response_tokens=8", "learner.max_tokens_per_micro_batch=16"),
        ]
    )
    learner = {"lr": 1.0, "engine_args": {"optimizer": {"params": {"eps": EPS}}}} | learner
    config.learner = replace(config.learner, **learner)
    config.student.lora = lora or config.student.lora
    validate(config)
    return config


@contextmanager
def open_ranks(num_ranks: int) -> Iterator[Ranks]:
    """Start the processes, and end them on leaving."""
    with ExitStack() as stack:
        spawned = [ProcessPoolExecutor(1, mp_context=get_context("spawn")) for _ in range(num_ranks)]
        yield Ranks([stack.enter_context(process) for process in spawned])
        for left in [process.submit(_leave) for process in spawned]:
            left.result(timeout=_DEADLINE_S)


@pytest.fixture(scope="session")
def ranks() -> Iterator[dict[int, Ranks]]:
    """Return the processes of a learner by its number of ranks; they start with the first script."""
    with open_ranks(1) as alone, open_ranks(2) as pair:
        yield {1: alone, 2: pair}


def published_tensors(worker: LearnerWorker, version: int = 0) -> Tensors:
    """Return what a worker publishes; of a rank that only helps to gather nothing."""
    manifest, buffers = worker.publish(version)
    if manifest is None or buffers is None:
        return {}
    return {name: tensor.clone() for name, tensor in read_tensors(buffers, manifest)}


def _run(script: Callable[..., _Result], rank: Rank, arguments: Sequence[Any]) -> _Result:
    torch.set_num_threads(1)
    return script(rank, *arguments)


def _leave() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
