"""Makes faults happen when they are due, ends them, and notes both beside the record."""

import asyncio
import contextlib
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Self

from simulator.connections import Connections
from simulator.faults import Fault, Faults, Incident
from simulator.feed import Feed
from simulator.listener import Listener
from simulator.mischief import junk
from simulator.record import Recorder, fault_line


class Injector:
    """Has a task for each fault that is not over. Leaving its context ends them all."""

    def __init__(
        self, feed: Feed, connections: Connections, listener: Listener, faults: Faults, recorder: Recorder | None
    ) -> None:
        self._feed = feed
        self._connections = connections
        self._listener = listener
        self._faults = faults
        self._recorder = recorder
        self._incidents: dict[str, Incident] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self.broken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Raises when a fault could not be made to happen, or noted."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    @property
    def incidents(self) -> Iterator[Incident]:
        """Every fault ever asked for, in that order."""
        return iter(self._incidents.values())

    def add(self, fault: Fault) -> Incident:
        """Let a fault happen at its time; raises ValueError if its label is taken."""
        label = fault.label or f"{fault.kind}-{len(self._incidents) + 1}"
        if label in self._incidents:
            raise ValueError(f"there is a fault called {label} already")
        incident = self._incidents[label] = Incident(label, fault)
        task = self._tasks[label] = asyncio.create_task(self._run(incident))
        task.add_done_callback(self._check)
        return incident

    async def end(self, label: str) -> None:
        """End a fault, or call it off; it is over on return. Raises KeyError."""
        task = self._tasks[label]
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    async def _run(self, incident: Incident) -> None:
        fault = incident.fault
        try:
            if fault.at_s is not None:
                await self._feed.begun.wait()
                await asyncio.sleep(self._feed.began_s + fault.at_s - time.monotonic())
            incident.state = "active"
            self._note("begin", incident)
            self._faults.begin(incident)
            try:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(fault.seconds):
                        await self._happen(incident)
            finally:
                self._faults.end(incident)
                self._note("end", incident)
        finally:
            incident.state = "over"

    def _check(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None and not self.broken.done():
            self.broken.set_exception(error)

    def _note(self, event: str, incident: Incident) -> None:
        if self._recorder is not None:
            self._recorder.write([fault_line(event, incident, time.time_ns(), self._feed.clock_ns)])

    async def _happen(self, incident: Incident) -> None:
        """Returns when it has happened; what lasts is cancelled when its time is up."""
        fault, connections = incident.fault, self._connections
        match fault.kind:
            case "drop":
                connections.drop()
            case "half-open":
                connections.deafen()
                if fault.seconds is not None:
                    await incident.spent.wait()
            case "close":
                await connections.close(fault.code or 0)
            case "evict":
                await connections.evict(connections.all)
            case "slow-consumer":
                await connections.cut_slow(connections.all)
            case "away":
                await self._be_away(incident)
            case "duplicate":
                for _ in range(fault.count or 1):
                    await self._feed.repeat(incident)
            case "malformed" | "not-array" | "truncated" | "huge":
                message = junk(fault.kind, fault.amount or 0)
                for _ in range(fault.count or 1):
                    await self._feed.inject(message, incident)
            case _:
                await incident.spent.wait()  # others ask which faults are at work

    async def _be_away(self, incident: Incident) -> None:
        self._connections.drop()
        try:
            await self._listener.shut()
            await incident.spent.wait()
        finally:
            await self._listener.open()
