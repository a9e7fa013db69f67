"""Built-in tasks: each makes its own prompts and marks the responses to them, 1.0 for a right one and 0.0 otherwise."""

import random
from dataclasses import dataclass
from typing import Protocol

from opd_ray.data.verifiers import VERIFIERS, Verifier


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskExample:
    """A prompt and the answer that a perfect model gives to it.

    prompt: text before the response, no chat template applied
    answer: text of the response, without the end-of-sequence token
    """

    prompt: str
    answer: str


class Task(Protocol):
    """A source of prompts that can mark its own responses."""

    name: str

    def examples(self, *, num_examples: int, seed: int) -> list[TaskExample]:
        """Return the first `num_examples` of the endless stream that `seed` names."""

    def verify(self, response: str, *, answer: str) -> float:
        """Return 1.0 when the response equals the answer, else 0.0."""


class SortTask:
    """Sort twelve digits: `7+3+...+1=` asks, `13...7` answers.

    Twelve are enough that a 300k-parameter model must learn to count, and few enough that it learns in under a minute.
    """

    name = "sort"
    num_digits = 12

    def examples(self, *, num_examples: int, seed: int) -> list[TaskExample]:
        """Return the first `num_examples` of the endless stream that `seed` names."""
        generator = random.Random(seed)
        return [self._example(generator.choices("0123456789", k=self.num_digits)) for _ in range(num_examples)]

    def verify(self, response: str, *, answer: str) -> float:
        """Return 1.0 when the response equals the answer, white space aside (decoders may put some between tokens)."""
        return float("".join(response.split()) == "".join(answer.split()))

    @staticmethod
    def _example(digits: list[str]) -> TaskExample:
        return TaskExample(prompt="+".join(digits) + "=", answer="".join(sorted(digits)))


class CopyTask:
    """Copy twelve digits: `7+3+...+1==` asks, `73...1` answers."""

    name = "copy"
    num_digits = SortTask.num_digits

    def examples(self, *, num_examples: int, seed: int) -> list[TaskExample]:
        """Return the first `num_examples` of the endless stream that `seed` names."""
        generator = random.Random(seed)
        return [self._example(generator.choices("0123456789", k=self.num_digits)) for _ in range(num_examples)]

    def verify(self, response: str, *, answer: str) -> float:
        """Return 1.0 when the response equals the answer, white space aside (decoders may put some between tokens)."""
        return float("".join(response.split()) == "".join(answer.split()))

    @staticmethod
    def _example(digits: list[str]) -> TaskExample:
        return TaskExample(prompt="+".join(digits) + "==", answer="".join(digits))


TASKS: dict[str, Task] = {"sort": SortTask(), "copy": CopyTask()}


def verifier(name: str) -> Verifier:
    """Return the verifier of the task of this name, or else the verifier of this name.

    Raises ValueError for a name that is neither.
    """
    if name in TASKS:
        task = TASKS[name]
        return lambda response, answer: task.verify(response, answer=answer)
    if name in VERIFIERS:
        return VERIFIERS[name]
    raise ValueError(f"unknown verifier {name!r}: expected one of {', '.join([*TASKS, *VERIFIERS])}")
