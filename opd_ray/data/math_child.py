"""The process that compares mathematical expressions by math-verify, whose own deadlines need a main thread."""

from math_verify import parse, verify

from opd_ray.data.marking_child import serve


def is_right(response: str, answer: str) -> bool:
    """Whether the response's last expression equals the answer, a formula with or without dollar signs.

    Deadlines are the caller's, who kills this process.
    """
    is_marked = "$" in answer or "\\boxed" in answer or "\\(" in answer
    expected = parse(answer if is_marked else f"${answer}$", parsing_timeout=None)
    expected = expected or parse(answer, parsing_timeout=None)
    given = parse(response, parsing_timeout=None)
    return bool(verify(expected, given, timeout_seconds=None))


if __name__ == "__main__":
    is_right("$x^2+1$", "1+x^2")  # what the libraries set up at the first question takes no time of an answer's
    serve(is_right)
