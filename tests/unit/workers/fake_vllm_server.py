"""A vLLM server of a small made-up model, on this machine's loopback, for tests of the HTTP teacher."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from aiohttp import web

VOCAB_SIZE = 12
Answer = dict[str, Any]


def model_logprobs(ids: list[int]) -> np.ndarray:
    """Return log-probs float32 [len(ids), VOCAB_SIZE] of the made-up model: row i is its opinion on token i."""
    rows = [np.random.default_rng([7, *ids[:i]]).normal(0, 3, VOCAB_SIZE) for i in range(len(ids))]
    logits = np.stack(rows)
    return (logits - np.log(np.exp(logits).sum(1, keepdims=True))).astype(np.float32)


def completion(request: dict[str, Any]) -> Answer:
    """Answer as `/v1/completions` of vLLM 0.32 does: the token itself first, then the likeliest in order."""
    ids, top_k = request["prompt"], request["prompt_logprobs"]
    logprobs = model_logprobs(ids)
    positions: list[dict[str, Any] | None] = [None]
    for token, row in zip(ids[1:], logprobs[1:], strict=True):
        order = np.argsort(-row)
        rank = int(np.flatnonzero(order == token)[0]) + 1
        listed = {token: rank} | {int(i): r + 1 for r, i in enumerate(order[:top_k])}
        positions.append(
            {str(i): {"logprob": float(row[i]), "rank": r, "decoded_token": f'"{i}'} for i, r in listed.items()}
        )
    choice = {
        "index": 0,
        "text": " a",
        "logprobs": None,
        "finish_reason": "length",
        "stop_reason": None,
        "token_ids": None,
        "prompt_logprobs": positions,
        "prompt_token_ids": None,
    }
    usage = {"prompt_tokens": len(ids), "total_tokens": len(ids) + 1, "completion_tokens": 1}
    return {"id": "cmpl-1", "object": "text_completion", "model": request["model"], "choices": [choice], "usage": usage}


@dataclass
class FakeServer:
    """Answers `/v1/completions` as the next entry of `script` says, and rightly when it is used up."""

    script: list[Callable[[Answer], web.Response]] = field(default_factory=list)
    models: list[str] = field(default_factory=lambda: ["made-up"])
    key: str | None = None
    healthy: bool = True
    delay_s: float = 0.0
    port: int = 0  # 0: a free one
    num_probes: int = 0
    num_running: int = 0
    max_running: int = 0
    requests: list[dict[str, Any]] = field(default_factory=list)
    _runner: web.AppRunner | None = None

    @property
    def url(self) -> str:
        """Return where the server listens, or did."""
        return f"http://127.0.0.1:{self.port}"

    async def start(self) -> None:
        """Listen, on the port of before if there was one."""
        app = web.Application()
        app.router.add_get("/health", self._health)
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/completions", self._completions)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port, reuse_address=True)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        """Refuse connections and drop those that are open."""
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def _health(self, _: web.Request) -> web.Response:
        self.num_probes += 1
        return web.Response(status=200 if self.healthy else 503)

    async def _models(self, request: web.Request) -> web.Response:
        if self.key is not None and request.headers.get("Authorization") != f"Bearer {self.key}":
            given = request.headers.get("Authorization")
            return web.json_response({"error": f"Unauthorized: {given}"}, status=401)
        cards = [{"id": name, "object": "model", "max_model_len": 64} for name in self.models]
        return web.json_response({"object": "list", "data": cards})

    async def _completions(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.requests.append(body)
        self.num_running += 1
        self.max_running = max(self.max_running, self.num_running)
        try:
            await asyncio.sleep(self.delay_s)
        finally:
            self.num_running -= 1
        answer = completion(body)
        return self.script.pop(0)(answer) if self.script else web.json_response(answer)


@asynccontextmanager
async def running(*servers: FakeServer) -> AsyncIterator[None]:
    """Start servers and stop them on leaving."""
    for server in servers:
        await server.start()
    try:
        yield
    finally:
        for server in servers:
            await server.stop()


def good(answer: Answer) -> web.Response:
    """Answer as the model says."""
    return web.json_response(answer)


def status(code: int, message: str = "no", **headers: str) -> Callable[[Answer], web.Response]:
    """Answer with an error as vLLM words it."""
    body = {"error": {"message": message, "type": "Error", "param": None, "code": code}}
    return lambda _: web.json_response(body, status=code, headers={k.replace("_", "-"): v for k, v in headers.items()})


def changed(change: Callable[[list[Any]], None]) -> Callable[[Answer], web.Response]:
    """Answer with the list of positions changed."""

    def answer(answer: Answer) -> web.Response:
        change(answer["choices"][0]["prompt_logprobs"])
        return web.Response(body=json.dumps(answer).encode(), content_type="application/json")

    return answer
