"""Puts an idle vLLM engine to sleep, so that another process of its GPU has its memory, and wakes it.

Both run on the engine loop's thread. vLLM unmaps the memory of weights and KV cache, which enable_sleep_mode has it
allocate for that, and maps it again at the same addresses; the KV cache and its prefixes are forgotten at either level.
An engine without a GPU only stops scheduling.
"""

from typing import Any

KEEP_WEIGHTS = 1  # vLLM copies them to the machine's pinned memory and back: for weights that nobody else brings
DISCARD_WEIGHTS = 2  # no copy: what is in their place after waking means nothing until all have been loaded


def fall_asleep(engine: Any, *, level: int) -> None:
    """Put an engine without running sequences to sleep; one that sleeps stays asleep.

    Raises RuntimeError when sequences are running: vLLM would abort them.
    """
    if engine.has_unfinished_requests():
        raise RuntimeError("an engine was to sleep while sequences are running; cluster.sleep=false keeps it awake")
    engine.sleep(level=level)


def wake_up(engine: Any) -> None:
    """Give an engine its memory again."""
    if not engine.wake_up():
        raise RuntimeError("vLLM did not wake up completely")
