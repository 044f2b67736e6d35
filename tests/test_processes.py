"""Work on several cores: in real processes."""

import asyncio
import multiprocessing
import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing

import pytest

from tapedeck.errors import TapedeckError, UsageError
from tapedeck.processes import spread


async def squares(number: int) -> AsyncIterator[tuple[int, int, int]]:
    for place in range(3):
        yield number, place, os.getpid()


async def one_wrong(number: int) -> AsyncIterator[int]:
    yield number
    if number == 1:
        raise UsageError("there is no such thing")


class Odd(Exception):
    """It can be pickled, and not be made again."""

    def __init__(self, one: str, other: str) -> None:
        super().__init__(f"{one}, not {other}")


async def one_odd(number: int) -> AsyncIterator[int]:
    yield number
    if number == 1:
        raise Odd("this", "that")


async def one_at_its_end(number: int) -> AsyncIterator[int]:
    yield number
    if number == 1:
        raise EOFError("a file that was cut off")


async def one_killed(number: int) -> AsyncIterator[int]:
    yield number
    if number == 1:
        os.kill(os.getpid(), signal.SIGKILL)


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


async def endless(number: int) -> AsyncIterator[int]:
    while True:
        yield number


@pytest.mark.parametrize("processes", [1, 2])
async def test_every_number_is_worked_at_once_and_what_it_gives_keeps_its_order(processes: int) -> None:
    found = [each async for each in spread(squares, range(5), processes)]
    for number in range(5):
        assert [place for of, place, _ in found if of == number] == [0, 1, 2]
    pids = {pid for *_, pid in found}
    assert len(found) == 15
    assert (pids == {os.getpid()}) is (processes == 1)


async def test_what_the_work_raises_is_raised_here() -> None:
    with pytest.raises(UsageError, match="no such thing"):
        _ = [each async for each in spread(one_wrong, range(3), 2)]


@pytest.mark.parametrize(
    ("work", "says"), [(one_odd, "Odd: this, not that"), (one_at_its_end, "a file that was cut off")]
)
async def test_what_it_raises_is_told_though_it_cannot_be_sent_or_is_what_a_closed_pipe_raises(
    work: Callable[[int], AsyncIterator[int]], says: str
) -> None:
    with pytest.raises((RuntimeError, EOFError), match=says):
        _ = [each async for each in spread(work, range(3), 2)]


async def test_a_process_that_is_killed_between_two_numbers_is_an_error_too() -> None:
    async def until_killed() -> None:
        async for _, place, pid in spread(squares, range(9), 2):
            if place == 2:
                await asyncio.sleep(0.5)  # by then it asks for another number
                child = next(child for child in multiprocessing.active_children() if child.pid == pid)
                child.kill()
                child.join()

    with pytest.raises(TapedeckError, match="exit code -9"):
        await until_killed()
    await ended()


async def test_a_process_that_is_killed_is_an_error_and_the_others_end() -> None:
    with pytest.raises(TapedeckError, match="exit code -9"):
        _ = [each async for each in spread(one_killed, range(3), 2)]
    await ended()


async def test_a_process_that_is_killed_before_it_began_is_an_error_too() -> None:
    with pytest.raises(TapedeckError, match="exit code -9"):
        _ = [each async for each in spread(squares, range(3), 2, killed)]
    await ended()


async def test_who_stops_asking_ends_the_processes() -> None:
    async with aclosing(spread(endless, range(3), 2)) as found:
        assert await anext(found) in (0, 1)
    await ended()


async def ended() -> None:
    for child in multiprocessing.active_children():
        await asyncio.to_thread(child.join, 30)
        assert child.exitcode is not None
