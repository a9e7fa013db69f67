"""Sends requests to the replicas of an HTTP server: who gets one, what is tried again, when it is given up."""

import asyncio
import ipaddress
import json
import logging
import os
import random
import re
import time
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp

from opd_ray.config.teacher import HttpTeacherConfig
from workers.teacher.errors import BadScore, TeacherDown

_LOG = logging.getLogger(__name__)
_CONNECT_TIMEOUT_S = 10.0  # a machine that is gone must not cost a whole attempt
_MAX_BACKOFF_S = 30.0
_MAX_PROBE_DELAY_S = 5.0
_PROBE_TIMEOUT_S = 5.0
_MAX_MESSAGE_CHARACTERS = 300
_OK, _TOO_MANY_REQUESTS, _SERVER_ERROR = 200, 429, 500


@dataclass(slots=True)
class _Replica:
    url: str
    proxy: str | None
    num_in_flight: int = 0
    fault: str | None = None  # why it is set aside; None: it is healthy


class _Fault(Exception):
    """An attempt failed in a way that another may not."""

    def __init__(
        self, message: str, *, replica: _Replica | None = None, status: int = 0, retry_after_s: float = 0.0
    ) -> None:
        super().__init__(message)
        self.replica = replica
        self.status = status  # of the answer; 0: there was none
        self.retry_after_s = retry_after_s


class Replicas:
    """Servers that all answer alike. A faulty one is set aside and asked at /health until it is well again."""

    def __init__(self, config: HttpTeacherConfig) -> None:
        self._config = config
        self._key = _read_key(config.api_key_env)
        urls = [url.rstrip("/").removesuffix("/v1") for url in config.urls]
        self._replicas = [_Replica(url=url, proxy=_proxy(url)) for url in urls]
        self._slots = asyncio.Semaphore(config.max_concurrent_requests)
        self._any_healthy = asyncio.Event()
        self._probes: set[asyncio.Task[None]] = set()
        self._jitter = random.Random()
        self._session: aiohttp.ClientSession | None = None

    async def open(self) -> None:
        """Wait for the first healthy replica. Raises TeacherDown when there is none in start_timeout_s."""
        if self._session is None:
            self._session = self._new_session()
            for replica in self._replicas:
                replica.fault = "no answer yet"
                self._start_probe(replica)
        limit_s = self._config.start_timeout_s
        try:
            async with asyncio.timeout(limit_s):
                await self._any_healthy.wait()
        except TimeoutError:
            raise TeacherDown(
                f"no teacher server is up after teacher.http.start_timeout_s={limit_s:g}: {self._faults()}"
            ) from None

    async def close(self) -> None:
        """Drop the connections and end the probes."""
        for probe in self._probes:
            probe.cancel()
        await asyncio.gather(*self._probes, return_exceptions=True)
        if self._session is not None:
            await self._session.close()

    async def get(self, path: str) -> bytes:
        """Return the body of the answer; errors as of `post`."""
        return await self._ask("GET", path, None)

    async def post(self, path: str, body: bytes) -> bytes:
        """Send JSON and return the body of the answer.

        Connection errors, timeouts, 5xx and 429 are tried again, up to max_attempts times; any other 4xx raises
        BadScore with the server's message. When all attempts failed: BadScore where the last was answered 500 by a
        server that is well, which is how vLLM answers a sequence whose log-probs are NaN; else TeacherDown.
        """
        return await self._ask("POST", path, body)

    def _new_session(self) -> aiohttp.ClientSession:
        headers = {"Content-Type": "application/json"}
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        return aiohttp.ClientSession(
            headers=headers,
            connector=aiohttp.TCPConnector(limit=0),  # _slots is the limit
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_TIMEOUT_S),
        )

    async def _ask(self, method: str, path: str, body: bytes | None) -> bytes:
        async with self._slots:
            start = time.monotonic()
            fault = _Fault("")
            for attempt in range(self._config.max_attempts):
                if attempt > 0:
                    await asyncio.sleep(max(self._backoff_s(attempt - 1, _MAX_BACKOFF_S), fault.retry_after_s))
                try:
                    replica = await self._healthy(avoid=fault.replica)
                    return await self._attempt(replica, method, path, body)
                except _Fault as error:
                    fault = error
            elapsed_s = time.monotonic() - start
        attempts = f"{self._config.max_attempts} attempts in {elapsed_s:.1f} s"
        if fault.status == _SERVER_ERROR and fault.replica is not None and await self._health(fault.replica) is None:
            raise BadScore(f"{fault}; {attempts}, and the server is well")
        raise TeacherDown(f"the teacher's server is down, {attempts}: {fault}")

    async def _healthy(self, *, avoid: _Replica | None) -> _Replica:
        """Wait for a healthy replica and return the one with the fewest requests, not the last one if possible."""
        try:
            async with asyncio.timeout(self._config.timeout_s):
                while not (healthy := [r for r in self._replicas if r.fault is None]):
                    await self._any_healthy.wait()
        except TimeoutError:
            raise _Fault(self._faults()) from None
        return min(healthy, key=lambda r: (r is avoid, r.num_in_flight))

    async def _attempt(self, replica: _Replica, method: str, path: str, body: bytes | None) -> bytes:
        url, limit_s = replica.url + path, self._config.timeout_s
        replica.num_in_flight += 1
        try:
            async with asyncio.timeout(limit_s), self._request(replica, method, path, body) as response:
                content = await response.read()
        except (aiohttp.ClientError, OSError) as error:  # a TimeoutError is an OSError
            words = self._shown(f"{type(error).__name__} {error}") if str(error) else f"no answer in {limit_s:g} s"
            self._set_aside(replica, words)
            raise _Fault(f"{url}: {words}", replica=replica) from None
        finally:
            replica.num_in_flight -= 1
        if response.status == _OK:
            return content
        words = f"answered {response.status}: {self._shown(_message(content))}"
        if 400 <= response.status < 500 and response.status != _TOO_MANY_REQUESTS:
            raise BadScore(f"{url} {words}")
        if response.status != _TOO_MANY_REQUESTS:
            self._set_aside(replica, words)
        retry_after_s = min(_retry_after_s(response.headers.get("Retry-After", "")), limit_s)
        raise _Fault(f"{url} {words}", replica=replica, status=response.status, retry_after_s=retry_after_s)

    def _request(
        self, replica: _Replica, method: str, path: str, body: bytes | None = None
    ) -> AbstractAsyncContextManager[aiohttp.ClientResponse]:
        assert self._session is not None, "open() comes first"
        return self._session.request(method, replica.url + path, data=body, proxy=replica.proxy, allow_redirects=False)

    def _set_aside(self, replica: _Replica, fault: str) -> None:
        newly = replica.fault is None
        replica.fault = fault
        if not newly:
            return
        _LOG.warning("teacher server %s set aside: %s", replica.url, fault)
        if all(r.fault is not None for r in self._replicas):
            self._any_healthy.clear()
        self._start_probe(replica)

    def _start_probe(self, replica: _Replica) -> None:
        probe = asyncio.create_task(self._probe(replica))
        self._probes.add(probe)
        probe.add_done_callback(self._probes.discard)

    async def _probe(self, replica: _Replica) -> None:
        """Ask a replica for its health until it is well, and take it back."""
        attempt = 0
        while (fault := await self._health(replica)) is not None:
            replica.fault = fault
            await asyncio.sleep(self._backoff_s(attempt, _MAX_PROBE_DELAY_S))
            attempt += 1
        replica.fault = None
        self._any_healthy.set()
        _LOG.warning("teacher server %s is up", replica.url)

    async def _health(self, replica: _Replica) -> str | None:
        """Return what is wrong with a replica, None if nothing."""
        try:
            async with asyncio.timeout(_PROBE_TIMEOUT_S), self._request(replica, "GET", "/health") as response:
                return None if response.status == _OK else f"/health answered {response.status}"
        except (aiohttp.ClientError, OSError) as error:
            return self._shown(f"{type(error).__name__} {error}") if str(error) else "/health does not answer"

    def _faults(self) -> str:
        return "; ".join(f"{r.url}: {r.fault}" for r in self._replicas)

    def _backoff_s(self, attempt: int, max_s: float) -> float:
        return min(self._config.backoff_s * 2.0**attempt, max_s) * self._jitter.uniform(0.5, 1.0)

    def _shown(self, text: str) -> str:
        """Return text that may be logged: one line, shortened, without the key and without a proxy's password."""
        if self._key is not None:
            text = text.replace(self._key, "***")
        text = " ".join(re.sub(r"//[^/@\s]+@", "//***@", text).split())
        return text if len(text) <= _MAX_MESSAGE_CHARACTERS else text[:_MAX_MESSAGE_CHARACTERS] + " ..."


def _read_key(variable: str | None) -> str | None:
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key or not key.isascii() or not key.isprintable():
        raise ValueError(f"teacher.http.api_key_env={variable}: the environment variable holds no key")
    return key


def _proxy(url: str) -> str | None:
    """Return the environment's proxy for a URL; a loopback address has none."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    if _is_loopback(host) or proxy_bypass(host):
        return None
    proxy = getproxies().get(parts.scheme)
    if proxy is not None and urlsplit(proxy).scheme not in ("http", "https"):
        raise ValueError(
            f"the environment's {parts.scheme}_proxy is no http://host:port; change it, or name {host} in no_proxy"
        )
    return proxy


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _message(content: bytes) -> str:
    """Return the server's message, whether it is `{"error": {"message": ...}}`, `{"error": ...}` or plain text."""
    text = content.decode(errors="replace")
    try:
        error = json.loads(text)["error"]
        return str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, KeyError, TypeError):
        return text


def _retry_after_s(header: str) -> float:
    """Return the seconds a Retry-After header asks for, be it a number or a date; 0 where there is none."""
    if header.isdigit():
        return float(header)
    try:
        return max((parsedate_to_datetime(header) - datetime.now(UTC)).total_seconds(), 0.0)
    except (ValueError, TypeError):
        return 0.0
