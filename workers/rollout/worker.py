"""One rollout worker: a vLLM engine in this process that samples from the student and takes new weights in between.

vLLM is imported when a worker is built: the driver needs the class only.
"""

import asyncio
import itertools
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np

from opd_ray.config.objective import ObjectiveConfig
from opd_ray.config.schema import RolloutConfig
from opd_ray.config.student import LoraConfig
from opd_ray.data.tasks import verifier
from opd_ray.data.verifiers import SLOW_VERIFIERS
from opd_ray.protocol import (
    Finish,
    Float32,
    GenerateRequest,
    GroupSummary,
    Int32,
    Prompt,
    SamplingOptions,
    TrajectoryGroup,
)
from opd_ray.schedule import derive_seed
from workers.engine_loop import EngineLoop
from workers.engine_sleep import DISCARD_WEIGHTS, KEEP_WEIGHTS, fall_asleep, wake_up
from workers.fault_plan import Phase, reach
from workers.lane import span_since
from workers.rollout.turns import Turn, Turns
from workers.sync.adapter import adapter_args
from workers.sync.choose import ENGINES
from workers.sync.receiver import Receiver
from workers.weights import Buffers, WeightManifest

_MAX_TEXT_CHARACTERS = 4000
_NO_VERSION = -2  # older than any request asks for: nothing is served
_DEFAULT_MAX_LOGPROBS = 20  # vLLM's own
# A prefill in parts discards a draw and rewinds the request's generator, which torch's CPU generator cannot do.
CPU_ENGINE_ARGS = {"enable_chunked_prefill": False}


class RolloutWorker:
    """Serves `generate` calls concurrently; never before it holds the version a request asks for."""

    def __init__(
        self,
        *,
        model_path: str,
        config: RolloutConfig,
        max_model_tokens: int,
        logprob_args: dict[str, Any],
        lora: LoraConfig | None = None,
    ) -> None:
        from vllm.config import WeightTransferConfig
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        from workers import object_store_engine

        object_store_engine.register()
        arguments: dict[str, Any] = {
            "model": model_path,
            "dtype": config.dtype.value,
            "max_model_len": max_model_tokens,
            "distributed_executor_backend": "uni",
            "disable_log_stats": True,
            **logprob_args,
            **adapter_args(lora),
            "weight_transfer_config": WeightTransferConfig(backend=ENGINES[config.weight_sync]),
            **({} if config.gpus_per_worker else CPU_ENGINE_ARGS),
            **config.engine_args,
        }
        self._engine = LLMEngine.from_engine_args(EngineArgs(**arguments))
        self._tokenizer = self._engine.get_tokenizer()
        self._loop = EngineLoop(self._engine, max_running=self._engine.vllm_config.scheduler_config.max_num_seqs)
        self._receiver = Receiver(self._engine, self._loop, lora=lora)
        self._turns = Turns(self._loop)
        self._turn: Turn | None = None  # of the prepared version
        self._sleep_level = DISCARD_WEIGHTS if lora is None else KEEP_WEIGHTS
        self._update_in_flight = config.update_in_flight
        self._version = -1
        self._version_changed = asyncio.Condition()

    async def ready(self) -> bool:
        """Answer once the engine is built."""
        return True

    async def held_version(self) -> int:
        """Return the version of the weights; -1 before the first, while asleep, and while they are parts of two."""
        return self._receiver.version

    async def prepare(self, manifest: WeightManifest, buffers: Buffers | None, turn: Turn | None = None) -> None:
        """Check a published version and hold it beside the one that is served. Raises ValueError.

        turn: the place of its commit in the canonical order.
        """
        reach(Phase.prepare, step=manifest.version)
        await asyncio.wrap_future(self._loop.call(lambda: self._receiver.prepare(manifest, buffers)))
        self._turn = turn

    async def commit(self, version: int, update_info: Any = None) -> None:
        """Take the prepared version between two engine steps.

        Running sequences go on under it, or with rollout.update_in_flight=false are let finish first. Raises
        NotPreparedError when this worker has been started anew since it prepared the version.
        """
        reach(Phase.commit, step=version)
        async with nullcontext() if self._turn is None else self._turns.alone(self._turn.number):
            await asyncio.wrap_future(
                self._loop.call(lambda: self._receiver.commit(version, update_info), drained=not self._update_in_flight)
            )
            async with self._version_changed:
                self._version = version
                self._version_changed.notify_all()

    async def join(self, init_info: dict[str, Any]) -> None:
        """Meet the learner where vLLM's own weight transfer needs that."""
        await asyncio.wrap_future(self._loop.call(lambda: self._receiver.join(init_info)))

    async def sleep(self) -> None:
        """Give the GPU's memory back; no `generate` may be under way. Nothing is served until a version is loaded.

        The weights are discarded when the publication that follows every sleep holds all of them; those under
        adapters are kept in the machine's memory.
        """
        async with self._version_changed:
            self._version = _NO_VERSION
        self._receiver.forget()
        await asyncio.wrap_future(self._loop.call(lambda: fall_asleep(self._engine, level=self._sleep_level)))

    async def wake(self) -> None:
        """Take the memory again, to load a version into it."""
        await asyncio.wrap_future(self._loop.call(lambda: wake_up(self._engine)))

    async def generate_all(
        self, requests: Sequence[GenerateRequest], turns: Sequence[Turn | None]
    ) -> list[GroupSummary | TrajectoryGroup]:
        """Answer several calls of `generate` in one: what each returns, one after the other."""
        answers = await asyncio.gather(*map(self.generate, requests, turns))
        return [part for answer in answers for part in answer]

    async def generate(
        self, request: GenerateRequest, turn: Turn | None = None
    ) -> tuple[GroupSummary, TrajectoryGroup]:
        """Sample the group's responses; resolves when the last one is finished.

        turn: the group's place in the canonical order; None: at once, beside whatever runs.
        """
        start = time.perf_counter()
        sequences = self._sequences(request)
        if turn is None:
            async with self._version_changed:
                await self._version_changed.wait_for(lambda: self._version >= request.version)
            at_work = time.time()
            futures = self._loop.submit_together(sequences)
        else:  # the load of its version has an earlier turn
            futures = await self._turns.submit(turn, sequences)
            at_work = time.time()
        reach(Phase.generate, step=request.version)
        completions = await asyncio.gather(*map(asyncio.wrap_future, futures))
        samples = [output.outputs[0] for output in completions]
        texts = [self._tokenizer.decode(sample.token_ids, skip_special_tokens=True) for sample in samples]
        if request.prompt.verifier in SLOW_VERIFIERS:
            rewards = await asyncio.to_thread(_rewards, request.prompt, texts)
        else:
            rewards = _rewards(request.prompt, texts)
        group = build_group(request, samples, rewards=rewards)
        summary = self._summarise(request, group, text=texts[0], seconds=time.perf_counter() - start)
        return replace(summary, span=span_since(at_work)), group

    def _sequences(self, request: GenerateRequest) -> list[tuple[Int32, Any]]:
        return [
            (request.prompt.ids_P, sampling_params(request.sampling, seed=derive_seed(request.seed, sample)))
            for sample in range(request.sampling.num_samples)
        ]

    def _summarise(
        self, request: GenerateRequest, group: TrajectoryGroup, *, text: str, seconds: float
    ) -> GroupSummary:
        prompt = request.prompt
        prompt_text = self._tokenizer.decode(prompt.ids_P.tolist())
        return GroupSummary(
            prompt_index=prompt.index,
            task=prompt.task,
            num_prompt_tokens=len(prompt.ids_P),
            response_lengths=tuple(np.diff(group.offsets).tolist()),
            num_loss_tokens=int(group.loss_mask.sum()),
            num_truncated=int((group.finish == Finish.length).sum()),
            rewards=tuple(group.rewards.tolist()),
            oldest_version=int(group.token_versions.min()),
            text=f"{prompt_text}{text}"[:_MAX_TEXT_CHARACTERS],
            generate_s=seconds,
            repetition=repetition(group),
        )


def repetition(group: TrajectoryGroup) -> float:
    """Return the share of a response's 4-grams that stand in it earlier as well, mean over the group's responses."""
    shares = []
    for start, end in itertools.pairwise(group.offsets.tolist()):
        ids = group.response_ids[start:end].tolist()
        num_grams = max(len(ids) - 3, 1)
        distinct = set(zip(ids, ids[1:], ids[2:], ids[3:], strict=False))
        shares.append(1.0 - max(len(distinct), 1) / num_grams)
    return sum(shares) / len(shares)


def logprob_args(config: RolloutConfig, objective: ObjectiveConfig) -> dict[str, Any]:
    """Return vLLM's arguments about log-probs: at the rollout temperature, of the whole vocabulary or of the nucleus.

    vLLM gives them before temperature and top-p ("raw") or after both ("processed").
    """
    raw = config.temperature == 1 and not objective.correct_top_p
    return {
        "logprobs_mode": "raw_logprobs" if raw else "processed_logprobs",
        "max_logprobs": max(objective.top_k, _DEFAULT_MAX_LOGPROBS),
    }


def sampling_params(options: SamplingOptions, *, seed: int) -> Any:
    """Return vLLM's form of the options, for one sample."""
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    return SamplingParams(
        temperature=options.temperature,
        top_p=options.top_p,
        max_tokens=options.max_response_tokens,
        seed=seed,
        logprobs=options.support_size,
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def build_group(request: GenerateRequest, completions: list[Any], *, rewards: Float32) -> TrajectoryGroup:
    """Flatten vLLM's completions of one prompt into a group."""
    candidates = [_candidates(c, num_ids=1 + request.sampling.support_size) for c in completions]
    lengths = [len(completion.token_ids) for completion in completions]
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    num_tokens = int(offsets[-1])
    versions = np.empty(num_tokens, dtype=np.int32)
    for start, completion in zip(offsets, completions, strict=False):
        for span in completion.weight_versions:
            versions[start + span.start : start + span.end] = int(span.version)
    return TrajectoryGroup(
        prompt_ids=request.prompt.ids_P,
        response_ids=np.concatenate([np.asarray(c.token_ids, dtype=np.int32) for c in completions]),
        offsets=offsets,
        sampled_logprobs=np.concatenate([logprobs[:, 0] for _, logprobs in candidates]),
        token_versions=versions,
        loss_mask=np.ones(num_tokens, dtype=np.bool_),
        support_ids=np.concatenate(
            [within_mass(ids[:, 1:], logprobs[:, 1:], request.sampling.support_top_p) for ids, logprobs in candidates]
        ),
        rewards=rewards,
        finish=np.array([Finish[c.finish_reason] for c in completions], dtype=np.int8),
        prompt_index=request.prompt.index,
        task=request.prompt.task,
        seed=request.seed,
        teacher_prompt_ids=request.prompt.teacher_ids_P,
    )


def within_mass(ids_NK: Int32, logprobs_NK: Float32, top_p: float) -> Int32:
    """Return ids in descending order with -1 where those before hold the mass top_p already."""
    if top_p >= 1:
        return ids_NK
    p_NK = np.exp(logprobs_NK)
    return np.where(np.cumsum(p_NK, axis=1) - p_NK >= top_p, np.int32(-1), ids_NK)


def _candidates(completion: Any, *, num_ids: int) -> tuple[Int32, Float32]:
    """Return ids and log-probs [n, num_ids]: at every position vLLM lists the sampled token, then the likeliest."""
    flat = completion.logprobs
    columns = np.asarray(flat.start_indices, dtype=np.int64)[:, None] + np.arange(num_ids)
    return np.asarray(flat.token_ids, dtype=np.int32)[columns], np.asarray(flat.logprobs, dtype=np.float32)[columns]


def _rewards(prompt: Prompt, texts: list[str]) -> Float32:
    """Return the verifier's reward of each response, or none without a reference answer."""
    if prompt.answer is None:
        return np.empty(0, dtype=np.float32)
    verify = verifier(prompt.verifier)
    return np.array([verify(text, prompt.answer) for text in texts], dtype=np.float32)
