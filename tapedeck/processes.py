"""Work that falls into numbered pieces, on several cores."""

import asyncio
import multiprocessing
import pickle
import signal
import traceback
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any, TypeVar

from tapedeck.errors import TapedeckError
from tapedeck.garbage import collect_seldom

T = TypeVar("T")
Work = Callable[[int], AsyncIterator[T]]
_spawn = multiprocessing.get_context("spawn")


async def spread(
    work: Work[T], numbers: Iterable[int], processes: int, begin: Callable[[], object] = int
) -> AsyncIterator[T]:
    """What the work gives for every number, that of one number in order. With one process it is done in this one;
    otherwise each begins with `begin`, and waits where nobody takes what it gives. `work`, `begin` and what is given
    are pickled. Raises what the work raises, and TapedeckError when a process ends before its work does."""
    waiting = iter(list(numbers))
    if processes == 1:
        for number in waiting:
            async for found in work(number):
                yield found
        return
    children: dict[Any, SpawnProcess] = {}  # by the pipe to each
    try:
        for _, number in zip(range(processes), waiting):  # noqa: B905 - whichever ends first
            ours, theirs = _spawn.Pipe()
            ours.send(number)  # it waits in the pipe, should the child end before it looks
            child = _spawn.Process(target=_run, args=(theirs, work, begin), daemon=True)
            child.start()
            children[ours] = child
            theirs.close()  # so that its end is seen
        while children:
            for pipe in await asyncio.to_thread(_ready, list(children)):
                following = None
                try:
                    found = pipe.recv()
                    if found is None and (following := next(waiting, None)) is not None:
                        pipe.send(following)
                except (EOFError, ConnectionError):  # the latter where it left something unread
                    children[pipe].join()
                    raise TapedeckError(
                        f"a process that was to help ended by itself (exit code {children[pipe].exitcode}; -9: it was "
                        "killed, perhaps for want of memory): run it again"
                    ) from None
                if isinstance(found, BaseException):
                    raise found
                if found is not None:
                    yield found
                elif following is None:
                    children.pop(pipe).terminate()
    finally:
        for child in children.values():
            child.terminate()


def _ready(pipes: list[Any]) -> list[Any]:
    return wait(pipes)


def _run(pipe: Connection, work: Work[Any], begin: Callable[[], object]) -> None:
    """A child: numbers in; what the work gives out, None after the last of a number, or why it failed."""
    collect_seldom()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl+C goes to all, and the parent ends us
    try:
        begin()
        asyncio.run(_give(pipe, work))
    except Exception as error:
        with suppress(BrokenPipeError):  # the parent is gone
            pipe.send(_carried(error))


def _carried(error: Exception) -> Exception:
    """An error that can be sent: the same, or what it says."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        error = RuntimeError(f"{type(error).__name__}: {error}")
    error.add_note(traceback.format_exc())
    return error


async def _give(pipe: Connection, work: Work[Any]) -> None:
    while True:
        number = pipe.recv()
        async for found in work(number):
            pipe.send(found)
        pipe.send(None)
