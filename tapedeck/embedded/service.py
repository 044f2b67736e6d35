"""One server as a process: how to run it, find it, know that it is ready, and end it."""

import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]

from tapedeck.embedded.account import Account
from tapedeck.embedded.errors import EmbeddedError

_POLL_S = 0.05
_STOP_S = 10.0


@dataclass(frozen=True)
class Service:
    """A prepared server. Whoever runs it spawns `argv` with `options` and its output appended to `log`."""

    name: str
    """`kafka` or `postgres`."""
    argv: tuple[str, ...]
    """The last two arguments are the same for every start on a data folder and for no other data folder."""
    env: Mapping[str, str]
    """The whole environment, not an addition to the caller's."""
    cwd: Path
    log: Path
    account: Account | None
    """Who to run as; None: as the caller."""
    stop_signal: signal.Signals
    """Ends it quickly and in good order."""
    addresses: Mapping[str, str] = field(repr=False)
    """Environment variables that tell a client where the server is; PostgreSQL's holds the password."""
    probe: Callable[[], bool] = field(repr=False)
    """One try at a real request; True if it was answered."""

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments for `subprocess.Popen` or `asyncio.create_subprocess_exec`.

        They include the user to run as. Python changes the user before it calls `preexec_fn`, so a
        PR_SET_PDEATHSIG set there holds (a change of user clears it).
        """
        options: dict[str, Any] = {"env": dict(self.env), "cwd": self.cwd}
        return options | self.account.options if self.account else options

    def ready(self, timeout_s: float) -> bool:
        """Wait until the server answers a real request; False if it doesn't within `timeout_s`.

        It blocks: from a coroutine call it with `asyncio.to_thread`.
        """
        deadline = time.monotonic() + timeout_s
        while not self.probe():
            if time.monotonic() >= deadline:
                return False
            time.sleep(_POLL_S)
        return True

    def log_tail(self, lines: int = 15) -> str:
        """The last lines of the log, for an error message."""
        try:
            return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])
        except OSError as error:
            return f"(no log: {error})"


_children: list[subprocess.Popen[bytes]] = []
"""Kept, for Python warns when it forgets a child that still runs."""


def spawn(service: Service) -> psutil.Process:
    """Start the server in a session of its own, so that it outlives this process and its terminal."""
    with service.log.open("ab") as log:
        child = subprocess.Popen(
            service.argv,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            **service.options,
        )
    _children.append(child)
    return psutil.Process(child.pid)


def find(service: Service) -> psutil.Process | None:
    """The server's process, whoever started it; None if it doesn't run.

    The process table is asked, not a pid file: nothing to go stale after a crash or when a pid is used again.
    """
    program, marks = Path(service.argv[0]).name, list(service.argv[-2:])
    for process in psutil.process_iter(["cmdline"]):
        command: list[str] = process.info["cmdline"] or []  # none: a zombie, or not ours to see
        if command[-2:] == marks and Path(command[0]).name == program:
            return process
    return None


def refuse_if_running(service: Service) -> None:
    """Raise EmbeddedError if the server already runs: two on one data folder would ruin it."""
    if process := find(service):
        raise EmbeddedError(
            f"{service.name} already runs on {service.cwd} as process {process.pid}. Use it as it is, or stop it first."
        )


def is_alive(process: psutil.Process) -> bool:
    """False also for a zombie, which is only waiting for its parent to take note."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def await_ready(service: Service, process: psutil.Process, timeout_s: float) -> None:
    """Wait until the server answers. Raises EmbeddedError if it dies first or needs over `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not service.ready(timeout_s=0.2):
        if not is_alive(process):
            what = "stopped while it was starting"
        elif time.monotonic() >= deadline:
            what = f"gave no answer within {timeout_s:g} s of its start"
        else:
            continue
        raise EmbeddedError(f"{service.name} {what}. The end of {service.log}:\n{service.log_tail()}")


def terminate(service: Service) -> None:
    """End the server and its children, by force after 10 s; nothing happens if it doesn't run."""
    process = find(service)
    if process is None:
        return
    try:
        family = [process, *process.children(recursive=True)]
        process.send_signal(service.stop_signal)
    except psutil.NoSuchProcess:
        return
    kill(wait_gone(family, _STOP_S))


def wait_gone(processes: list[psutil.Process], timeout_s: float) -> list[psutil.Process]:
    """Wait until the processes have ended; those that haven't within `timeout_s` are returned."""
    deadline = time.monotonic() + timeout_s
    while left := [process for process in processes if is_alive(process)]:
        if time.monotonic() >= deadline:
            break
        time.sleep(_POLL_S / 5)
    _children[:] = [child for child in _children if child.poll() is None]  # take note of those that were ours
    return left


def kill(processes: list[psutil.Process]) -> None:
    """End processes by force and wait until they are gone. Raises EmbeddedError if one stays."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    if left := wait_gone(processes, _STOP_S):
        pids = ", ".join(str(process.pid) for process in left)
        raise EmbeddedError(f"Process {pids} can't be killed: the kernel holds it, perhaps on a broken disk.")
