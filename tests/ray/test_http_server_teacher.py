"""The HTTP teacher and a real vLLM server process on this machine's loopback."""

import asyncio
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import make_group, reference_logprobs, reference_model, sampled
from vllm_server import KEY_VARIABLE, Server, vllm_serve

from opd_ray.config.teacher import HttpTeacherConfig
from opd_ray.protocol import Payload, SampledScore, ScoreRequest, SupportScore, TrajectoryGroup
from workers.support_codec import support_ids
from workers.teacher.errors import TeacherDown
from workers.teacher.http import HttpTeacherWorker

pytestmark = pytest.mark.ray

_GROUPS = [make_group([1, 2, 3], [4, 5], [6, 7, 8, 9]), make_group([3], [1], [2, 2, 2], [0])]
_SAMPLED = ScoreRequest(payload=Payload.sampled)
_TOP_4 = ScoreRequest(payload=Payload.support, top_k=4, sampled_logprobs=True)
_RENORMALISED = ScoreRequest(payload=Payload.support, top_k=4, normalised=False)
_TOO_MANY = ScoreRequest(payload=Payload.support, top_k=25)  # a server gives 20 unless told otherwise
_TEMPERATURE = 0.7


def _worker(config: HttpTeacherConfig, request: ScoreRequest, *, temperature: float = 1.0) -> HttpTeacherWorker:
    return HttpTeacherWorker(
        config=config,
        request=request,
        max_model_tokens=32,
        vocab_size=32,
        temperature=temperature,
        equivalent_ids=(),
    )


async def _wait_until_up(worker: HttpTeacherWorker, server: Server) -> None:
    """Wait for a worker to be ready, no longer than its server's process lives."""
    getting_ready = asyncio.ensure_future(worker.ready())
    while not getting_ready.done():
        assert server.process.poll() is None, "the server's process ended"
        await asyncio.wait([getting_ready], timeout=1)
    await getting_ready


async def _check_scores(worker: HttpTeacherWorker, model: torch.nn.Module, group: TrajectoryGroup) -> None:
    (_, one), (_, top) = await asyncio.gather(worker.score(group, _SAMPLED), worker.score(group, _TOP_4))
    truth_NV = reference_logprobs(model, group).detach()
    assert isinstance(one, SampledScore)
    np.testing.assert_allclose(one.logprobs_N, sampled(truth_NV, group).numpy(), atol=1e-3)
    assert isinstance(top, SupportScore)
    np.testing.assert_allclose(top.logprobs_NK, truth_NV.topk(4).values.numpy(), atol=1e-3)
    gathered = truth_NV.gather(1, torch.from_numpy(support_ids(top).astype(np.int64)))
    np.testing.assert_allclose(top.logprobs_NK, gathered.numpy(), atol=1e-3)
    np.testing.assert_allclose(top.sampled_logprobs_N, one.logprobs_N, atol=1e-3)


async def _check_renormalised(worker: HttpTeacherWorker, model: torch.nn.Module, group: TrajectoryGroup) -> None:
    _, score = await worker.score(group, _RENORMALISED)
    assert isinstance(score, SupportScore)
    logits_NV = reference_logprobs(model, group).detach() / _TEMPERATURE
    expected = logits_NV.gather(1, torch.from_numpy(support_ids(score).astype(np.int64))).log_softmax(-1)
    given = torch.from_numpy(score.logprobs_NK).log_softmax(-1)
    np.testing.assert_allclose(given.numpy(), expected.numpy(), atol=1e-3)


async def _check_refusals(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="greater than max allowed: 20"):
        await _worker(server.config(), _TOO_MANY).ready()
    monkeypatch.setenv(KEY_VARIABLE, "mistaken")
    with pytest.raises(ValueError, match="answered 401") as caught:
        await _worker(server.config(), _SAMPLED).ready()
    assert "mistaken" not in str(caught.value)
    monkeypatch.setenv(KEY_VARIABLE, "correct")


async def _check_death(server: Server) -> None:
    """Kill the server among many requests: the teacher is down, in bounded time and with a reason."""
    worker = _worker(server.config(timeout_s=3, max_attempts=3, max_concurrent_requests=4), _SAMPLED)
    await worker.ready()
    scoring = [asyncio.ensure_future(worker.score(replace(_GROUPS[0], seed=i), _SAMPLED)) for i in range(200)]
    await asyncio.wait(scoring, return_when=asyncio.FIRST_COMPLETED)
    server.process.kill()
    start = time.perf_counter()
    with pytest.raises(TeacherDown, match=f"3 attempts.*{server.url}"):
        await asyncio.gather(*scoring)
    assert time.perf_counter() - start < 30
    for task in scoring:
        task.cancel()
    await asyncio.gather(*scoring, return_exceptions=True)
    await worker.close()


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_scores_of_a_real_server_agree_with_plain_transformers_and_its_death_is_told(
    model_folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = model_folder(seed=2)
    model = reference_model(folder)
    monkeypatch.setenv(KEY_VARIABLE, "correct")

    async def scenario(server: Server) -> None:
        worker = _worker(server.config(), _TOP_4)
        await _wait_until_up(worker, server)
        for group in _GROUPS:
            await _check_scores(worker, model, group)
        await worker.close()
        cooler = _worker(server.config(model="tiny"), _RENORMALISED, temperature=_TEMPERATURE)
        await _check_renormalised(cooler, model, _GROUPS[0])
        await cooler.close()
        await _check_refusals(server, monkeypatch)
        await _check_death(server)

    log_file = tmp_path / "server.log"
    with vllm_serve(folder, log_file=log_file) as server:
        try:
            asyncio.run(scenario(server))
        except (TeacherDown, AssertionError):
            print(log_file.read_text(errors="replace")[-5000:])
            raise
