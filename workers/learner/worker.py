"""One learner rank: updates the student with DeepSpeed from the groups and scores it is given.

transformers and DeepSpeed are imported when a worker is built: the driver needs the class only.
"""

import os
import socket
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from ray.util import get_node_ip_address

from opd_ray.config.schema import LearnerConfig, ObjectiveConfig
from opd_ray.objectives import OBJECTIVES, ObjectiveOptions, TokenLosses
from workers.learner.inputs import ScoredSequence, build_inputs, split_groups
from workers.learner.report import RankBatch, RankReport, Totals
from workers.output_head import load_head
from workers.weights import WeightManifest, plan_manifest, write_tensor


class LearnerWorker:
    """One rank of the data-parallel group. Every method is called on all ranks at once."""

    def __init__(
        self,
        *,
        student_path: str,
        teacher_path: str,
        config: LearnerConfig,
        objective: ObjectiveConfig,
        temperature: float,
        num_steps: int,
    ) -> None:
        self._student_path = student_path
        self._teacher_path = teacher_path
        self._config = config
        self._objective = objective
        self._temperature = temperature
        self._num_steps = num_steps

    def rendezvous(self, *, local: bool) -> tuple[str, int]:
        """Return this rank's address and a free port there, for the process group to meet at."""
        address = "127.0.0.1" if local else get_node_ip_address()
        with socket.socket() as probe:
            probe.bind((address, 0))
            return address, int(probe.getsockname()[1])

    def setup(self, *, rank: int, master_address: str, master_port: int, vocab_size: int) -> None:
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
        if not on_gpu:
            # Its shared-memory all-reduce would be compiled on first use (40 s, needs a compiler); gloo serves as well.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_backend="nccl" if on_gpu else "gloo", verbose=False)
        self._rank = rank
        self._device = torch.device("cuda" if on_gpu else "cpu")
        student = load_student(self._student_path, config=self._config)
        self._engine = build_engine(
            student, config=self._config, world_size=self._config.num_ranks, num_steps=self._num_steps
        )
        self._teacher_head_VD = load_head(self._teacher_path, vocab_size=vocab_size).to(self._device)
        self._losses = OBJECTIVES[self._objective.kind.value].token_losses
        self._options = ObjectiveOptions(
            temperature=self._temperature,
            discount=self._objective.discount,
            vocab_size=vocab_size,
            chunk_tokens=self._objective.chunk_tokens,
        )

    def update(self, batch: RankBatch, *groups_and_scores: Any) -> RankReport:
        """Take one optimizer update on this rank's groups, followed by as many scores."""
        start = time.perf_counter()
        totals = Totals(version=batch.version)
        # DeepSpeed averages gradients over ranks; the loss is a sum over the global batch's tokens.
        scale = self._config.num_ranks / batch.num_loss_tokens
        for losses, micro_batch in self._passes(batch, groups_and_scores, self._losses):
            self._engine.backward(losses.loss_N.sum() * scale)
            totals.add(losses, micro_batch)
        lr = float(self._engine.get_lr()[0])
        self._engine.step()
        return totals.report(
            grad_norm=float(self._engine.get_global_grad_norm() or 0.0),
            lr=lr,
            learn_s=time.perf_counter() - start,
        )

    @torch.no_grad()
    def held_out_kl(self, batch: RankBatch, *groups_and_scores: Any) -> tuple[float, int]:
        """Return the sum of exact KL(student || teacher) in nats over this rank's tokens, and their count."""
        total, num_tokens = 0.0, 0
        for losses, micro_batch in self._passes(batch, groups_and_scores, OBJECTIVES["full"].token_losses):
            total += float(losses.divergence_N.sum())
            num_tokens += sum(int(s.loss_mask.sum()) for s in micro_batch)
        return total, num_tokens

    def publish(self, version: int) -> tuple[WeightManifest | None, npt.NDArray[np.uint8] | None]:
        """Return all weights in one buffer (rank 0; the others help to gather and return nothing)."""
        named = list(self._model.named_parameters())
        shapes = [(name, p.dtype, tuple(getattr(p, "ds_shape", p.shape))) for name, p in named]
        manifest = plan_manifest(shapes, version=version)
        buffer = np.empty(manifest.num_bytes, dtype=np.uint8) if self._rank == 0 else None
        for entry, (_, parameter) in zip(manifest.entries, named, strict=True):
            with self._gathered([parameter]):
                if buffer is not None:
                    write_tensor(buffer, entry, parameter)
        return (manifest, buffer) if buffer is not None else (None, None)

    def save(self, folder: str) -> None:
        """Write this rank's part of a DeepSpeed checkpoint."""
        self._engine.save_checkpoint(folder, tag="deepspeed")

    def restore(self, folder: str) -> None:
        """Load this rank's part of a DeepSpeed checkpoint."""
        loaded, _ = self._engine.load_checkpoint(folder, tag="deepspeed")
        if loaded is None:
            raise ValueError(f"{folder} holds no DeepSpeed checkpoint")

    def export(self, folder: str) -> None:
        """Write the student as a Hugging Face folder (rank 0)."""
        from transformers import AutoTokenizer

        with self._gathered(list(self._model.parameters())):
            if self._rank == 0:
                self._model.save_pretrained(folder, safe_serialization=True)
                AutoTokenizer.from_pretrained(self._student_path).save_pretrained(folder)

    @property
    def _model(self) -> Any:
        return self._engine.module.model

    def _gathered(self, parameters: list[Any]) -> Any:
        import deepspeed

        return deepspeed.zero.GatheredParameters(parameters, enabled=self._config.zero_stage == 3)

    def _passes(
        self, batch: RankBatch, groups_and_scores: Sequence[Any], token_losses: Any
    ) -> Iterator[tuple[TokenLosses, list[ScoredSequence]]]:
        """Run the student over each micro-batch, one at a time."""
        sequences = split_groups(groups_and_scores[: batch.num_groups], groups_and_scores[batch.num_groups :])
        for indices in batch.micro_batches:
            # An empty micro-batch is a sequence without a loss: all ranks make the same number of collective calls.
            micro_batch = [sequences[i] for i in indices] or [sequences[0].without_loss()]
            inputs = build_inputs(micro_batch, device=self._device, teacher_head_VD=self._teacher_head_VD)
            loss_N, divergence_N, sampled_logprobs_N = self._engine(
                **inputs, token_losses=token_losses, options=self._options
            )
            yield (
                TokenLosses(loss_N=loss_N, divergence_N=divergence_N, sampled_logprobs_N=sampled_logprobs_N),
                micro_batch,
            )
