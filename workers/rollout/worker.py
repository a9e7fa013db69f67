"""One rollout worker: a vLLM engine in this process that samples from the student and takes new weights in between.

vLLM is imported when a worker is built: the driver needs the class only.
"""

import asyncio
import time
from concurrent.futures import Future
from typing import Any

import numpy as np
import numpy.typing as npt

from opd_ray.config.schema import RolloutConfig
from opd_ray.data.tasks import verifier
from opd_ray.protocol import Finish, GenerateRequest, GroupSummary, SamplingOptions, TrajectoryGroup
from opd_ray.schedule import derive_seed
from workers.engine_loop import EngineLoop
from workers.weights import WeightManifest

_MAX_TEXT_CHARACTERS = 4000
# A prefill in parts discards a draw and rewinds the request's generator, which torch's CPU generator cannot do.
CPU_ENGINE_ARGS = {"enable_chunked_prefill": False}


class RolloutWorker:
    """Serves `generate` calls concurrently; never before it holds the version a request asks for."""

    def __init__(self, *, model_path: str, config: RolloutConfig, max_model_tokens: int) -> None:
        from vllm.config import WeightTransferConfig
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        from workers.rollout import object_store_engine

        object_store_engine.register()
        arguments: dict[str, Any] = {
            "model": model_path,
            "dtype": config.dtype.value,
            "max_model_len": max_model_tokens,
            "distributed_executor_backend": "uni",
            "disable_log_stats": True,
            "logprobs_mode": logprobs_mode(config),
            "weight_transfer_config": WeightTransferConfig(backend=object_store_engine.BACKEND),
            **({} if config.gpus_per_worker else CPU_ENGINE_ARGS),
            **config.engine_args,
        }
        self._engine = LLMEngine.from_engine_args(EngineArgs(**arguments))
        self._engine.set_weight_version("-1")
        self._tokenizer = self._engine.get_tokenizer()
        self._loop = EngineLoop(self._engine)
        self._version = -1
        self._version_changed = asyncio.Condition()

    async def ready(self) -> bool:
        """Answer once the engine is built."""
        return True

    async def load(self, manifest: WeightManifest, buffer: npt.NDArray[np.uint8]) -> float:
        """Take a published version between two engine steps; running sequences go on. Return the seconds it took."""
        start = time.perf_counter()
        await asyncio.wrap_future(self._loop.call(lambda: self._apply(manifest, buffer)))
        async with self._version_changed:
            self._version = manifest.version
            self._version_changed.notify_all()
        return time.perf_counter() - start

    async def generate(self, request: GenerateRequest) -> tuple[GroupSummary, TrajectoryGroup]:
        """Sample the group's responses; resolves when the last one is finished."""
        start = time.perf_counter()
        async with self._version_changed:
            await self._version_changed.wait_for(lambda: self._version >= request.version)
        completions = await asyncio.gather(*map(asyncio.wrap_future, self._submit(request)))
        group = build_group(request, [output.outputs[0] for output in completions])
        return self._summarise(request, group, seconds=time.perf_counter() - start), group

    def _submit(self, request: GenerateRequest) -> "list[Future[Any]]":
        return [
            self._loop.submit(request.prompt.ids_P, sampling_params(request.sampling, seed=seed))
            for seed in (derive_seed(request.seed, sample) for sample in range(request.sampling.num_samples))
        ]

    def _apply(self, manifest: WeightManifest, buffer: npt.NDArray[np.uint8]) -> None:
        self._engine.collective_rpc("start_weight_update")
        update_info = {"manifest": manifest, "buffer": buffer}
        self._engine.collective_rpc("update_weights", kwargs={"update_info": update_info})
        self._engine.collective_rpc("finish_weight_update")
        self._engine.set_weight_version(str(manifest.version))
        self._loop.cache_salt = str(manifest.version)  # prefixes cached under the old weights are not for the new

    def _summarise(self, request: GenerateRequest, group: TrajectoryGroup, *, seconds: float) -> GroupSummary:
        texts = [
            self._tokenizer.decode(group.response_ids[start:end].tolist(), skip_special_tokens=True)
            for start, end in zip(group.offsets[:-1], group.offsets[1:], strict=True)
        ]
        prompt, rewards = request.prompt, tuple[float, ...]()
        if prompt.answer is not None:
            verify = verifier(prompt.task)
            rewards = tuple(verify(text, prompt.answer) for text in texts)
        prompt_text = self._tokenizer.decode(prompt.ids_P.tolist())
        return GroupSummary(
            prompt_index=prompt.index,
            num_prompt_tokens=len(prompt.ids_P),
            response_lengths=tuple(np.diff(group.offsets).tolist()),
            num_loss_tokens=int(group.loss_mask.sum()),
            num_truncated=int((group.finish == Finish.length).sum()),
            rewards=rewards,
            oldest_version=int(group.token_versions.min()),
            text=f"{prompt_text}{texts[0]}"[:_MAX_TEXT_CHARACTERS],
            generate_s=seconds,
        )


def logprobs_mode(config: RolloutConfig) -> str:
    """Which of vLLM's log-probs are those of the full vocabulary at the rollout temperature."""
    return "raw_logprobs" if config.temperature == 1 else "processed_logprobs"


def sampling_params(options: SamplingOptions, *, seed: int) -> Any:
    """Return vLLM's form of the options, for one sample."""
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    return SamplingParams(
        temperature=options.temperature,
        top_p=options.top_p,
        max_tokens=options.max_response_tokens,
        seed=seed,
        logprobs=0,
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def build_group(request: GenerateRequest, completions: list[Any]) -> TrajectoryGroup:
    """Flatten vLLM's completions of one prompt into a group."""
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
        sampled_logprobs=np.concatenate([_sampled_logprobs(c) for c in completions]),
        token_versions=versions,
        loss_mask=np.ones(num_tokens, dtype=np.bool_),
        support_ids=np.empty((num_tokens, 0), dtype=np.int32),
        finish=np.array([Finish[c.finish_reason] for c in completions], dtype=np.int8),
        prompt_index=request.prompt.index,
        task=request.prompt.task,
        seed=request.seed,
    )


def _sampled_logprobs(completion: Any) -> npt.NDArray[np.float32]:
    """vLLM lists the sampled token first at every position."""
    flat = completion.logprobs
    return np.asarray(flat.logprobs, dtype=np.float32)[np.asarray(flat.start_indices, dtype=np.int64)]
