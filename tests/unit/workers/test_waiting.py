import threading
from typing import Any

import pytest
from ray.exceptions import GetTimeoutError

from workers import waiting
from workers.waiting import answers, finished, waiting_at_most


class FakeRay:
    """Has the answers that are there; the others never come."""

    def __init__(self, **there: int) -> None:
        self._there = there

    def get(self, refs: list[str], timeout: float | None = None) -> list[int]:
        if any(ref not in self._there for ref in refs):
            assert timeout is not None, "waits without end"
            raise GetTimeoutError("not ready")
        return [self._there[ref] for ref in refs]

    def wait(
        self, refs: list[str], *, num_returns: int, timeout: float | None, **_: Any
    ) -> tuple[list[str], list[str]]:
        there = [ref for ref in refs if ref in self._there][:num_returns]
        assert len(there) == num_returns or timeout is not None, "waits without end"
        return there, [ref for ref in refs if ref not in there]


@pytest.fixture(autouse=True)
def fake_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "ray", FakeRay(a=1, b=2))


def test_answers_that_are_there_are_returned_with_and_without_a_limit():
    assert answers(["b", "a"]) == [2, 1]
    with waiting_at_most(3):
        assert answers(["b", "a"]) == [2, 1]
        assert finished(["c", "b", "a"], num_refs=1) == ["b"]


def test_an_answer_that_does_not_come_is_given_up_on_any_thread():
    raised: list[Exception] = []

    def ask() -> None:
        try:
            answers(["c"])
        except GetTimeoutError as error:
            raised.append(error)

    with waiting_at_most(3):
        thread = threading.Thread(target=ask)
        thread.start()
        thread.join()
        with pytest.raises(GetTimeoutError, match="1 of 3 answers are owed for 3 s"):
            finished(["c", "b", "a"], num_refs=3)
    assert len(raised) == 1
