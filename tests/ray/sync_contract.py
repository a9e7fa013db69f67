"""What every way of new weights must keep, on a learner and two rollout workers; each check leaves the stack whole."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from helpers import make_request, reference_logprobs, reference_model, sampled

from opd_ray.config.schema import Config
from opd_ray.protocol import TrajectoryGroup
from opd_ray.requests import ObjectiveIds
from opd_ray.weight_sync import chosen_sync
from workers.fleet import Berth
from workers.learner.fleet import RayLearner
from workers.learner.objective import ObjectiveSetup
from workers.learner.worker import LearnerWorker
from workers.placement import pools, shares_one_gpu
from workers.reservation import reserve
from workers.rollout.fleet import RayRolloutFleet
from workers.rollout.worker import RolloutWorker
from workers.sync.choose import SyncPlan
from workers.sync.deliver import catch_up, deliver

_MAX_GAP = 1e-4  # nats, float32
_SHORT_S = 3.0


class ChangingLearner(LearnerWorker):
    """A learner whose weights can be changed without an update."""

    def disturb(self, seed: int) -> None:
        """Add the same noise to the weights of every rank."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self._model.parameters():
                parameter.add_((torch.randn(parameter.shape, generator=generator) * 0.05).to(parameter))


class FaultyWorker(RolloutWorker):
    """A rollout worker that can take itself for one of another model, and shows what it has prepared."""

    async def mistake_model(self, mistaken: bool) -> None:
        """Know of no tensor, so that every version is another model's; or ask again."""
        self._receiver._shapes = {} if mistaken else None

    async def prepared_flags(self) -> set[tuple[bool, bool]]:
        """Return (owns its data, is writeable) of all buffers that are held."""
        assert self._receiver._prepared is not None
        buffers = self._receiver._prepared[1] or ()
        return {(bool(b.flags.owndata), bool(b.flags.writeable)) for b in buffers}


@dataclass
class Stack:
    """A learner, two rollout workers, and where the learner's weights can be looked at."""

    learner: RayLearner
    rollout: RayRolloutFleet
    folder: Path
    version: int = -1

    def next_version(self) -> Any:
        """Change the weights and publish them."""
        self.version += 1
        ray.get([rank.disturb.remote(self.version) for rank in self.learner._ranks])
        return self.learner.publish(self.version)

    def truth(self) -> torch.nn.Module:
        """Return the learner's weights in plain transformers."""
        self.learner.export(str(self.folder))
        return reference_model(str(self.folder))

    def ask(self, worker: Any, *, version: int) -> Any:
        """Ask one worker for samples; return the reference to its group."""
        request = make_request(1, 2, 3, 4, version=version, seed=version, max_response_tokens=8)
        _, group = worker.generate_all.options(num_returns=2).remote([request], [None])
        return group


@contextmanager
def open_stack(config: Config, folder: Path, *, local: bool) -> Iterator[Stack]:
    """Start the pools, meet, and end them."""
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the actors do not see the tests' folder
    by_role = pools(config)
    shared = shares_one_gpu([by_role["rollout"], by_role["learner"]])
    common = {"log_dir": folder, "num_threads": 1, "local": local, "one_bundle": shared}
    group = reserve([by_role["rollout"], by_role["learner"]], timeout_s=120)
    rollout = RayRolloutFleet(
        model_path=config.student.path,
        config=replace(config.rollout, weight_sync=chosen_sync(config)),
        objective=config.objective,
        max_model_tokens=64,
        berth=Berth(role="rollout", pool=by_role["rollout"], placement_group=group, **common),
        worker_class=FaultyWorker,
    )
    arguments = {
        "student_path": config.student.path,
        "teacher_paths": {},
        "objective": ObjectiveSetup(
            config=config.objective,
            ids=ObjectiveIds(masked=(), equivalent=()),
            temperature=1.0,
            top_p=1.0,
            vocab_size=32,
            loss_weights={},
        ),
        "num_steps": 1,
        "sync": SyncPlan.of(config),
    }
    learner = RayLearner(
        config=config.learner,
        berth=Berth(
            role="learner",
            pool=by_role["learner"],
            placement_group=group,
            first_bundle=0 if shared else len(rollout.workers),
            **common,
        ),
        arguments=arguments,
        worker_class=ChangingLearner,
    )
    try:
        rollout.wait_ready()
        learner.wait_ready()
        learner.connect(rollout.workers)
        yield Stack(learner=learner, rollout=rollout, folder=folder / "export")
    finally:
        rollout.close()
        learner.close()


def check_contract(stack: Stack) -> None:
    """Run every check below, in an order that needs no restart."""
    check_every_worker_samples_with_the_learners_weights(stack)
    check_one_worker_that_cannot_prepare_keeps_all_at_the_old_version(stack)
    check_a_torn_worker_serves_nothing_until_it_has_caught_up(stack)
    check_a_commit_of_what_was_not_prepared_changes_nothing(stack)


def check_every_worker_samples_with_the_learners_weights(stack: Stack) -> None:
    """After each of three versions, all workers."""
    for _ in range(3):
        stack.rollout.load(stack.next_version())
        _assert_serves(stack, stack.rollout.workers)


def check_one_worker_that_cannot_prepare_keeps_all_at_the_old_version(stack: Stack) -> None:
    """The error names the worker; what was served before is served still; the next load reaches all."""
    old, before = stack.version, stack.truth()
    worker = stack.rollout.workers[1]
    ray.get(worker.mistake_model.remote(True))
    with pytest.raises(Exception, match=r"rollout-1(?s:.*)unknown to the model"):
        stack.rollout.load(stack.next_version())
    assert _held(stack) == [old, old]
    for each in stack.rollout.workers:
        _assert_sampled_with(before, ray.get(stack.ask(each, version=old)), version=old)
    ray.get(worker.mistake_model.remote(False))
    stack.rollout.load(stack.next_version())
    _assert_serves(stack, stack.rollout.workers)


def check_a_torn_worker_serves_nothing_until_it_has_caught_up(stack: Stack) -> None:
    """A commit that fails midway, whatever the way: vLLM's engine is told nonsense after its layers were opened."""
    weights = stack.next_version()
    stack.rollout.load(weights)
    worker = stack.rollout.workers[1]
    ray.get(worker.prepare.remote(weights.manifest, weights.buffer))
    with pytest.raises(Exception, match="nonsense"):
        ray.get(worker.commit.remote(stack.version, {"nonsense": 0}))
    assert _held(stack) == [stack.version, -1]
    waiting = stack.ask(worker, version=stack.version)
    assert ray.wait([waiting], timeout=_SHORT_S)[0] == []
    assert stack.rollout.catch_up() == 1
    assert stack.rollout.catch_up() == 0
    _assert_sampled_with(stack.truth(), ray.get(waiting), version=stack.version)
    _assert_serves(stack, stack.rollout.workers)


def check_a_commit_of_what_was_not_prepared_changes_nothing(stack: Stack) -> None:
    """Neither of no version nor of another one."""
    with pytest.raises(Exception, match=f"version {stack.version + 1} cannot be committed: prepared is None"):
        ray.get(stack.rollout.workers[0].commit.remote(stack.version + 1))
    _assert_serves(stack, stack.rollout.workers)


def check_a_worker_that_missed_a_version_waits_for_it(stack: Stack) -> None:
    """Where each worker takes its own bytes: one is left out, is asked for the version, and catches up."""
    first, second = stack.rollout.workers
    weights = stack.next_version()
    deliver([first], weights)
    assert _held(stack) == [stack.version, stack.version - 1]
    waiting = stack.ask(second, version=stack.version)
    _assert_serves(stack, [first])
    assert ray.wait([waiting], timeout=_SHORT_S)[0] == []
    assert catch_up([first, second], weights) == 1
    _assert_sampled_with(stack.truth(), ray.get(waiting), version=stack.version)


def check_workers_read_the_object_store_in_place(stack: Stack) -> None:
    """What a worker has prepared is Ray's own memory, read-only."""
    weights = stack.next_version()
    worker = stack.rollout.workers[0]
    ray.get(worker.prepare.remote(weights.manifest, weights.buffer))
    assert ray.get(worker.prepared_flags.remote()) == {(False, False)}
    stack.rollout.load(weights)


def _held(stack: Stack) -> list[int]:
    versions: list[int] = ray.get([worker.held_version.remote() for worker in stack.rollout.workers])
    return versions


def _assert_serves(stack: Stack, workers: Sequence[Any]) -> None:
    truth = stack.truth()
    for group in ray.get([stack.ask(worker, version=stack.version) for worker in workers]):
        _assert_sampled_with(truth, group, version=stack.version)


def _assert_sampled_with(truth: torch.nn.Module, group: TrajectoryGroup, *, version: int) -> None:
    expected = sampled(reference_logprobs(truth, group), group).detach().numpy()
    gap = float(np.abs(group.sampled_logprobs - expected).max())
    assert gap < _MAX_GAP, gap
    assert (group.token_versions == version).all()
