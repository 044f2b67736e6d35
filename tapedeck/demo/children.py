"""Child processes: started, started again when they die, ended with their parent."""

import asyncio
import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import psutil  # type: ignore[import-untyped]
import structlog

from tapedeck.errors import TapedeckError, UsageError

log = structlog.get_logger()

_PR_SET_PDEATHSIG = 1
RESTART_S = 0.5
SOON_S = 5.0  # a child that dies this soon after its start ...
TRIES = 5  # ... this many times in a row will not come up


class Spec(NamedTuple):
    """How to run a child now; asked again before each restart."""

    argv: tuple[str, ...]
    log: Path
    stop_signal: signal.Signals
    options: Mapping[str, Any]


def _die_with_parent() -> None:
    """In the child: the kernel kills it when the demo is killed, even with -9 (Linux; elsewhere nothing)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class Child:
    """One supervised process. Its own process group keeps Ctrl+C on the terminal from reaching it."""

    def __init__(self, name: str, spec: Callable[[], Spec], ready: Callable[[], bool] | None = None) -> None:
        self.name = name
        self.restarts = 0
        self._spec = spec
        self._ready = ready
        self._current: Spec | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._watching: asyncio.Task[None] | None = None
        self._stopping = False

    @property
    def pid(self) -> int | None:
        process = self._process
        return process.pid if process is not None and process.returncode is None else None

    def usage(self) -> dict[str, float]:
        """Resident memory in MB and CPU seconds of the process and its children, so far."""
        if self.pid is None:
            return {}
        process = psutil.Process(self.pid)
        family = [process, *process.children(recursive=True)]
        cpu = sum(sum(member.cpu_times()[:2]) for member in family)
        return {"rss_mb": round(sum(m.memory_info().rss for m in family) / 1e6), "cpu_s": round(cpu, 1)}

    async def start(self) -> asyncio.Task[None]:
        """Starts it and watches it from then on; the task ends only by failing, or when it is stopped."""
        await self._spawn()
        self._watching = asyncio.create_task(self._watch(), name=self.name)
        return self._watching

    async def _spawn(self) -> None:
        spec = self._current = await asyncio.to_thread(self._spec)
        with spec.log.open("ab") as file:
            self._process = await asyncio.create_subprocess_exec(
                *spec.argv,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
                preexec_fn=_die_with_parent,
                **spec.options,
            )

    async def wait_ready(self, timeout_s: float) -> None:
        """Waits until it answers; raises TapedeckError with the end of its log if it does not."""
        deadline = time.monotonic() + timeout_s
        while self._ready is not None and not await asyncio.to_thread(self._ready):
            if time.monotonic() > deadline:
                raise TapedeckError(f"{self.name} does not answer after {timeout_s:g} s. {self.last_words()}")
            if self._watching is not None and self._watching.done():
                self._watching.result()
            await asyncio.sleep(0.05)

    async def _watch(self) -> None:
        """Raises UsageError when it exits with 2 (no use to try again), TapedeckError when it never stays."""
        failures = 0
        while True:
            process, started = self._process, time.monotonic()
            assert process is not None
            code = await process.wait()
            if self._stopping:
                return
            if code == 2:
                raise UsageError(f"{self.name}: {self.last_words()}")
            failures = failures + 1 if time.monotonic() - started < SOON_S else 1
            if failures >= TRIES:
                raise TapedeckError(f"{self.name} ended {failures} times in a row. {self.last_words()}")
            log.warning("process ended, starting it again", name=self.name, code=code)
            await asyncio.sleep(RESTART_S * failures)
            if self._stopping:
                return
            self.restarts += 1
            await self._spawn()

    def last_words(self) -> str:
        """The last line of its log, and where the rest is."""
        spec = self._current
        if spec is None:
            return ""
        lines = spec.log.read_text(errors="replace").splitlines() if spec.log.exists() else []
        return f"Last words: {lines[-1][:500] if lines else '(none)'} (log: {spec.log})"

    async def stop(self, timeout_s: float) -> None:
        """Asks it to end and kills it, with its own children, after `timeout_s`."""
        self._stopping = True
        process = self._process
        if process is None or process.returncode is not None:
            return
        assert self._current is not None
        process.send_signal(self._current.stop_signal)
        try:
            await asyncio.wait_for(process.wait(), timeout_s)
        except TimeoutError:
            log.warning("process does not end, killed", name=self.name)
            self.kill()
            await process.wait()

    def kill(self) -> None:
        """Ends it and its process group by force."""
        self._stopping = True
        process = self._process
        if process is not None and process.returncode is None:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                return
