"""Commands in turn: the engine sees the same whatever order they arrive in."""

import asyncio
import itertools
from concurrent.futures import Future
from typing import Any

import pytest

from workers.rollout.turns import Turn, Turns

TIMEOUT_S = 10


class FakeLoop:
    """Notes what is submitted; finishes it when told to."""

    def __init__(self) -> None:
        self.events: list[Any] = []
        self.running: list[Future[Any]] = []

    def submit_together(self, sequences: Any, *, cache_salt: str) -> list[Future[Any]]:
        self.events.append((cache_salt, [name for name, _ in sequences]))
        self.running = [Future() for _ in sequences]
        return self.running

    def finish(self) -> None:
        for future in self.running:
            future.set_result("finished")


def group(name: str) -> list[tuple[Any, Any]]:
    return [(f"{name}{sample}", None) for sample in range(2)]


async def until(holds: Any) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        while not holds():
            await asyncio.sleep(0)


@pytest.mark.parametrize("order", itertools.permutations(range(4)))
def test_rounds_reach_the_engine_whole_in_order_and_alone_however_they_arrive(order: tuple[int, ...]):
    async def scenario() -> None:
        loop = FakeLoop()
        turns = Turns(loop)
        commands = [(0, 0, "a"), (0, 1, "b"), (2, 0, "c"), (2, 1, "d")]

        async def load() -> None:
            async with turns.alone(1):
                loop.events.append("load")

        tasks = [asyncio.create_task(load())]
        for position in order:
            number, index, name = commands[position]
            tasks.append(asyncio.create_task(turns.submit(Turn(number=number, index=index, size=2), group(name))))
            await asyncio.sleep(0)
        await until(lambda: loop.events)
        await asyncio.sleep(0.01)
        first = ("turn 0", ["a0", "a1", "b0", "b1"])
        assert loop.events == [first]  # the load and the second round wait
        loop.finish()
        await until(lambda: len(loop.events) == 3)
        assert loop.events == [first, "load", ("turn 2", ["c0", "c1", "d0", "d1"])]
        loop.finish()
        await asyncio.gather(*tasks)

    asyncio.run(scenario())


def test_each_group_has_its_own_futures():
    async def scenario() -> None:
        loop = FakeLoop()
        turns = Turns(loop)
        second = asyncio.create_task(turns.submit(Turn(number=0, index=1, size=2), group("b")))
        first = asyncio.create_task(turns.submit(Turn(number=0, index=0, size=2), group("a")))
        assert (await first, await second) == (loop.running[:2], loop.running[2:])
        loop.finish()

    asyncio.run(scenario())


def test_a_command_that_fails_does_not_hold_up_the_next():
    async def scenario() -> None:
        turns = Turns(FakeLoop())
        with pytest.raises(RuntimeError):
            async with turns.alone(0):
                raise RuntimeError("torn")
        async with asyncio.timeout(TIMEOUT_S), turns.alone(1):
            pass

    asyncio.run(scenario())


def test_a_sequence_that_fails_does_not_hold_up_the_next_round():
    async def scenario() -> None:
        loop = FakeLoop()
        turns = Turns(loop)
        await turns.submit(Turn(number=0), group("a"))
        for future in loop.running:
            future.set_exception(RuntimeError("too long"))
        async with asyncio.timeout(TIMEOUT_S):
            await turns.submit(Turn(number=1), group("b"))
        loop.finish()

    asyncio.run(scenario())
