"""A server that speaks as vLLM's does and says what a test makes it say: defects that a real one shows too rarely."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = tuple[int, Any]  # HTTP status and JSON
Defect = Callable[[Any], Answer]  # what becomes of a sound answer


def nan(answer: Any) -> Answer:
    """A NaN for the last token."""
    for candidate in answer["choices"][0]["prompt_logprobs"][-1].values():
        candidate["logprob"] = float("nan")
    return 200, answer


def short(answer: Any) -> Answer:
    """Nothing of the last token."""
    answer["choices"][0]["prompt_logprobs"].pop()
    return 200, answer


def refused(_: Any) -> Answer:
    """The sequence is not taken."""
    return 400, {"error": {"message": "this sequence is not taken"}}


def failed(_: Any) -> Answer:
    """What vLLM answers when it cannot write NaN as JSON; /health stays well."""
    return 500, {"error": {"message": "Out of range float values are not JSON compliant"}}


@dataclass
class StubServer:
    """Gives every token a log-prob by its id alone. `defect` says by the request's number, from 1, what goes wrong."""

    defect: Callable[[int], Defect | None] = lambda _: None
    num_requests: int = 0
    port: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def url(self) -> str:
        """Return where it listens."""
        return f"http://127.0.0.1:{self.port}"

    def answer(self, body: Any) -> Answer:
        """Answer `/v1/completions`."""
        with self._lock:
            self.num_requests += 1
            defect = self.defect(self.num_requests)
        positions = [None] + [{str(id_): {"logprob": -1.5 - 0.1 * (id_ % 7)}} for id_ in body["prompt"][1:]]
        sound = {"choices": [{"index": 0, "text": "", "prompt_logprobs": positions}]}
        return defect(sound) if defect else (200, sound)


@contextmanager
def serving(stub: StubServer) -> Iterator[None]:
    """Serve a stub on a free port of the loopback until the context is left."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._send(200, {"data": [{"id": "stub", "max_model_len": 64}]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self._send(*stub.answer(body))

        def _send(self, status: int, content: Any) -> None:
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: Any) -> None:
            """A client that hangs up is no fault of the server's."""

    server = Server(("127.0.0.1", 0), Handler)
    stub.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
