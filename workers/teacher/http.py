"""One teacher worker that asks remote vLLM servers: token ids go out, `prompt_logprobs` come back.

A server says nothing of ids that the caller chose and gives no hidden states, and its log-probs are those at
temperature 1 over its own vocabulary: unlike in `workers.teacher.head`, rows beyond the common one are not cut.

Suffixes: N tokens, K ids of a support.
"""

import asyncio
import math
import time
from collections.abc import Sequence

import msgspec
import numpy as np

from opd_ray.config.teacher import HttpTeacherConfig
from opd_ray.protocol import (
    Float32,
    Int32,
    Payload,
    SampledScore,
    Score,
    ScoreRequest,
    ScoreSummary,
    TrajectoryGroup,
)
from workers.support_codec import pack_support
from workers.teacher.errors import BadScore
from workers.teacher.messages import num_bytes
from workers.teacher.prompt_logprobs import TokenScores, read
from workers.teacher.replicas import Replicas

_NO_ID = -1
_FIRST_IDS = np.zeros(2, dtype=np.int32)  # a prompt token and a response token


class _Model(msgspec.Struct):
    id: str
    max_model_len: int | None = None


class _Models(msgspec.Struct):
    data: list[_Model]


def offered(temperature: float) -> frozenset[Payload]:
    """Return what these teachers can say at a rollout temperature; `check_request` has the finer rules."""
    return frozenset({Payload.sampled, Payload.support} if temperature == 1 else {Payload.support})


def check_request(request: ScoreRequest, *, temperature: float) -> None:
    """Raise ValueError when a server cannot answer a request exactly at the rollout temperature."""
    if request.payload is Payload.hidden:
        raise ValueError(
            "an HTTP teacher gives no hidden states: use objective=sampled, objective=support or another teacher"
        )
    if request.payload is Payload.support and request.support != "teacher":
        raise ValueError(
            f"objective.support={request.support}: an HTTP teacher scores only ids that it chose itself; use"
            " objective.support=teacher"
        )
    if temperature == 1:
        return
    needs_all = {
        "the sampled token's log-prob": request.payload is Payload.sampled or request.sampled_logprobs,
        "log-probs over the whole vocabulary": request.payload is Payload.support and request.normalised,
        "a nucleus (objective.support_top_p below 1)": request.payload is Payload.support and request.top_p < 1,
    }
    for need, holds in needs_all.items():
        if holds:
            raise ValueError(
                f"rollout.temperature={temperature:g}: an HTTP teacher's log-probs are those at temperature 1, and"
                f" {need} cannot be had from them at another; use rollout.temperature=1, or objective=support with"
                " objective.support=teacher, objective.tail=renormalise and objective.support_top_p=1"
            )


class HttpTeacherWorker:
    """Serves `score` calls concurrently; one HTTP request a sequence."""

    def __init__(
        self,
        *,
        config: HttpTeacherConfig,
        request: ScoreRequest,
        max_model_tokens: int,
        vocab_size: int,
        temperature: float,
        equivalent_ids: Sequence[Sequence[int]],
    ) -> None:
        check_request(request, temperature=temperature)
        if equivalent_ids:
            raise ValueError(
                "objective.equivalent_tokens: an HTTP teacher does not tell the mass of a class of tokens; leave it"
                " empty or use another teacher"
            )
        self._config = config
        self._request = request
        self._max_model_tokens = max_model_tokens
        self._vocab_size = vocab_size
        self._temperature = temperature
        self._replicas = Replicas(config)
        self._starting = asyncio.Lock()
        self._model: str | None = None  # known when ready

    async def ready(self) -> bool:
        """Answer once a server is up and has answered a short request like those to come.

        Raises TeacherDown when none comes up, ValueError when it does not serve what the run needs.
        """
        async with self._starting:
            if self._model is None:
                await self._replicas.open()
                try:
                    model = await self._served_model()
                    await self._ask(model, _FIRST_IDS, num_prompt_tokens=1, request=self._request)
                except BadScore as error:
                    raise ValueError(f"the teacher's server fails a first request: {error}") from None
                self._model = model
        return True

    async def score(self, group: TrajectoryGroup, request: ScoreRequest) -> tuple[ScoreSummary, Score]:
        """Score every response token of a group.

        Raises BadScore when a server refuses a sequence or its answer is not what was asked for, TeacherDown when no
        server answers.
        """
        check_request(request, temperature=self._temperature)
        await self.ready()
        assert self._model is not None
        start = time.perf_counter()
        sequences = [
            np.concatenate([group.prompt_ids, group.response_ids[a:b]])
            for a, b in zip(group.offsets[:-1], group.offsets[1:], strict=True)
        ]
        asking = [
            asyncio.ensure_future(self._ask(self._model, ids, num_prompt_tokens=len(group.prompt_ids), request=request))
            for ids in sequences
        ]
        try:
            parts = await asyncio.gather(*asking)
        except BadScore as error:
            raise BadScore(f"prompt {group.prompt_index}: {error}") from None
        finally:
            for task in asking:  # of those still running: nobody waits for them any more
                task.cancel()
        score = _score(parts, group.response_ids, request=request, temperature=self._temperature)
        summary = ScoreSummary(
            num_tokens=len(group.response_ids),
            num_bytes=num_bytes(score),
            dropped_mass_sum=math.nan,  # the server's rows beyond the common vocabulary are not told
            score_s=time.perf_counter() - start,
        )
        return summary, score

    async def close(self) -> None:
        """Drop the connections."""
        await self._replicas.close()

    async def _ask(self, model: str, ids: Int32, *, num_prompt_tokens: int, request: ScoreRequest) -> TokenScores:
        top_k = request.top_k if request.payload is Payload.support else 0
        body = {
            "model": model,
            "prompt": ids.tolist(),
            "max_tokens": 1,  # the least that a server generates
            "temperature": 0,  # of that token; `prompt_logprobs` know no temperature
            "prompt_logprobs": top_k,  # and the token itself
        }
        answer = await self._replicas.post("/v1/completions", msgspec.json.encode(body))
        return read(
            answer,
            num_prompt_tokens=num_prompt_tokens,
            response_ids=ids[num_prompt_tokens:],
            top_k=top_k,
            vocab_size=self._vocab_size,
        )

    async def _served_model(self) -> str:
        """Return the name of the model to ask for. Raises ValueError when it is not served, or too short."""
        answer = await self._replicas.get("/v1/models")
        try:
            served = {model.id: model for model in msgspec.json.decode(answer, type=_Models).data}
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise BadScore(f"the answer of /v1/models cannot be read: {error}") from None
        names = ", ".join(served) or "no model"
        name = self._config.model
        if name is None and len(served) != 1:
            raise ValueError(f"teacher.http.model=null: the server serves {names}; expected exactly one, or its name")
        if name is not None and name not in served:
            raise ValueError(f"teacher.http.model={name}: the server serves {names}")
        model = served[name] if name is not None else next(iter(served.values()))
        needed = self._max_model_tokens + 1  # and the one that is generated
        if model.max_model_len is not None and model.max_model_len < needed:
            raise ValueError(
                f"the teacher's server takes sequences of {model.max_model_len} tokens, expected at least {needed}:"
                " start it with a larger --max-model-len, or lower data.max_prompt_tokens or"
                " rollout.max_response_tokens"
            )
        return model.id


def _score(parts: Sequence[TokenScores], response_ids: Int32, *, request: ScoreRequest, temperature: float) -> Score:
    """Join the sequences of a group."""
    sampled_N = np.concatenate([part.sampled_logprobs_N for part in parts])
    if request.payload is Payload.sampled:
        return SampledScore(logprobs_N=sampled_N)
    ids_NK = np.concatenate([part.ids_NK for part in parts])
    logprobs_NK = np.concatenate([part.logprobs_NK for part in parts])
    if request.top_p < 1:
        ids_NK = _within_mass(ids_NK, logprobs_NK, top_p=request.top_p)
    if request.include_sampled:
        known_N = (ids_NK == response_ids[:, None]).any(1)
        ids_NK = np.column_stack([ids_NK, np.where(known_N, np.int32(_NO_ID), response_ids)])
        logprobs_NK = np.column_stack([logprobs_NK, sampled_N])
    if not request.sampled_logprobs:
        sampled_N = sampled_N[:0]
    # log q / T is the log-prob at temperature T up to a constant per token, which is all that check_request lets pass.
    logprobs_NK /= np.float32(temperature)
    return pack_support(ids_NK, logprobs_NK, sampled_logprobs_N=sampled_N)


def _within_mass(ids_NK: Int32, logprobs_NK: Float32, *, top_p: float) -> Int32:
    """Return descending ids with -1 where those before hold the mass already."""
    p_NK = np.exp(logprobs_NK)
    return np.where(p_NK.cumsum(1) - p_NK >= top_p, np.int32(_NO_ID), ids_NK)
