"""One teacher worker: a vLLM pooling engine that gives exact final hidden states, and the head applied to them."""

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import torch

from opd_ray.config.schema import TeacherConfig
from opd_ray.objectives.equivalence import Equivalence
from opd_ray.protocol import Int32, Score, ScoreRequest, ScoreSummary, TrajectoryGroup
from opd_ray.requests import follows_student
from workers.engine_loop import EngineLoop, executor
from workers.engine_sleep import KEEP_WEIGHTS, fall_asleep, wake_up
from workers.fingerprint import Fingerprint, differences, of_engine
from workers.output_head import head_of, load_head
from workers.teacher.checks import check_ids
from workers.teacher.head import TeacherHead
from workers.teacher.messages import build_score, num_bytes
from workers.teacher.rows import response_states
from workers.weights import Buffers, WeightManifest, read_tensors


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
            "distributed_executor_backend": executor(config.engine_args),
            "disable_log_stats": True,
            **(_transfer_args() if follows_student(config) else {}),
            **config.engine_args,
        }
        self._engine = LLMEngine.from_engine_args(EngineArgs(**arguments))
        self._loop = EngineLoop(self._engine)
        # vLLM would read no cached prefix, since it gives no states for one: `response_states` takes them elsewhere.
        self._params = PoolingParams(task="token_embed", use_activation=False, skip_reading_prefix_cache=False)
        self._dtype: torch.dtype = self._engine.model_config.dtype
        self._device = torch.device("cuda" if config.gpus_per_worker > 0 else "cpu")
        self._vocab_size = vocab_size
        self._make_head = partial(
            TeacherHead,
            vocab_size=vocab_size,
            temperature=temperature,
            equivalence=Equivalence.of(equivalent_ids, device=self._device),
        )
        self._head = self._make_head(load_head(config.path).to(self._device))
        # One thread: the head uses all cores by itself, and its chunks share memory.
        self._head_thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="head")
        self._num_groups = 0
        self._expected: Fingerprint | None = None  # None: not taken since the weights have changed
        self._awake = asyncio.Event()
        self._awake.set()

    async def ready(self) -> bool:
        """Answer once the engine is built; its weights are held against their fingerprint from now on."""
        self._expected = await self.fingerprint()
        return True

    async def fingerprint(self) -> dict[str, str]:
        """Return the fingerprint of the engine's weights and of the head."""
        return await asyncio.wrap_future(self._loop.call(lambda: of_engine(self._engine, head=self._head.weights_WD)))

    async def sleep(self) -> None:
        """Give the engine's memory on the GPU back, its weights kept in the machine's; no `score` may be under way.

        The head stays where it is. Groups that come now are scored after waking.
        """
        self._awake.clear()
        if self._expected is None:
            self._expected = await self.fingerprint()
        await asyncio.wrap_future(self._loop.call(lambda: fall_asleep(self._engine, level=KEEP_WEIGHTS)))

    async def wake(self) -> None:
        """Take the memory again. Raises RuntimeError, and scores nothing more, when the weights are not the same."""
        await asyncio.wrap_future(self._loop.call(lambda: wake_up(self._engine)))
        assert self._expected is not None
        changed = differences(self._expected, await self.fingerprint())
        if changed:
            raise RuntimeError(
                f"the teacher woke with other weights than it fell asleep with: {len(changed)} of"
                f" {len(self._expected)} tensors differ, the first is {changed[0]}"
            )
        self._awake.set()

    def close(self) -> None:
        """End the processes that the engine has started, if it has; they also end by themselves with this one."""
        self._engine.engine_core.shutdown()

    async def score(self, group: TrajectoryGroup, request: ScoreRequest) -> tuple[ScoreSummary, Score]:
        """Score every response token of a group. Raises BadScore for a group that no teacher could score."""
        start = time.perf_counter()
        await self._awake.wait()
        check_ids(group, vocab_size=self._vocab_size)
        self._num_groups += 1
        salt = f"group {self._num_groups}"
        futures = [
            self._loop.submit(
                np.concatenate([group.prompt_ids, group.response_ids[a:b]]), self._params, cache_salt=salt
            )
            for a, b in zip(group.offsets[:-1], group.offsets[1:], strict=True)
        ]
        outputs = await asyncio.gather(*map(asyncio.wrap_future, futures))
        states = [output.outputs.data for output in outputs]
        score, dropped_mass_sum = await asyncio.get_running_loop().run_in_executor(
            self._head_thread, self._build, states, group, request
        )
        summary = ScoreSummary(
            num_tokens=len(group.response_ids),
            num_bytes=num_bytes(score),
            dropped_mass_sum=dropped_mass_sum,
            score_s=time.perf_counter() - start,
        )
        return summary, score

    async def load(self, manifest: WeightManifest, buffers: Buffers) -> None:
        """Take all weights of a publication, the head too; no `score` may be under way.

        No later group reads keys of the old weights: every group has a salt of its own. Only for a teacher that
        follows the student.
        """
        from workers.object_store_engine import update_engine

        await asyncio.wrap_future(self._loop.call(lambda: update_engine(self._engine, manifest, buffers)))
        head_RD = head_of(dict(read_tensors(buffers, manifest)))
        self._head = self._make_head(head_RD.to(self._device, self._dtype, copy=True))
        self._expected = None

    def _build(
        self, states: Sequence[torch.Tensor], group: TrajectoryGroup, request: ScoreRequest
    ) -> tuple[Score, float]:
        # vLLM pools in float32; the model's own type says as much in fewer bytes.
        hidden_ND = response_states(states, group).to(self._dtype)
        said = self._head.score(
            hidden_ND.to(self._device),
            ids_N=self._ids(group.response_ids),
            student_ids_NK=self._ids(group.support_ids),
            request=request,
        )
        return build_score(request.payload, hidden_ND, said), float(said.dropped_mass_N.sum())

    def _ids(self, ids: Int32) -> torch.Tensor:
        return torch.from_numpy(ids.astype(np.int64)).to(self._device)


def _transfer_args() -> dict[str, Any]:
    """Return vLLM's arguments for an engine whose weights change."""
    from vllm.config import WeightTransferConfig

    from workers import object_store_engine

    object_store_engine.register()
    return {"weight_transfer_config": WeightTransferConfig(backend=object_store_engine.BACKEND)}
