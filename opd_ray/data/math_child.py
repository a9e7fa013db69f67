"""The process that compares mathematical expressions: a line of JSON in, a line of JSON out, until the input ends.

It is one that can be killed: an expression may take for ever, inside a call that no signal interrupts.
"""

import json
import sys

from math_verify import parse, verify


def is_right(response: str, answer: str) -> bool:
    """Whether the response's last expression equals the answer, a formula with or without dollar signs.

    Deadlines are the caller's, who kills this process.
    """
    is_marked = "$" in answer or "\\boxed" in answer or "\\(" in answer
    expected = parse(answer if is_marked else f"${answer}$", parsing_timeout=None)
    expected = expected or parse(answer, parsing_timeout=None)
    given = parse(response, parsing_timeout=None)
    return bool(verify(expected, given, timeout_seconds=None))


def main() -> None:
    """Answer until the one who asks is gone."""
    for line in sys.stdin:
        response, answer = json.loads(line)
        try:
            right = is_right(response, answer)
        except Exception:  # noqa: BLE001 - what cannot be compared is not right
            right = False
        print(json.dumps(right), flush=True)


if __name__ == "__main__":
    main()
