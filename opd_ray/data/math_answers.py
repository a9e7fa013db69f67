"""Marks mathematical answers by math-verify, in a process that is killed when an expression takes too long."""

from opd_ray.data.marking_process import MarkingProcess

_PROCESS = MarkingProcess("opd_ray.data.math_child")


def verify_math(response: str, answer: str) -> float:
    """Return 1.0 when the response's last expression equals the answer, as numbers, sets or formulas do.

    Raises ValueError for an empty answer.
    """
    if not answer.strip():
        raise ValueError("verifier 'math' expects an expression as the answer, was given an empty one")
    return _PROCESS.mark(response, answer)
