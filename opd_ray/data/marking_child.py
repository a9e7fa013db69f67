"""What a marking process does: a line of JSON in, a line of JSON out, until the input ends.

Such a process can be killed: an expression may take for ever, inside a call that no signal handler interrupts.
"""

import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from typing import Any

_MAX_BYTES = 8 << 30  # of address space: a number of a thousand million digits ends here, not in the node's memory
_GRACE_S = 10.0  # the one who asks kills first; the alarm is for when that process is gone
_FORBIDDEN = ("os.", "subprocess.", "socket.", "shutil.", "ctypes.", "tempfile.", "pty.", "fcntl.")
_HARMLESS = {"os.listdir", "os.scandir", "os.walk"}  # imports look for files
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def serve(is_right: Callable[[str, str], bool]) -> None:
    """Answer (response, answer) until the one who asks is gone; what raises is not right.

    sys.argv[1]: seconds that an answer may take. Libraries evaluate responses as Python here and there: after the
    imports this process starts no other, writes no file and opens no connection. That is a guard against the
    accidents of sampling, not a sandbox.
    """
    deadline_s = float(sys.argv[1]) + _GRACE_S
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a library prints is no answer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a run that is interrupted still marks its last responses
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process, even inside a call
    resource.setrlimit(resource.RLIMIT_AS, (_MAX_BYTES, resource.getrlimit(resource.RLIMIT_AS)[1]))
    sys.dont_write_bytecode = True
    sys.addaudithook(_guard)
    for line in sys.stdin:
        response, answer = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, deadline_s)
        try:
            right = is_right(response, answer)
        except Exception:  # noqa: BLE001 - what cannot be compared is not right
            right = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps(right), file=answers, flush=True)


def _guard(event: str, arguments: tuple[Any, ...]) -> None:
    """Refuse what no calculation needs."""
    writes = event == "open" and bool(arguments[2] & _WRITES)
    if writes or (event.startswith(_FORBIDDEN) and event not in _HARMLESS):
        raise PermissionError(f"{event} while a response is marked")
