"""One teacher worker: a vLLM pooling engine that gives exact final hidden states, and the head applied to them."""

import asyncio
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from opd_ray.config.schema import TeacherConfig
from opd_ray.objectives.equivalence import Equivalence
from opd_ray.protocol import (
    Float32,
    HiddenScore,
    Int32,
    Payload,
    SampledScore,
    Score,
    ScoreRequest,
    ScoreSummary,
    SupportScore,
    TrajectoryGroup,
)
from workers.engine_loop import EngineLoop
from workers.output_head import load_head
from workers.teacher.head import TeacherHead


class TeacherWorker:
    """Serves `score` calls concurrently; one prefill a sequence, no token is generated."""

    def __init__(
        self,
        *,
        config: TeacherConfig,
        max_model_tokens: int,
        vocab_size: int,
        temperature: float,
        equivalent_ids: Sequence[Sequence[int]],
    ) -> None:
        from vllm.config import PoolerConfig
        from vllm.engine.arg_utils import EngineArgs
        from vllm.pooling_params import PoolingParams
        from vllm.v1.engine.llm_engine import LLMEngine

        arguments: dict[str, Any] = {
            "model": config.path,
            "runner": "pooling",
            "pooler_config": PoolerConfig(task="token_embed"),
            "dtype": config.dtype.value,
            "max_model_len": max_model_tokens,
            "distributed_executor_backend": "uni",
            "disable_log_stats": True,
            **config.engine_args,
        }
        self._loop = EngineLoop(LLMEngine.from_engine_args(EngineArgs(**arguments)))
        self._params = PoolingParams(task="token_embed", use_activation=False)
        self._device = torch.device("cuda" if config.gpus_per_worker > 0 else "cpu")
        self._head = TeacherHead(
            head_VD=load_head(config.path, vocab_size=vocab_size).to(self._device),
            temperature=temperature,
            equivalence=Equivalence.of(equivalent_ids, device=self._device),
        )

    async def ready(self) -> bool:
        """Answer once the engine is built."""
        return True

    async def score(self, group: TrajectoryGroup, request: ScoreRequest) -> tuple[ScoreSummary, Score]:
        """Score every response token of a group."""
        start = time.perf_counter()
        bounds = list(zip(group.offsets[:-1], group.offsets[1:], strict=True))
        futures = [
            self._loop.submit(np.concatenate([group.prompt_ids, group.response_ids[a:b]]), self._params)
            for a, b in bounds
        ]
        outputs = await asyncio.gather(*map(asyncio.wrap_future, futures))
        # Row i of a sequence's hidden states predicts token i + 1: the rows before each response token.
        first = len(group.prompt_ids) - 1
        rows = [o.outputs.data[first : first + b - a] for o, (a, b) in zip(outputs, bounds, strict=True)]
        hidden_ND = torch.cat(rows)
        score = await asyncio.to_thread(self._build, hidden_ND, group, request)
        summary = ScoreSummary(
            num_tokens=len(group.response_ids), num_bytes=num_bytes(score), score_s=time.perf_counter() - start
        )
        return summary, score

    def _build(self, hidden_ND: torch.Tensor, group: TrajectoryGroup, request: ScoreRequest) -> Score:
        if request.payload is Payload.hidden:
            sampled = self._sampled(hidden_ND, group) if request.sampled_logprobs else np.empty(0, dtype=np.float32)
            return HiddenScore(hidden_ND=to_numpy(hidden_ND), sampled_logprobs_N=sampled)
        if request.payload is Payload.sampled:
            return SampledScore(logprobs_N=self._sampled(hidden_ND, group))
        ids_NK, logprobs_NK, sampled_N = self._head.support(
            hidden_ND.to(self._device),
            ids_N=self._ids(group.response_ids),
            student_ids_NK=self._ids(group.support_ids),
            request=request,
        )
        return SupportScore(
            ids_NK=ids_NK.cpu().numpy(),
            logprobs_NK=logprobs_NK.cpu().numpy(),
            sampled_logprobs_N=sampled_N.cpu().numpy(),
        )

    def _sampled(self, hidden_ND: torch.Tensor, group: TrajectoryGroup) -> Float32:
        return self._head.sampled(hidden_ND.to(self._device), self._ids(group.response_ids)).cpu().numpy()

    def _ids(self, ids: Int32) -> torch.Tensor:
        return torch.from_numpy(ids.astype(np.int64)).to(self._device)


def to_numpy(tensor: torch.Tensor) -> Any:
    """Return a contiguous array; bfloat16, which numpy lacks, travels as its bits in uint16."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor.view(torch.uint16).numpy() if tensor.dtype is torch.bfloat16 else tensor.float().numpy()


def num_bytes(score: Score) -> int:
    """Return the size of a score's arrays."""
    match score:
        case SampledScore():
            return score.num_bytes
        case SupportScore():
            return score.ids_NK.nbytes + score.logprobs_NK.nbytes + score.sampled_logprobs_N.nbytes
        case HiddenScore():
            return score.hidden_ND.nbytes + score.sampled_logprobs_N.nbytes
