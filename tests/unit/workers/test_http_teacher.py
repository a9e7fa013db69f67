"""The HTTP teacher against servers on this machine's loopback that answer as vLLM does."""

import asyncio
import logging
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from aiohttp import web
from fake_vllm_server import VOCAB_SIZE, FakeServer, changed, good, model_logprobs, running, status
from groups import make_group

from opd_ray.config.teacher import HttpTeacherConfig
from opd_ray.protocol import Payload, SampledScore, ScoreRequest, SupportScore
from workers.support_codec import support_ids
from workers.teacher.errors import BadScore, TeacherDown
from workers.teacher.http import HttpTeacherWorker, check_request, offered

GROUP = make_group([1, 2, 3], [4, 5], [6, 7, 8, 9])
ONE = make_group([1, 2], [3, 4, 5])
SAMPLED = ScoreRequest(payload=Payload.sampled)
TOP_4 = ScoreRequest(payload=Payload.support, top_k=4)
RENORMALISED = replace(TOP_4, normalised=False)


def truth(group: Any) -> np.ndarray:
    """Return the made-up model's log-probs [N,V] at every response token."""
    bounds = zip(group.offsets[:-1], group.offsets[1:], strict=True)
    sequences = [[*group.prompt_ids.tolist(), *group.response_ids[a:b].tolist()] for a, b in bounds]
    return np.concatenate([model_logprobs(ids)[len(group.prompt_ids) :] for ids in sequences])


def of_sampled(logprobs_NV: np.ndarray, group: Any) -> np.ndarray:
    return np.take_along_axis(logprobs_NV, group.response_ids[:, None], axis=1)[:, 0]


def config_for(*servers: FakeServer, **more: Any) -> HttpTeacherConfig:
    fast: dict[str, Any] = {"timeout_s": 1.0, "max_attempts": 3, "backoff_s": 0.02, "start_timeout_s": 1.0}
    return HttpTeacherConfig(urls=[s.url for s in servers], **(fast | more))


def build(config: HttpTeacherConfig, *, request: ScoreRequest = TOP_4, temperature: float = 1.0) -> HttpTeacherWorker:
    return HttpTeacherWorker(
        config=config,
        request=request,
        max_model_tokens=32,
        vocab_size=VOCAB_SIZE,
        temperature=temperature,
        equivalent_ids=(),
    )


@asynccontextmanager
async def teacher_of(*servers: FakeServer, **more: Any) -> AsyncIterator[HttpTeacherWorker]:
    """Start servers and a teacher that is ready; what was asked at the start is forgotten."""
    async with running(*servers):
        worker = build(config_for(*servers, **more))
        scripts = [server.script for server in servers]
        for server in servers:
            server.script = []
        await worker.ready()
        for server, script in zip(servers, scripts, strict=True):
            server.script = script
            server.requests.clear()
        try:
            yield worker
        finally:
            await worker.close()


def score_once(script: list[Any], request: ScoreRequest = TOP_4) -> tuple[Any, FakeServer]:
    """Score a group of one sequence by a server that answers as the script says."""
    server = FakeServer(script=script)

    async def scenario() -> Any:
        async with teacher_of(server) as teacher:
            return await teacher.score(ONE, request)

    return asyncio.run(scenario()), server


def test_sampled_and_support_scores_are_the_models_own() -> None:
    async def scenario() -> None:
        async with teacher_of(FakeServer()) as teacher:
            (summary, one), (_, top) = await asyncio.gather(
                teacher.score(GROUP, SAMPLED), teacher.score(GROUP, replace(TOP_4, sampled_logprobs=True))
            )
        truth_NV = truth(GROUP)
        assert isinstance(one, SampledScore)
        assert one.logprobs_N.dtype == np.float32
        np.testing.assert_array_equal(one.logprobs_N, of_sampled(truth_NV, GROUP))
        assert summary.num_tokens == 6
        assert summary.num_bytes == 24

        assert isinstance(top, SupportScore)
        assert (top.low_ids_NK.dtype, top.logprobs_NK.dtype) == (np.uint16, np.float32)
        assert top.low_ids_NK.flags.c_contiguous
        assert top.logprobs_NK.flags.c_contiguous
        np.testing.assert_array_equal(support_ids(top), np.argsort(-truth_NV, axis=1)[:, :4])
        np.testing.assert_array_equal(top.logprobs_NK, -np.sort(-truth_NV, axis=1)[:, :4])
        np.testing.assert_array_equal(top.sampled_logprobs_N, one.logprobs_N)

    asyncio.run(scenario())


def test_the_sampled_token_joins_the_support_once_and_a_nucleus_cuts_it() -> None:
    request = replace(TOP_4, include_sampled=True, top_p=0.6)
    (_, score), _ = score_once([], request)
    truth_NV = truth(ONE)
    for n, (ids, logprobs) in enumerate(zip(support_ids(score), score.logprobs_NK, strict=True)):
        order = np.argsort(-truth_NV[n])[:4]
        before = np.cumsum(np.exp(truth_NV[n, order])) - np.exp(truth_NV[n, order])
        kept = [int(i) for i, mass in zip(order, before, strict=True) if mass < 0.6]
        sampled = int(ONE.response_ids[n])
        expected = kept if sampled in kept else [*kept, sampled]
        assert ids[ids >= 0].tolist() == expected
        np.testing.assert_array_equal(logprobs[ids >= 0], truth_NV[n, expected])


def test_one_request_a_sequence_asks_for_no_more_than_needed() -> None:
    _, server = score_once([], SAMPLED)
    assert server.requests == [
        {"model": "made-up", "prompt": [1, 2, 3, 4, 5], "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
    ]


def test_a_renormalised_support_at_another_temperature_is_exact() -> None:
    server = FakeServer()

    async def scenario() -> Any:
        async with running(server):
            worker = build(config_for(server), request=RENORMALISED, temperature=0.5)
            _, score = await worker.score(ONE, RENORMALISED)
            await worker.close()
            return score

    score = asyncio.run(scenario())
    at_half_NV = np.exp(truth(ONE) / 0.5)
    expected = np.take_along_axis(at_half_NV, support_ids(score), axis=1)
    weights = np.exp(score.logprobs_NK)
    np.testing.assert_allclose(
        weights / weights.sum(1, keepdims=True), expected / expected.sum(1, keepdims=True), rtol=1e-5
    )


@pytest.mark.parametrize(
    "request_",
    [
        SAMPLED,
        TOP_4,
        replace(RENORMALISED, sampled_logprobs=True),
        replace(RENORMALISED, top_p=0.9),
    ],
    ids=["sampled", "normalised support", "sampled log-probs", "nucleus"],
)
def test_what_temperature_1_cannot_tell_is_refused_at_another(request_: ScoreRequest) -> None:
    with pytest.raises(ValueError, match=r"rollout\.temperature=0\.7: .*at temperature 1"):
        build(HttpTeacherConfig(urls=["http://127.0.0.1:1"]), request=request_, temperature=0.7)
    check_request(request_, temperature=1.0)


def test_hidden_states_and_ids_of_the_students_choice_are_refused() -> None:
    with pytest.raises(ValueError, match="no hidden states"):
        check_request(ScoreRequest(payload=Payload.hidden), temperature=1.0)
    for support in ("student", "union"):
        with pytest.raises(ValueError, match=f"objective.support={support}"):
            check_request(replace(TOP_4, support=support), temperature=1.0)
    assert offered(1.0) == {Payload.sampled, Payload.support}
    assert offered(0.7) == {Payload.support}


@pytest.mark.parametrize("code", [500, 503, 429])
def test_a_passing_fault_is_tried_again(code: int) -> None:
    (_, score), server = score_once([status(code), status(code)], SAMPLED)
    np.testing.assert_array_equal(score.logprobs_N, of_sampled(truth(ONE), ONE))
    assert len(server.requests) == 3


def test_retry_after_is_honoured_up_to_the_deadline() -> None:
    start = time.perf_counter()
    score_once([status(429, Retry_After="1")])
    assert 0.9 < time.perf_counter() - start < 3
    start = time.perf_counter()
    score_once([status(503, Retry_After="3600")])
    assert time.perf_counter() - start < 3


def test_a_refusal_is_a_bad_score_with_the_servers_words_shortened() -> None:
    with pytest.raises(BadScore, match="answered 400: the prompt is too long") as caught:
        score_once([status(400, "the prompt is too long " + "x" * 5000)])
    assert len(str(caught.value)) < 500
    assert "prompt 0: " in str(caught.value)


def first_response_row(change: Any) -> Any:
    """Return an answer whose row of the first response token (position 2 of ONE) is changed."""
    return changed(lambda positions: change(positions[2]))


def _drop_sampled(row: dict[str, Any]) -> None:
    row["11" if "11" not in row else "10"] = row.pop("3")


def _two_of_one(answer: Any) -> web.Response:
    return web.json_response({**answer, "choices": answer["choices"] * 2})


BAD_ANSWERS = {
    "a position short": (changed(lambda p: p.pop()), "4 positions, expected 5"),
    "a position too many": (changed(lambda p: p.append(p[-1])), "6 positions, expected 5"),
    "an empty position": (changed(lambda p: p.__setitem__(3, None)), "1 response positions without"),
    "NaN": (first_response_row(lambda row: row["3"].update(logprob=float("nan"))), "cannot be read"),
    "null": (first_response_row(lambda row: row["3"].update(logprob=None)), "cannot be read.*logprob"),
    "minus infinity": (first_response_row(lambda row: row["3"].update(logprob=-9999.0)), "not finite"),
    "infinite by overflow": (
        lambda a: web.Response(text=str(good(a).text).replace('"logprob": -', '"logprob": -1e400', 1)),
        "cannot be read|not finite",
    ),
    "an id out of range": (
        first_response_row(lambda row: row.update({str(VOCAB_SIZE): row.pop(list(row)[-1])})),
        f"id {VOCAB_SIZE}, expected 0 to {VOCAB_SIZE - 1}",
    ),
    "a negative id": (first_response_row(lambda row: row.update({"-1": row.pop(list(row)[-1])})), "cannot be read"),
    "no sampled token": (first_response_row(_drop_sampled), "response token 0: the token itself, id 3, is missing"),
    "a candidate short": (
        changed(lambda p: [row.pop(list(row)[-1]) for row in p[2:] for _ in range(2)]),
        "response token 0: . candidates, expected 4",
    ),
    "raw logits": (first_response_row(lambda row: row[list(row)[-1]].update(logprob=0.5)), "no log-probs|least likely"),
    "another choice": (_two_of_one, "2 choices"),
    "no prompt_logprobs": (lambda _: web.json_response({"choices": [{"text": "a"}]}), "expected 1 with prompt_log"),
    "no JSON": (lambda _: web.Response(text="<html>"), "cannot be read"),
}


@pytest.mark.parametrize("name", BAD_ANSWERS)
def test_a_wrong_answer_is_a_bad_score_that_says_what_is_wrong(name: str) -> None:
    answer, words = BAD_ANSWERS[name]
    with pytest.raises(BadScore, match=words):
        score_once([answer])


def test_a_bad_score_leaves_the_teacher_usable() -> None:
    server = FakeServer(script=[status(400)])

    async def scenario() -> None:
        async with teacher_of(server) as teacher:
            with pytest.raises(BadScore):
                await teacher.score(ONE, SAMPLED)
            await teacher.score(ONE, SAMPLED)

    asyncio.run(scenario())


def test_requests_go_to_the_replica_with_the_fewest_and_no_more_at_once_than_allowed() -> None:
    a, b = FakeServer(delay_s=0.05), FakeServer(delay_s=0.05)

    async def scenario() -> None:
        async with teacher_of(a, b, max_concurrent_requests=4) as teacher:
            await asyncio.sleep(0.1)  # both are known to be up
            await asyncio.gather(*(teacher.score(GROUP, SAMPLED) for _ in range(6)))

    asyncio.run(scenario())
    assert len(a.requests) == len(b.requests) == 6
    assert a.max_running == b.max_running == 2


def test_what_a_busy_replica_turns_away_goes_to_another() -> None:
    a, b = FakeServer(script=[status(429)] * 9), FakeServer()

    async def scenario() -> None:
        async with teacher_of(a, b) as teacher:
            await asyncio.sleep(0.1)
            for _ in range(3):
                await teacher.score(ONE, SAMPLED)

    asyncio.run(scenario())
    assert len(a.requests) == len(b.requests) == 3


def test_a_dead_replica_is_set_aside_and_taken_back() -> None:
    a, b = FakeServer(), FakeServer()

    async def scenario() -> None:
        async with teacher_of(a, b) as teacher:
            await asyncio.sleep(0.1)
            await a.stop()
            for _ in range(4):
                await teacher.score(GROUP, SAMPLED)
            assert not a.requests
            assert len(b.requests) == 8
            a.healthy = False
            probes = a.num_probes
            await a.start()
            while a.num_probes == probes:
                await asyncio.sleep(0.02)
            await teacher.score(GROUP, SAMPLED)
            assert not a.requests, "a server that says it is not well gets nothing"
            a.healthy = True
            while not a.requests:
                await teacher.score(GROUP, SAMPLED)
                await asyncio.sleep(0.02)

    asyncio.run(asyncio.wait_for(scenario(), timeout=15))


def test_requests_wait_for_a_server_that_comes_back() -> None:
    server = FakeServer()

    async def scenario() -> None:
        async with teacher_of(server) as teacher:
            await server.stop()
            scoring = asyncio.create_task(teacher.score(ONE, SAMPLED))
            await asyncio.sleep(0.3)
            assert not scoring.done()
            await server.start()
            _, score = await scoring
            np.testing.assert_array_equal(score.logprobs_N, of_sampled(truth(ONE), ONE))

    asyncio.run(asyncio.wait_for(scenario(), timeout=15))


def test_with_all_replicas_dead_the_teacher_is_down_in_bounded_time() -> None:
    a, b = FakeServer(), FakeServer()

    async def scenario() -> None:
        async with teacher_of(a, b, timeout_s=0.2) as teacher:
            await a.stop()
            await b.stop()
            start = time.perf_counter()
            with pytest.raises(TeacherDown, match="3 attempts") as caught:
                await teacher.score(GROUP, SAMPLED)
            assert time.perf_counter() - start < 2
            for server in (a, b):
                assert f"{server.url}: ClientConnectorError" in str(caught.value)

    asyncio.run(scenario())


def test_a_server_that_never_answers_is_down_in_bounded_time() -> None:
    server = FakeServer()

    async def scenario() -> None:
        async with teacher_of(server, timeout_s=0.2) as teacher:
            server.delay_s = 60
            start = time.perf_counter()
            with pytest.raises(TeacherDown, match=r"/v1/completions: no answer in 0\.2 s"):
                await teacher.score(ONE, SAMPLED)
            assert time.perf_counter() - start < 3

    asyncio.run(scenario())


def test_a_redirect_is_not_followed() -> None:
    away = FakeServer()
    moved = status(307, "moved", Location="http://127.0.0.1:9/v1/completions")
    server = FakeServer(script=[moved] * 3)

    async def scenario() -> None:
        async with running(away), teacher_of(server) as teacher:
            with pytest.raises(TeacherDown, match="answered 307"):
                await teacher.score(ONE, SAMPLED)

    asyncio.run(scenario())


def test_no_server_at_the_start_ends_with_url_and_last_error() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and not listening
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"

        async def scenario() -> None:
            worker = build(HttpTeacherConfig(urls=[url], start_timeout_s=0.3, backoff_s=0.02))
            with pytest.raises(TeacherDown, match=rf"start_timeout_s=0\.3: {url}: ClientConnectorError"):
                await worker.ready()
            await worker.close()

        asyncio.run(scenario())


def test_a_server_that_comes_late_is_waited_for() -> None:
    server = FakeServer()

    async def scenario() -> None:
        async with running(server):
            pass  # now it has a port
        worker = build(config_for(server, start_timeout_s=10))
        starting = asyncio.create_task(worker.ready())
        await asyncio.sleep(0.2)
        async with running(server):
            assert await starting
            await worker.close()

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("models", "asked", "words"),
    [
        (["a", "b"], None, r"teacher\.http\.model=null: the server serves a, b"),
        ([], None, "the server serves no model"),
        (["a"], "c", r"teacher\.http\.model=c: the server serves a"),
    ],
)
def test_a_model_that_is_not_clear_is_refused_at_the_start(models: list[str], asked: str | None, words: str) -> None:
    server = FakeServer(models=models)

    async def scenario() -> None:
        async with running(server):
            worker = build(config_for(server, model=asked))
            with pytest.raises(ValueError, match=words):
                await worker.ready()
            await worker.close()

    asyncio.run(scenario())


def test_too_few_candidates_and_too_short_sequences_are_refused_at_the_start() -> None:
    refusal = "Requested prompt logprobs of 4, which is greater than max allowed: 2"
    server = FakeServer(script=[status(400, refusal)])

    async def scenario() -> None:
        async with running(server):
            worker = build(config_for(server))
            with pytest.raises(ValueError, match=f"first request: .*{refusal}"):
                await worker.ready()
            await worker.close()
            long = HttpTeacherWorker(
                config=config_for(server),
                request=SAMPLED,
                max_model_tokens=64,
                vocab_size=VOCAB_SIZE,
                temperature=1.0,
                equivalent_ids=(),
            )
            with pytest.raises(ValueError, match=r"sequences of 64 tokens, expected at least 65: .*--max-model-len"):
                await long.ready()
            await long.close()

    asyncio.run(scenario())


def test_the_key_is_sent_and_never_shown(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    secret = "sk-very-secret"
    monkeypatch.setenv("TEACHER_KEY", secret)
    server = FakeServer(key=secret, script=[status(503, f"bad key {secret}"), status(400, f"bad key {secret}")])

    async def scenario() -> list[str]:
        async with teacher_of(server, api_key_env="TEACHER_KEY") as teacher:
            with pytest.raises(BadScore) as refused:
                await teacher.score(ONE, SAMPLED)
            assert secret not in repr(vars(teacher))
            server.key = "another"
            worker = build(config_for(server, api_key_env="TEACHER_KEY"))
            with pytest.raises(ValueError, match="answered 401: Unauthorized") as unauthorised:
                await worker.ready()
            await worker.close()
            return [str(refused.value), str(unauthorised.value)]

    with caplog.at_level(logging.DEBUG):
        texts = asyncio.run(scenario())
    assert "bad key ***" in caplog.text
    assert secret not in caplog.text + "".join(texts)


def test_a_key_that_is_not_there_is_named_by_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TEACHER_KEY", raising=False)
    with pytest.raises(ValueError, match="api_key_env=TEACHER_KEY: the environment variable holds no key"):
        build(HttpTeacherConfig(urls=["http://127.0.0.1:1"], api_key_env="TEACHER_KEY"))


def test_a_proxy_of_the_environment_is_not_used_for_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://user:word@127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    score_once([])


def test_classes_of_equivalent_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match=r"objective\.equivalent_tokens"):
        HttpTeacherWorker(
            config=HttpTeacherConfig(urls=["http://127.0.0.1:1"]),
            request=SAMPLED,
            max_model_tokens=32,
            vocab_size=VOCAB_SIZE,
            temperature=1.0,
            equivalent_ids=((1, 2),),
        )
