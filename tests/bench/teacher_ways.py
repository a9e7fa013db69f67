"""The ways to have sequences scored that the benchmark compares: ours, and vLLM's prompt log-probs as peers do."""

import asyncio
import pickle
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from teacher_problem import VOCAB_SIZE, sequences

from opd_ray.config.schema import Dtype, TeacherConfig
from opd_ray.objectives.equivalence import Equivalence
from opd_ray.protocol import Payload, Score, ScoreRequest, TrajectoryGroup
from workers.output_head import load_head
from workers.teacher.head import TeacherHead
from workers.teacher.messages import build_score
from workers.teacher.rows import response_states
from workers.teacher.score_checks import check_score
from workers.teacher.worker import TeacherWorker

TOP_K = 64
OURS = {
    "sampled": ScoreRequest(payload=Payload.sampled),
    "support_teacher": ScoreRequest(payload=Payload.support, top_k=TOP_K),
    "support_student": ScoreRequest(payload=Payload.support, support="student", top_k=TOP_K, normalised=False),
    "hidden": ScoreRequest(payload=Payload.hidden),
}
_MAX_MODEL_TOKENS = 1024
_ENGINE_ARGS: dict[str, Any] = {
    "enforce_eager": True,
    "kv_cache_memory_bytes": 512 << 20,
    "skip_tokenizer_init": True,
}


class PeersTeacher:
    """A generating engine that is asked for the log-probs of its prompts."""

    def __init__(self, folder: Path) -> None:
        from vllm import LLM

        self._engine = LLM(
            model=str(folder), dtype="float32", max_model_len=_MAX_MODEL_TOKENS, max_logprobs=TOP_K, **_ENGINE_ARGS
        )

    def score(self, group: TrajectoryGroup, *, top_k: int, flat: bool) -> list[Any]:
        """Return the prompt log-probs of each sequence in vLLM's own form."""
        from vllm import SamplingParams

        params = SamplingParams(max_tokens=1, prompt_logprobs=top_k, flat_logprobs=flat, detokenize=False)
        prompts = [{"prompt_token_ids": ids.tolist()} for ids in sequences(group)]
        return [output.prompt_logprobs for output in self._engine.generate(prompts, params, use_tqdm=False)]


class OurTeacher:
    """A teacher worker, without Ray."""

    def __init__(
        self,
        folder: Path,
        *,
        dtype: Dtype = Dtype.float32,
        gpus: float = 0,
        vocab_size: int = VOCAB_SIZE,
        **engine_args: Any,
    ) -> None:
        config = TeacherConfig(
            path=str(folder), dtype=dtype, gpus_per_worker=gpus, engine_args=_ENGINE_ARGS | engine_args
        )
        self._worker = TeacherWorker(
            config=config,
            max_model_tokens=_MAX_MODEL_TOKENS,
            vocab_size=vocab_size,
            temperature=1.0,
            equivalent_ids=(),
        )

    def score(self, group: TrajectoryGroup, request: ScoreRequest) -> Score:
        """Return the score of the group."""
        return self.score_all([group], request)[0]

    def score_all(self, groups: Sequence[TrajectoryGroup], request: ScoreRequest) -> list[Score]:
        """Return the scores of groups that arrive at once."""

        async def scored() -> list[Score]:
            answers = await asyncio.gather(*(self._worker.score(group, request) for group in groups))
            return [score for _, score in answers]

        return asyncio.run(scored())


def our_handling(folder: Path, group: TrajectoryGroup, request: ScoreRequest) -> Callable[[], bytes]:
    """Return what is done between the engine's states and the bytes of a score, without the arithmetic of the head.

    The check that every score passes is part of it.
    """
    head_RD = load_head(str(folder))
    head = TeacherHead(
        head_RD, vocab_size=VOCAB_SIZE, temperature=1.0, equivalence=Equivalence.of((), device=head_RD.device)
    )
    states = [torch.randn(len(ids), head_RD.shape[1]) for ids in sequences(group)]
    ids_N, student_ids_NK = (torch.from_numpy(ids).long() for ids in (group.response_ids, group.support_ids))
    said = head.score(response_states(states, group), ids_N=ids_N, student_ids_NK=student_ids_NK, request=request)

    def handle() -> bytes:
        score = build_score(request.payload, response_states(states, group), said)
        check_score(score, group, request, vocab_size=VOCAB_SIZE)
        return pickle.dumps(score, protocol=5)

    return handle


def peers_handling(prompt_logprobs: list[Any]) -> Callable[[], bytes]:
    """Return what peers do to send them: pickle them as they are. Reading them into arrays comes on top."""
    return lambda: pickle.dumps(prompt_logprobs, protocol=5)


def seconds(function: Callable[[], object]) -> float:
    """Return the time of a call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start
