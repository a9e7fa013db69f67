"""Takes commands in one canonical order, however they arrive: what an engine computes then depends on nothing else.

The last bits of an engine's results depend on which sequences share a step. In turn, each round of groups is handed to
the engine at once, in order, and has it alone.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from workers.engine_loop import EngineLoop

_Sequences = Sequence[tuple[Any, Any]]  # token ids and parameters


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """The place of one command in a worker's order."""

    number: int  # counts from 0 without a gap
    index: int = 0  # of a group in its round
    size: int = 1  # groups of the round


class Turns:
    """The order of one worker's commands."""

    def __init__(self, loop: EngineLoop) -> None:
        self._loop = loop
        self._next = 0
        self._changed = asyncio.Condition()
        self._rounds: dict[int, dict[int, tuple[_Sequences, asyncio.Future[Any]]]] = {}
        self._tasks = set[asyncio.Task[None]]()

    @asynccontextmanager
    async def alone(self, number: int) -> AsyncIterator[None]:
        """Wait until all commands before this one are over; it is over at the end of the block, also by an error."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._next == number)
        try:
            yield
        finally:
            async with self._changed:
                self._next += 1
                self._changed.notify_all()

    async def submit(self, turn: Turn, sequences: _Sequences) -> list[Any]:
        """Hand in a group of a round, and return its sequences' futures once the whole round is with the engine."""
        submitted: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        groups = self._rounds.setdefault(turn.number, {})
        groups[turn.index] = (sequences, submitted)
        if len(groups) == turn.size:
            task = asyncio.create_task(self._run(turn.number))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        futures: list[Any] = await submitted
        return futures

    async def _run(self, number: int) -> None:
        async with self.alone(number):
            groups = [group for _, group in sorted(self._rounds.pop(number).items())]
            # A salt of its own: what earlier rounds have cached must not matter.
            futures = iter(
                self._loop.submit_together(
                    [s for sequences, _ in groups for s in sequences], cache_salt=f"turn {number}"
                )
            )
            of_groups = [[next(futures) for _ in sequences] for sequences, _ in groups]
            for (_, submitted), of_group in zip(groups, of_groups, strict=True):
                submitted.set_result(of_group)
            running = [asyncio.wrap_future(future) for of_group in of_groups for future in of_group]
            await asyncio.gather(*running, return_exceptions=True)
