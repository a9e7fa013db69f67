"""One teacher worker: a vLLM pooling engine that gives exact final hidden states, and the head applied to them."""

import asyncio
import time
from typing import Any

import numpy as np
import torch

from opd_ray.config.schema import TeacherConfig
from opd_ray.protocol import (
    HiddenScore,
    Payload,
    SampledScore,
    Score,
    ScoreSummary,
    SupportScore,
    TrajectoryGroup,
)
from workers.engine_loop import EngineLoop
from workers.output_head import load_head
from workers.teacher.head import sampled_logprobs, top_k


class TeacherWorker:
    """Serves `score` calls concurrently; one prefill a sequence, no token is generated."""

    def __init__(self, *, config: TeacherConfig, max_model_tokens: int, vocab_size: int, temperature: float) -> None:
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
        self._temperature = temperature
        device = "cuda" if config.gpus_per_worker > 0 else "cpu"
        self._head_VD = load_head(config.path, vocab_size=vocab_size).to(device)

    async def ready(self) -> bool:
        """Answer once the engine is built."""
        return True

    async def score(self, group: TrajectoryGroup, *, payload: Payload, num_top: int) -> tuple[ScoreSummary, Score]:
        """Score every response token of a group. `num_top` is the size of a `support` payload."""
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
        score = await asyncio.to_thread(self._build, hidden_ND, group, payload, num_top)
        summary = ScoreSummary(
            num_tokens=len(group.response_ids), num_bytes=num_bytes(score), score_s=time.perf_counter() - start
        )
        return summary, score

    def _build(self, hidden_ND: torch.Tensor, group: TrajectoryGroup, payload: Payload, num_top: int) -> Score:
        if payload is Payload.hidden:
            return HiddenScore(hidden_ND=to_numpy(hidden_ND))
        hidden_ND = hidden_ND.to(self._head_VD.device)
        if payload is Payload.sampled:
            ids_N = torch.from_numpy(group.response_ids.astype(np.int64)).to(hidden_ND.device)
            logprobs_N = sampled_logprobs(hidden_ND, self._head_VD, ids_N, temperature=self._temperature)
            return SampledScore(logprobs_N=logprobs_N.cpu().numpy())
        ids_NK, logprobs_NK = top_k(hidden_ND, self._head_VD, num_tokens=num_top, temperature=self._temperature)
        return SupportScore(ids_NK=ids_NK.cpu().numpy(), logprobs_NK=logprobs_NK.cpu().numpy())


def to_numpy(tensor: torch.Tensor) -> Any:
    """Return a contiguous array; bfloat16, which numpy lacks, travels as its bits in uint16."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor.view(torch.uint16).numpy() if tensor.dtype is torch.bfloat16 else tensor.float().numpy()


def num_bytes(score: Score) -> int:
    """Return the size of a score's arrays."""
    match score:
        case SampledScore():
            return score.logprobs_N.nbytes
        case SupportScore():
            return score.ids_NK.nbytes + score.logprobs_NK.nbytes
        case HiddenScore():
            return score.hidden_ND.nbytes
