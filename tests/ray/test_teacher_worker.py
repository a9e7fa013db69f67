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
from workers.support_codec import support_ids
from workers.teacher.errors import BadScore
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


def _open(folder: str, *, dtype: Dtype = Dtype.float32, temperature: float = 1.0, **engine_args: Any) -> TeacherWorker:
    engine_args = {"enforce_eager": True, "kv_cache_memory_bytes": 64 << 20, **engine_args}
    config = TeacherConfig(path=folder, dtype=dtype, engine_args=engine_args)
    return TeacherWorker(config=config, max_model_tokens=128, vocab_size=30, temperature=temperature, equivalent_ids=())


@pytest.mark.parametrize("tied", [False, True], ids=["untied head", "tied head"])
def test_every_payload_agrees_with_plain_transformers(model_folder: Any, tied: bool) -> None:
    folder, temperature = model_folder(seed=2, tied=tied), 0.7
    model = reference_model(folder)

    async def scenario() -> None:
        worker = _open(folder, temperature=temperature)
        for group in _GROUPS:
            whole_NR = (reference_logprobs(model, group) / temperature).log_softmax(-1).detach()
            truth_NV = whole_NR[:, :30].log_softmax(-1)
            calls = [worker.score(group, request) for request in _REQUESTS]
            (_, one), (first, top), (second, chosen), (summary, hidden) = await asyncio.gather(*calls)

            assert isinstance(one, SampledScore)
            np.testing.assert_allclose(one.logprobs_N, sampled(truth_NV, group).numpy(), atol=1e-5)

            assert isinstance(top, SupportScore)
            values, _ = truth_NV.topk(4)
            np.testing.assert_allclose(top.logprobs_NK, values.numpy(), atol=1e-5)
            gathered = truth_NV.gather(1, torch.from_numpy(support_ids(top)).long())
            np.testing.assert_allclose(gathered.numpy(), values.numpy(), atol=1e-5)

            assert isinstance(chosen, SupportScore)
            np.testing.assert_array_equal(support_ids(chosen), group.support_ids)
            expected = truth_NV.gather(1, torch.from_numpy(group.support_ids.astype(np.int64))).log_softmax(-1)
            renormalised = torch.from_numpy(chosen.logprobs_NK).log_softmax(-1)
            np.testing.assert_allclose(renormalised.numpy(), expected.numpy(), atol=1e-5)

            assert isinstance(hidden, HiddenScore)
            np.testing.assert_allclose(hidden.sampled_logprobs_N, one.logprobs_N, atol=1e-6)
            head_VD = load_head(folder, vocab_size=30)
            logits = torch.from_numpy(hidden.hidden_ND) @ head_VD.T / temperature
            np.testing.assert_allclose(logits.log_softmax(-1).numpy(), truth_NV.numpy(), atol=1e-5)
            assert first.dropped_mass_sum == pytest.approx(float(whole_NR[:, 30:].exp().sum()), rel=1e-4)
            assert np.isnan(second.dropped_mass_sum)
            assert summary.num_tokens == len(group.response_ids)
            assert summary.num_bytes == hidden.hidden_ND.nbytes + 4 * summary.num_tokens

    asyncio.run(scenario())


def test_samples_that_share_a_cached_prompt_get_the_states_that_each_would_get_alone(model_folder: Any) -> None:
    folder = model_folder(seed=2)
    model, head_VD = reference_model(folder), load_head(folder, vocab_size=30)
    prompt = [(7 * place) % 30 for place in range(64)]  # two blocks of the cache, to the last token
    start = [(11 * place) % 29 for place in range(33)]  # and with this a third, which two samples share
    group = make_group(prompt, [*start, 1, 2, 3], [4, 5], [*start, 6], [4])

    async def scenario() -> None:
        worker = _open(folder, block_size=32)
        truth_NV = reference_logprobs(model, group)[:, :30].log_softmax(-1).detach()
        for _ in range(2):  # the second time nothing may be left of the first
            _, hidden = await worker.score(group, ScoreRequest(payload=Payload.hidden))
            assert isinstance(hidden, HiddenScore)
            logprobs_NV = (torch.from_numpy(hidden.hidden_ND) @ head_VD.T).log_softmax(-1)
            np.testing.assert_allclose(logprobs_NV.numpy(), truth_NV.numpy(), atol=1e-5)

    asyncio.run(scenario())


def test_a_bfloat16_teacher_sends_its_states_in_two_bytes_a_number(model_folder: Any) -> None:
    folder, group = model_folder(seed=2), _GROUPS[0]

    async def scenario() -> None:
        worker = _open(folder, dtype=Dtype.bfloat16)
        requests = [ScoreRequest(payload=payload) for payload in (Payload.hidden, Payload.sampled)]
        (summary, hidden), (_, one) = await asyncio.gather(*(worker.score(group, request) for request in requests))
        assert isinstance(hidden, HiddenScore)
        assert isinstance(one, SampledScore)
        assert hidden.hidden_ND.dtype == np.uint16
        assert summary.num_bytes == 2 * hidden.hidden_ND.size
        states_ND = torch.from_numpy(hidden.hidden_ND.copy()).view(torch.bfloat16).float()
        logprobs_NV = (states_ND @ load_head(folder, vocab_size=30).T).log_softmax(-1)
        np.testing.assert_allclose(one.logprobs_N, sampled(logprobs_NV, group).numpy(), atol=1e-5)

    asyncio.run(scenario())


def test_a_group_that_no_teacher_can_score_leaves_the_worker_serving_others(model_folder: Any) -> None:
    async def scenario() -> None:
        worker = _open(model_folder(seed=2))
        request = ScoreRequest(payload=Payload.sampled)
        with pytest.raises(BadScore, match="response token 1 has id 30, expected 0 to 29"):
            await worker.score(make_group([1], [2, 30]), request)
        summary, _ = await worker.score(_GROUPS[0], request)
        assert summary.num_tokens == len(_GROUPS[0].response_ids)

    asyncio.run(scenario())


def test_a_teacher_cut_over_two_processes_says_what_one_process_says(
    model_folder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm import envs

    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # it would give each process a memory node of its own
    monkeypatch.setenv("VLLM_HOST_IP", "127.0.0.1")
    envs.disable_envs_cache()  # an engine of another test has made vLLM keep its environment
    folder = model_folder(seed=2)
    model = reference_model(folder)

    async def scenario() -> None:
        worker = _open(folder, tensor_parallel_size=2)
        for group in _GROUPS:
            truth_NV = reference_logprobs(model, group).detach()[:, :30].log_softmax(-1)
            calls = [worker.score(group, request) for request in _REQUESTS[:2]]
            (_, one), (_, top) = await asyncio.gather(*calls)
            assert isinstance(one, SampledScore)
            np.testing.assert_allclose(one.logprobs_N, sampled(truth_NV, group).numpy(), atol=1e-5)
            assert isinstance(top, SupportScore)
            np.testing.assert_allclose(top.logprobs_NK, truth_NV.topk(4).values.numpy(), atol=1e-5)
        worker.close()

    asyncio.run(scenario())


def test_sequences_longer_than_a_batch_of_the_engine_are_scored_in_parts(model_folder: Any) -> None:
    folder = model_folder(seed=2)
    model, head_VD = reference_model(folder), load_head(folder, vocab_size=30)
    groups = [
        make_group([(7 * place) % 30 for place in range(length)], [(11 * place) % 29 for place in range(50)], [4, 5])
        for length in (3, 40)
    ]

    async def scenario() -> None:
        worker = _open(folder, max_num_batched_tokens=16, max_num_seqs=8)
        request = ScoreRequest(payload=Payload.hidden)
        answers = await asyncio.gather(*(worker.score(group, request) for group in groups))
        for group, (_, hidden) in zip(groups, answers, strict=True):
            truth_NV = reference_logprobs(model, group)[:, :30].log_softmax(-1).detach()
            assert isinstance(hidden, HiddenScore)
            logprobs_NV = (torch.from_numpy(hidden.hidden_ND) @ head_VD.T).log_softmax(-1)
            np.testing.assert_allclose(logprobs_NV.numpy(), truth_NV.numpy(), atol=1e-5)

    asyncio.run(scenario())
