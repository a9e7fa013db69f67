"""The learner's ranks as one learner: splits a batch over ranks from its summaries, each rank reads only its own."""

import time
from collections.abc import Sequence
from typing import Any

import torch

from opd_ray.comparison import Comparison, joined
from opd_ray.config.schema import LearnerConfig, SkippedPolicy
from opd_ray.data.models import hidden_size
from opd_ray.data.packing import micro_batches_by_kind, partition, split_to, training_cost
from opd_ray.protocol import Batch, CannotGoOn, GroupSummary, Metrics, ScoreSummary, WeightBundle
from workers.fleet import Berth, kill, spawn
from workers.health import LearnerOutOfMemory
from workers.learner.report import RankBatch, combine_updates, estimate_name, teacher_metrics
from workers.learner.worker import LearnerWorker
from workers.sync.choose import SyncPlan
from workers.waiting import answers


class MustRollBack(RuntimeError):
    """The learner left out too many steps in a row, and the run is to go back to before them and take other prompts.

    first and last: the updates of the batches that it could not learn from.
    """

    def __init__(self, words: str, *, first: int, last: int) -> None:
        super().__init__(words)
        self.first = first
        self.last = last


class RayLearner:
    """`Learner` on Ray actors, one a DeepSpeed rank."""

    def __init__(
        self,
        *,
        config: LearnerConfig,
        berth: Berth,
        arguments: dict[str, Any],
        async_save: bool = False,
        worker_class: type = LearnerWorker,
    ) -> None:
        self._config = config
        self._hidden_size = hidden_size(arguments["student_path"])
        self._objective = arguments["objective"].config
        self._ranks = spawn(worker_class, berth=berth, arguments={"config": config, **arguments}, concurrent=False)
        self._set_up = self._start_ranks(local=berth.local)
        self._sync: SyncPlan = arguments["sync"]
        self._local = berth.local
        self._async_save = async_save
        self._version = 0
        self._num_left_out = 0  # batches in a row

    def wait_ready(self) -> None:
        """Block until every rank has its engine."""
        answers(self._set_up)

    @property
    def version(self) -> int:
        """Return the version last published."""
        return self._version

    @property
    def ranks(self) -> Sequence[Any]:
        """Return the actors."""
        return self._ranks

    def update(self, batch: Batch) -> Metrics:
        """Wait for the batch's last score, then take `learner.updates_per_batch` optimizer steps on all ranks."""
        summaries: list[GroupSummary] = answers([g.summary for g in batch.groups])
        scored: list[ScoreSummary] = answers([s.summary for s in batch.scores])
        ready = time.perf_counter()
        parts = [
            self._split(batch, summaries, positions=positions, part=part)
            for part, positions in enumerate(batch_parts(len(batch.groups), self._config.updates_per_batch))
        ]
        # A rank takes its calls in order, so that no part waits here for the one before it.
        updates = [[rank.update.remote(rank_batch, *refs) for rank, rank_batch, refs in shares] for shares in parts]
        try:
            reports = [answers(of_part) for of_part in updates]
        except torch.OutOfMemoryError as fault:  # Ray raises what a rank raised, as that too
            raise LearnerOutOfMemory(["a learner rank, out of memory"], cause=fault) from fault
        learned = combine_updates(reports, estimate=estimate_name(self._objective))
        self._count_left_out(learned, step=batch.step)
        return {
            **learned,
            **teacher_metrics(scored),
            "time/update_s": time.perf_counter() - ready,
        }

    def release_memory(self) -> None:
        """Have every rank give the GPU's memory that it does not use back."""
        answers([rank.release_memory.remote() for rank in self._ranks])

    def compare(self, batch: Batch) -> Comparison:
        """Return how the student stands to the teacher at the batch's tokens."""
        summaries: list[GroupSummary] = answers([g.summary for g in batch.groups])
        shares = self._split(batch, summaries, positions=range(len(batch.groups)), part=0)
        return joined(answers([rank.compare.remote(rank_batch, *refs) for rank, rank_batch, refs in shares]))

    def publish(self, version: int) -> WeightBundle:
        """Start gathering the weights of all ranks; the references resolve when they are in the object store."""
        pairs = [rank.publish.options(num_returns=2).remote(version) for rank in self._ranks]
        manifest, buffer = pairs[0]
        self._version = version
        senders = tuple(self._ranks) if self._sync.sends else ()
        return WeightBundle(version=version, manifest=manifest, buffer=buffer, senders=senders)

    def connect(self, workers: Sequence[Any]) -> None:
        """Have the ranks meet the rollout workers, where they write into them; blocks until they have."""
        if self._sync.sends:
            address, port = answers(self._ranks[0].rendezvous.remote(local=self._local))
            answers([rank.connect.remote(workers, address, port) for rank in self._ranks])

    def save(self, folder: str) -> None:
        """Write a checkpoint of all ranks; with `async_save` copy it, for `wait_saved` to wait for."""
        answers([rank.save.remote(folder, in_background=self._async_save) for rank in self._ranks])

    def wait_saved(self) -> None:
        """Wait until the last checkpoint is written. Raises OSError when it cannot be; any thread may call it."""
        answers([rank.wait_saved.remote() for rank in self._ranks])

    def restore(self, folder: str) -> None:
        """Load a checkpoint of all ranks."""
        answers([rank.restore.remote(folder) for rank in self._ranks])

    def export(self, folder: str) -> None:
        """Write the student as a Hugging Face folder."""
        answers([rank.export.remote(folder) for rank in self._ranks])

    def close(self) -> None:
        """End the ranks."""
        kill(self._ranks)

    def _start_ranks(self, *, local: bool) -> list[Any]:
        address, port = answers(self._ranks[0].rendezvous.remote(local=local))
        return [
            rank.setup.remote(rank=index, master_address=address, master_port=port)
            for index, rank in enumerate(self._ranks)
        ]

    def _count_left_out(self, learned: Metrics, *, step: int) -> None:
        """Raise CannotGoOn or MustRollBack when steps were left out in too many batches in a row."""
        self._num_left_out = self._num_left_out + 1 if learned["fault/skipped_steps"] else 0
        allowed = self._config.max_skipped_steps
        if self._num_left_out <= allowed:
            return
        fault = "spiked" if learned["fault/spikes"] else "were not finite"
        words = f"update {step + 1}: gradients {fault}; updates in a row whose step was left out: {self._num_left_out}"
        if self._config.on_skipped_steps is SkippedPolicy.rollback:
            raise MustRollBack(words, first=step + 1 - self._num_left_out, last=step)
        raise CannotGoOn(f"{words}; learner.max_skipped_steps={allowed} are allowed. A lower learner.lr may help")

    def _split(
        self, batch: Batch, summaries: Sequence[GroupSummary], *, positions: Sequence[int], part: int
    ) -> list[tuple[Any, RankBatch, list[Any]]]:
        """Return each rank with its share of the groups at some positions of the batch, part number `part` of it.

        The share is what to do, and the references to its groups and their scores.
        """
        groups, scores = [batch.groups[i] for i in positions], [batch.scores[i] for i in positions]
        several_tasks = len({summary.task for summary in summaries}) > 1
        shares = rank_batches(
            [summaries[i] for i in positions],
            teachers=[score.teacher for score in scores],
            num_ranks=len(self._ranks),
            max_tokens=self._config.max_tokens_per_micro_batch,
            padded=not self._config.packing,
            hidden_size=self._hidden_size,
            version=batch.step,
            part=part,
            tasks_apart=several_tasks and self._config.gradient_noise,
        )
        return [
            (rank, rank_batch, [groups[i].group for i in share] + [scores[i].score for i in share])
            for rank, (share, rank_batch) in zip(self._ranks, shares, strict=True)
        ]


def batch_parts(num_groups: int, num_parts: int) -> list[range]:
    """Return which positions of a batch each of its updates learns from.

    In turn: a mixed batch has its tasks one after the other, and every part is to have a share of each.
    """
    return [range(part, num_groups, num_parts) for part in range(num_parts)]


def rank_batches(  # noqa: PLR0913 - what the cut depends on
    summaries: Sequence[GroupSummary],
    *,
    teachers: Sequence[str],
    num_ranks: int,
    max_tokens: int,
    padded: bool,
    hidden_size: int,
    version: int,
    part: int = 0,
    tasks_apart: bool = False,
) -> list[tuple[list[int], RankBatch]]:
    """Return for each rank the groups of its share, as positions, and what to do with them.

    teachers names the one that scored each group: sequences of different teachers share no micro-batch, with
    tasks_apart those of different tasks neither. hidden_size is the student's: it tells how much dearer the tokens of
    long sequences are. An evaluation that left groups out may have fewer than ranks; a rank without any reads the
    first one in empty micro-batches, since all ranks make as many collective calls.
    """
    lengths = [[s.num_prompt_tokens + n for n in s.response_lengths] for s in summaries]
    costs = [sum(training_cost(n, hidden_size=hidden_size) for n in of_group) for of_group in lengths]
    shares = partition(costs, num_ranks)
    flat = [[n for i in share for n in lengths[i]] for share in shares]
    of_groups = [f"{t} {s.task}" if tasks_apart else t for t, s in zip(teachers, summaries, strict=True)]
    kinds = [[of_groups[i] for i in share for _ in lengths[i]] for share in shares]
    cuts = [
        micro_batches_by_kind(*of_rank, max_tokens=max_tokens, padded=padded)
        for of_rank in zip(flat, kinds, strict=True)
    ]
    most = max(map(len, cuts))
    cuts = [split_to(cut, of_rank, num_cuts=most) for cut, of_rank in zip(cuts, flat, strict=True)]
    return [
        (
            share or [0],
            RankBatch(
                version=version,
                part=part,
                teachers=tuple(teachers[i] for i in share or [0]),
                micro_batches=tuple(map(tuple, cut)) + ((),) * (most - len(cut)),
                tasks_apart=tasks_apart,
            ),
        )
        for share, cut in zip(shares, cuts, strict=True)
    ]
