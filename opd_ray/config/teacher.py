"""The configuration of teachers that are more than an engine with fixed weights of its own and the student's tokens."""

from dataclasses import dataclass, field
from enum import StrEnum
from string import Formatter
from urllib.parse import urlsplit


class TeacherKind(StrEnum):
    """Where a teacher runs."""

    vllm = "vllm"  # engines of this run
    http = "http"  # vLLM servers elsewhere
    cache = "cache"  # an earlier run, whose responses and scores were recorded
    self = "self"  # engines of this run on the student's own weights: on-policy self-distillation


class SelfUpdate(StrEnum):
    """What becomes of the weights of a teacher that is the student."""

    frozen = "frozen"  # those the student starts from
    ema = "ema"  # an exponential moving average of the student's


class AlignmentKind(StrEnum):
    """What to do about a teacher's tokens."""

    none = "none"  # they must be the student's
    bytes = "bytes"  # compare spans of text that both tokenizers bound


def _require(holds: bool, key: str, given: object, expected: str) -> None:
    if not holds:
        raise ValueError(f"teacher.http.{key}={given}: expected {expected}")


@dataclass(kw_only=True, slots=True)
class SelfTeacherConfig:
    """kind=self: how the teacher follows the student."""

    update: SelfUpdate = SelfUpdate.frozen
    ema_decay: float = 0.99  # update=ema: what an update keeps of the average; 0: always the current student

    def __post_init__(self) -> None:
        if not 0 <= self.ema_decay <= 1:
            raise ValueError(f"teacher.self.ema_decay={self.ema_decay}: expected a number in [0, 1]")


@dataclass(kw_only=True, slots=True)
class HttpTeacherConfig:
    """A teacher behind vLLM servers with an OpenAI-compatible API, all serving the same model.

    A request is given up after max_attempts attempts of timeout_s at most, waiting for a replica included.
    """

    urls: list[str] = field(default_factory=list)  # one a replica, such as http://host:8000; /v1 at the end is dropped
    model: str | None = None  # the name it is served under; null: the server's only one
    api_key_env: str | None = None  # the environment variable that holds the key, never the key; null: no key
    timeout_s: float = 120.0  # of one attempt
    max_attempts: int = 6
    backoff_s: float = 0.5  # before the second attempt; doubles with each
    max_concurrent_requests: int = 64  # sequences sent at once, per worker
    start_timeout_s: float = 600.0  # until the first replica answers

    def __post_init__(self) -> None:
        _require(len(self.urls) > 0, "urls", self.urls, "at least one URL, such as [http://host:8000]")
        for index, url in enumerate(self.urls):
            _check_url(f"urls[{index}]", url)
        _require(len(set(self.urls)) == len(self.urls), "urls", self.urls, "different URLs")
        variable = self.api_key_env
        if variable is not None and not (variable.isidentifier() and variable.isascii()):
            raise ValueError(
                "teacher.http.api_key_env is no name of an environment variable (not shown here: it may be the key"
                " itself); export the key in a variable and give the variable's name"
            )
        for name in ("timeout_s", "start_timeout_s", "backoff_s"):
            _require(getattr(self, name) > 0, name, getattr(self, name), "a number above 0")
        for name in ("max_attempts", "max_concurrent_requests"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "an integer of at least 1")


@dataclass(kw_only=True, slots=True)
class CacheTeacherConfig:
    """Responses and scores recorded by an earlier run with record_scores=true: offline distillation."""

    path: str  # that run's scores/ folder
    verify: bool = True  # read all of it before the start and compare checksums; rows are checked when read in any case


def _check_url(key: str, url: str) -> None:
    parts = urlsplit(url)
    if "@" in url:
        raise ValueError(f"teacher.http.{key} holds credentials; use teacher.http.api_key_env instead")
    whole = parts.scheme in ("http", "https") and bool(parts.hostname) and not (parts.query or parts.fragment)
    _require(whole, key, url, "http://host:port or https://host:port")


CONTEXT_FIELDS = ("prompt", "answer")


def check_context(template: str) -> None:
    """Raise ValueError unless a template of teacher.context holds {prompt}, and no placeholder that is not known."""
    expected = "expected a text with {prompt}, and by choice {answer}"
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"teacher.context={template!r}: {error}; write {{{{ and }}}} for braces") from None
    placeholders = [(name, conversion, form) for _, name, form, conversion in parts if name is not None]
    for name, conversion, form in placeholders:
        if name not in CONTEXT_FIELDS or conversion or form:
            given = name + (f"!{conversion}" if conversion else "") + (f":{form}" if form else "")
            raise ValueError(
                f"teacher.context={template!r}: {{{given}}} is no placeholder, {expected}; write {{{{ and }}}} for"
                " braces"
            )
    if "prompt" not in [name for name, _, _ in placeholders]:
        raise ValueError(f"teacher.context={template!r}: the teacher would not see the prompt, {expected}")


def shows_answer(template: str) -> bool:
    """Return whether a template of teacher.context needs a reference answer."""
    return any(name == "answer" for _, name, _, _ in Formatter().parse(template))
