"""One learner rank: updates the student with DeepSpeed from the groups and scores it is given.

transformers and DeepSpeed are imported when a worker is built: the driver needs the class only.
"""

import gc
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from datetime import timedelta
from functools import cached_property
from typing import Any

import torch
from ray.util import get_node_ip_address

from opd_ray.comparison import MAX_POINTS, Comparison
from opd_ray.config.schema import LearnerConfig
from opd_ray.config.student import LoraConfig
from opd_ray.data.lora import adapter_parameters
from opd_ray.objectives import Losses, ObjectiveOptions
from opd_ray.protocol import HiddenScore
from workers.fault_plan import Phase, reach
from workers.learner.comparison import Comparer, stride_of, texts_of_tokens
from workers.learner.guard import StepGuard
from workers.learner.inputs import InputBuilder, ScoredSequence, split_groups
from workers.learner.noise import GradientSquares
from workers.learner.objective import ObjectiveSetup, TokenPlanner, objective_options, removed_ids, sampled_tokens
from workers.learner.report import RankBatch, RankReport, Totals
from workers.learner.saving import TAG, EngineSaver
from workers.learner.task_gradients import TaskGradients
from workers.output_head import load_head
from workers.sync.backend import Publication
from workers.sync.choose import SyncPlan, open_publisher
from workers.weights import LoraSpec


class LearnerWorker:
    """One rank of the data-parallel group. Every method is called on all ranks at once."""

    def __init__(  # noqa: PLR0913 - what a rank is built from
        self,
        *,
        student_path: str,
        teacher_paths: Mapping[str, str],
        config: LearnerConfig,
        objective: ObjectiveSetup,
        num_steps: int,
        sync: SyncPlan,
        deterministic: bool = False,
        lora: LoraConfig | None = None,
        collective_timeout_s: float = 1800.0,
    ) -> None:
        self._deterministic = deterministic
        self._student_path = student_path
        self._lora = lora
        self._teacher_paths = teacher_paths
        self._config = config
        self._objective = objective
        self._num_steps = num_steps
        self._sync = sync
        self._collective_timeout = timedelta(seconds=collective_timeout_s)

    def rendezvous(self, *, local: bool) -> tuple[str, int]:
        """Return this rank's address and a free port there, for the process group to meet at."""
        address = "127.0.0.1" if local else get_node_ip_address()
        with socket.socket() as probe:
            probe.bind((address, 0))
            return address, int(probe.getsockname()[1])

    def setup(self, *, rank: int, master_address: str, master_port: int) -> None:
        """Join the process group and put the student under DeepSpeed."""
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK="0",
            WORLD_SIZE=str(self._config.num_ranks),
            MASTER_ADDR=master_address,
            MASTER_PORT=str(master_port),
        )
        import deepspeed

        from workers.learner.student import build_engine, load_student

        on_gpu = self._config.gpus_per_rank > 0
        if self._deterministic:
            os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # which torch asks for
            torch.use_deterministic_algorithms(True)
            torch.utils.deterministic.fill_uninitialized_memory = False  # finds mistakes, at several times the cost
        if not on_gpu:
            # Its shared-memory all-reduce would be compiled on first use (40 s, needs a compiler); gloo serves as well.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(
            dist_backend="nccl" if on_gpu else "gloo", verbose=False, timeout=self._collective_timeout
        )
        self._rank = rank
        self._device = torch.device("cuda" if on_gpu else "cpu")
        student = load_student(self._student_path, config=self._config, lora=self._lora)
        self._engine = build_engine(
            student, config=self._config, world_size=self._config.num_ranks, num_steps=self._num_steps
        )
        self._guard = StepGuard(self._engine, spike_factor=self._config.spike_factor)
        self._saver = EngineSaver(self._engine, exclude_frozen=self._lora is not None)
        self._planner = TokenPlanner(self._objective, tokenizer=self._tokenizer())
        self._inputs = InputBuilder(
            device=self._device,
            teacher_heads={
                name: load_head(path, vocab_size=self._objective.vocab_size).to(self._device)
                for name, path in self._teacher_paths.items()
            },
            removed_ids=removed_ids(self._objective),
            packing=self._config.packing,
        )
        self._options = objective_options(self._objective)
        self._squares = GradientSquares(self._engine.module) if self._config.gradient_noise else None
        self._task_gradients = TaskGradients(self._engine.module) if self._config.gradient_noise else None
        self._publisher = open_publisher(
            self._model,
            plan=self._sync,
            rank=rank,
            partitioned=self._config.zero_stage == 3,
            num_updates=lambda: self._engine.global_steps,
            lora=LoraSpec(rank=self._lora.rank, alpha=self._lora.alpha) if self._lora is not None else None,
        )

    def update(self, batch: RankBatch, *groups_and_scores: Any) -> RankReport:
        """Take one optimizer step on this rank's groups, followed by as many scores."""
        start = time.perf_counter()
        totals = Totals(version=batch.version, part=batch.part)
        groups, scores = groups_and_scores[: batch.num_groups], groups_and_scores[batch.num_groups :]
        plan = self._planner.plan(groups, scores)
        sequences = split_groups(groups, scores, plan, teachers=batch.teachers)
        # DeepSpeed averages gradients over ranks; the loss is a sum over the global batch's tokens.
        scale = self._config.num_ranks / max(self._global_sum(plan.denominator), 1.0)
        options = replace(self._options, diagnostic_tokens=self._objective.config.diagnostic_tokens)
        for indices in batch.micro_batches:
            micro_batch = self._micro_batch(sequences, indices)
            losses = self._forward(micro_batch, objective=self._objective.config.kind.value, options=options)
            if self._task_gradients:
                self._task_gradients.begin(micro_batch[0].task if batch.tasks_apart else "")
            self._engine.backward(losses.loss * (scale * reach(Phase.backward, step=batch.version)))
            totals.add(losses, micro_batch)
            options = self._options  # the first micro-batch has given the diagnostics
        reach(Phase.optimize, step=batch.version)
        lr = float(self._engine.get_lr()[0])
        self._guard.step()
        report = totals.report(
            denominator=plan.denominator,
            grad_norm=self._guard.norm,
            lr=lr,
            learn_s=time.perf_counter() - start,
            gradient_squares=self._squares.take() if self._squares else 0.0,
            num_micro_batches=sum(map(bool, batch.micro_batches)),
        )
        of_tasks = self._task_gradients.take() if self._task_gradients else {}
        return replace(report, left_out=self._guard.left_out, spiked=self._guard.spiked, task_gradients=of_tasks)

    def release_memory(self) -> None:
        """Give what torch keeps of the GPU's memory for later back to the GPU."""
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    @torch.no_grad()
    def compare(self, batch: RankBatch, *groups_and_scores: Any) -> Comparison:
        """Return how the student stands to the teacher at this rank's tokens: KL(student || teacher) and more.

        Exact where the teacher gave hidden states; else by log p - log q of the sampled tokens, unbiased but noisy.
        """
        groups, scores = groups_and_scores[: batch.num_groups], groups_and_scores[batch.num_groups :]
        sequences = split_groups(groups, scores, sampled_tokens(groups, scores), teachers=batch.teachers)
        objective = "comparison" if isinstance(scores[0], HiddenScore) else "sampled"
        options = ObjectiveOptions(
            temperature=self._objective.temperature,
            vocab_size=self._objective.vocab_size,
            chunk_tokens=self._options.chunk_tokens,
        )
        num_tokens = sum(int(s.kept.sum()) for s in sequences)
        comparer = Comparer(
            stride=stride_of(num_tokens, max_points=MAX_POINTS // self._config.num_ranks),
            text_of=self._tokenizer().decode,
            text_of_token=self._text_of_token,
        )
        for indices in batch.micro_batches:
            micro_batch = self._micro_batch(sequences, indices)
            comparer.add(self._forward(micro_batch, objective=objective, options=options), micro_batch)
        return comparer.result()

    def connect(self, workers: Sequence[Any], address: str, port: int) -> None:
        """Meet the rollout workers, where weights do not travel through the object store."""
        self._publisher.connect(workers, address=address, port=port)

    def publish(self, version: int) -> Publication:
        """Give the current weights a version (rank 0; the others help to gather and return nothing)."""
        reach(Phase.publish, step=version)
        return self._publisher.publish(version)

    def send(self, version: int) -> None:
        """Write the published version into the rollout workers, who have prepared it."""
        self._publisher.send(version)

    def store(self, version: int) -> Publication:
        """Return the version last published with its bytes, for a rollout worker that missed it."""
        return self._publisher.store(version)

    def save(self, folder: str, *, in_background: bool = False) -> None:
        """Write this rank's part of a checkpoint; weights under adapters never change and are left out.

        in_background: return once it is copied; `wait_saved` waits for the rest.
        """
        self._saver.save(folder, in_background=in_background, client_state=self._guard.state)

    def wait_saved(self) -> None:
        """Wait until everything is written. Raises OSError for what could not be."""
        self._saver.wait()

    def restore(self, folder: str) -> None:
        """Load this rank's part of a DeepSpeed checkpoint."""
        loaded, client_state = self._engine.load_checkpoint(folder, tag=TAG, load_module_strict=self._lora is None)
        if loaded is None:
            raise ValueError(f"{folder} holds no DeepSpeed checkpoint")
        self._guard.restore(client_state)

    def export(self, folder: str) -> None:
        """Write the student as a Hugging Face folder (rank 0); adapters merged in, and by themselves in `adapter`."""
        named = self._model.named_parameters() if self._lora is None else adapter_parameters(self._model)
        with self._gathered([parameter for _, parameter in named]):
            if self._rank == 0:
                self._save_model(folder)
                self._tokenizer().save_pretrained(folder)

    def _save_model(self, folder: str) -> None:
        from workers.learner.adapters import export_merged

        if self._lora is None:
            self._model.save_pretrained(folder, safe_serialization=True)
        else:
            dtype = getattr(torch, self._config.dtype.value)
            export_merged(self._model, base_path=self._student_path, folder=folder, dtype=dtype)

    @property
    def _model(self) -> Any:
        return self._engine.module.model

    def _gathered(self, parameters: list[Any]) -> Any:
        import deepspeed

        return deepspeed.zero.GatheredParameters(parameters, enabled=self._config.zero_stage == 3)

    def _micro_batch(self, sequences: Sequence[ScoredSequence], indices: Sequence[int]) -> list[ScoredSequence]:
        """Return the named sequences; for none, one without a loss: all ranks make as many collective calls."""
        return [sequences[i] for i in indices] or [sequences[0].without_loss()]

    def _forward(self, micro_batch: Sequence[ScoredSequence], *, objective: str, options: ObjectiveOptions) -> Losses:
        return Losses(
            **dict(
                zip(
                    (field.name for field in fields(Losses)),
                    self._engine(**self._inputs.build(micro_batch), objective=objective, options=options),
                    strict=True,
                )
            )
        )

    def _global_sum(self, value: float) -> float:
        total = torch.tensor(value, dtype=torch.float64, device=self._device)
        torch.distributed.all_reduce(total)
        return float(total)

    @cached_property
    def _text_of_token(self) -> Callable[[int], str]:
        return texts_of_tokens(self._tokenizer())

    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self._student_path, trust_remote_code=False)
