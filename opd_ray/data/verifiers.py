"""Verifiers: how a response to a prompt with a reference answer is marked, 1.0 for a right one and 0.0 otherwise."""

import re
from collections.abc import Callable

from opd_ray.data.math_answers import verify_math
from opd_ray.data.reasoning import verify_reasoning

Verifier = Callable[[str, str], float]
"""(response, answer) -> 1.0 or 0.0"""

# The forms in which an option is stated, the last one in the response counts: \boxed{B}, "answer is B", "Answer: B".
_STATED = re.compile(
    r"\\boxed\{\s*(?:\\(?:text|textbf|mathrm|mathbf)\{)?\(?([A-Z])\)?\}?\s*\}"
    r"|\b(?i:answer)\**(?:\s+is)?\s*:?[\s*$]*(?:(?i:option)\s+)?\(?([A-Z])\b(?<!I(?='|\s[a-z]))"
)
_BRACKETED = re.compile(r"\(([A-Z])\)")
_ALONE = re.compile(r"\s*[*$]*\(?([A-Z])\)?[.*$]*\s*")


def verify_exact(response: str, answer: str) -> float:
    """Return 1.0 when the texts are equal, white space at either end aside."""
    return float(response.strip() == answer.strip())


def verify_numeric(response: str, answer: str) -> float:
    """Return 1.0 when the last number of the response equals the last number of the answer.

    Commas between digits are dropped. A response without a number is wrong; an answer without one raises ValueError.
    """
    expected = _last_number(answer)
    if expected is None:
        raise ValueError(f"verifier 'numeric' expects an answer that holds a number, was given {answer!r}")
    return float(_last_number(response) == expected)


def verify_choice(response: str, answer: str) -> float:
    r"""Return 1.0 when the option that the response states last is the answer's: an option is a capital letter.

    It is alone on the last line, else stated as `\boxed{B}` or "answer: B", else as "(B)". An answer that is no such
    letter, bracketed or not, raises ValueError.
    """
    expected = _ALONE.fullmatch(answer)
    if expected is None:
        raise ValueError(f"verifier 'choice' expects an answer that is one capital letter, was given {answer!r}")
    return float(_stated_option(response) == expected[1])


VERIFIERS: dict[str, Verifier] = {
    "exact": verify_exact,
    "numeric": verify_numeric,
    "choice": verify_choice,
    "math": verify_math,
    "reasoning_gym": verify_reasoning,
}

SLOW_VERIFIERS = frozenset({"math", "reasoning_gym"})
"""Those that may take seconds for one response: no event loop should wait for them."""


def _last_number(text: str) -> float | None:
    numbers = re.findall(r"(?<![\d.])-?\d+(?:\.\d+)?|-?\.\d+", text.replace(",", ""))
    return float(numbers[-1]) if numbers else None


def _stated_option(response: str) -> str | None:
    lines = [line for line in response.splitlines() if line.strip()]
    alone = _ALONE.fullmatch(lines[-1]) if lines else None
    if alone:
        return alone[1]
    stated = [boxed or said for boxed, said in _STATED.findall(response)] or _BRACKETED.findall(response)
    return str(stated[-1]) if stated else None
