"""Says in a few lines which worker failed and why, from whatever Ray raised."""

import re
from pathlib import Path

from ray.exceptions import GetTimeoutError, RayError

_NUM_LOG_LINES = 15
_PLUMBING = ("/site-packages/ray/", "/concurrent/futures/", "/asyncio/", "/threading.py", "/torch/utils/_contextlib.py")
_NAME = re.compile(r"repr=([a-z]+(?:-[a-z]+)*-\d+)\)|\bname: (\S+)")
_ANSI = re.compile(r"\x1b\[\d+m")
_NOISE = re.compile(
    r"\s*(class_name|actor_id|pid|name|namespace|ip|node_id): |(ray\.exceptions\.\w+: )?ray::|Traceback "
    r"|\s*At least one of the input"
)


def describe(error: RayError, *, log_dir: Path) -> str:
    """Return the worker's name, its own traceback (the plumbing's frames left out) or last words, and its log."""
    if isinstance(error, GetTimeoutError):
        return (
            "a worker owed an answer for longer than fault.call_timeout_s, or fault.start_timeout_s at its start; what"
            f" all did is in {log_dir}"
        )
    text = _ANSI.sub("", str(error))
    names = ["".join(match) for match in _NAME.findall(text)]
    name = names[-1] if names else "a worker"  # a fault that passed through several workers names its origin last
    log_file = log_dir / f"{name}.log"
    if '  File "' in text:
        return f"{name} failed\n{_own_frames(text)}\nits log: {log_file}"
    reasons = [line.strip() for line in text.splitlines() if line.strip() and not _NOISE.match(line)]
    reason = " ".join(reasons).partition(" Some common causes include")[0]  # Ray's guesses; the log knows more
    return f"{name} died: {reason}\n{_log_tail(log_file)}"


def _own_frames(text: str) -> str:
    """Drop the frames (a line `File ...` and what is indented below it) that belong to the plumbing."""
    kept: list[str] = []
    hidden = False
    for line in text.splitlines():
        if line.startswith("  File "):
            hidden = any(part in line for part in _PLUMBING)
        elif not line.startswith("    "):
            hidden = False
        if not hidden and not _NOISE.match(line):
            kept.append(line)
    return "\n".join(kept).strip("\n")


def _log_tail(path: Path) -> str:
    if not path.exists():
        return f"its log {path} is on the worker's own machine"
    lines = path.read_text(errors="replace").splitlines()[-_NUM_LOG_LINES:]
    return "\n".join([f"the end of its log {path}:", *(f"  {line}" for line in lines)])
