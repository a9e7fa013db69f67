"""The teacher worker on a real vLLM pooling engine, as a plain object without Ray."""

import asyncio
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import make_group, reference_logprobs, reference_model, sampled

from opd_ray.config.schema import Dtype, TeacherConfig
from opd_ray.protocol import HiddenScore, Payload, SampledScore, ScoreRequest, SupportScore
from workers.output_head import load_head
from workers.teacher.worker import TeacherWorker

pytestmark = pytest.mark.ray

_GROUPS = [
    replace(group, support_ids=(np.arange(3) + 5 * np.arange(len(group.response_ids))[:, None]).astype(np.int32) % 30)
    for group in (make_group([1, 2, 3], [4, 5], [6, 7, 8, 9]), make_group([3], [1], [2, 2, 2], [0]))
]
_REQUESTS = [
    ScoreRequest(payload=Payload.sampled),
    ScoreRequest(payload=Payload.support, top_k=4),
    ScoreRequest(payload=Payload.support, support="student", normalised=False),
    ScoreRequest(payload=Payload.hidden, sampled_logprobs=True),
]


@pytest.mark.parametrize("tied", [False, True], ids=["untied head", "tied head"])
def test_every_payload_agrees_with_plain_transformers(model_folder: Any, tied: bool) -> None:
    folder, temperature = model_folder(seed=2, tied=tied), 0.7
    model = reference_model(folder)
    config = TeacherConfig(
        path=folder, dtype=Dtype.float32, engine_args={"enforce_eager": True, "kv_cache_memory_bytes": 64 << 20}
    )

    async def scenario() -> None:
        worker = TeacherWorker(
            config=config, max_model_tokens=32, vocab_size=30, temperature=temperature, equivalent_ids=()
        )
        for group in _GROUPS:
            truth_NV = (reference_logprobs(model, group)[:, :30] / temperature).log_softmax(-1).detach()
            calls = [worker.score(group, request) for request in _REQUESTS]
            (_, one), (_, top), (_, chosen), (summary, hidden) = await asyncio.gather(*calls)

            assert isinstance(one, SampledScore)
            np.testing.assert_allclose(one.logprobs_N, sampled(truth_NV, group).numpy(), atol=1e-5)

            assert isinstance(top, SupportScore)
            values, _ = truth_NV.topk(4)
            np.testing.assert_allclose(top.logprobs_NK, values.numpy(), atol=1e-5)
            gathered = truth_NV.gather(1, torch.from_numpy(top.ids_NK.astype(np.int64)))
            np.testing.assert_allclose(gathered.numpy(), values.numpy(), atol=1e-5)

            assert isinstance(chosen, SupportScore)
            np.testing.assert_array_equal(chosen.ids_NK, group.support_ids)
            expected = truth_NV.gather(1, torch.from_numpy(group.support_ids.astype(np.int64))).log_softmax(-1)
            renormalised = torch.from_numpy(chosen.logprobs_NK).log_softmax(-1)
            np.testing.assert_allclose(renormalised.numpy(), expected.numpy(), atol=1e-5)

            assert isinstance(hidden, HiddenScore)
            np.testing.assert_allclose(hidden.sampled_logprobs_N, one.logprobs_N, atol=1e-6)
            head_VD = load_head(folder, vocab_size=30)
            logits = torch.from_numpy(hidden.hidden_ND) @ head_VD.T / temperature
            np.testing.assert_allclose(logits.log_softmax(-1).numpy(), truth_NV.numpy(), atol=1e-5)
            assert summary.num_tokens == len(group.response_ids)
            assert summary.num_bytes == hidden.hidden_ND.nbytes + 4 * summary.num_tokens

    asyncio.run(scenario())
