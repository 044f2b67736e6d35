"""The shell of every process: signals, /metrics and /health, logs, exit codes."""

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator, Awaitable, Callable

import structlog
from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from tapedeck import logs
from tapedeck.errors import TapedeckError
from tapedeck.settings import Settings

log = structlog.get_logger()

PORTS = {"produce": 9101, "process": 9102, "simulate": 9103, "sink": 9110}


class Shell:
    """What a service sees of its process: `stopping` is set by SIGTERM or Ctrl+C; `health` says how its
    parts are (name to a complaint, or None when well)."""

    def __init__(self, settings: Settings, service: str) -> None:
        self.settings = settings
        self.service = service
        self.stopping = asyncio.Event()
        self.health: dict[str, str | None] = {}
        self.http_port = 0

    @contextlib.asynccontextmanager
    async def _http(self) -> AsyncIterator[None]:
        app = web.Application()
        app.router.add_get("/metrics", self._metrics)
        app.router.add_get("/health", self._health)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        wanted = self.settings.http_port
        if wanted is None:
            wanted = PORTS.get(self.service.split()[0], 0)
        site = web.TCPSite(runner, self.settings.http_host, wanted)
        try:
            await site.start()
        except OSError as error:
            if self.settings.http_port:
                raise TapedeckError(f"HTTP_PORT {wanted} cannot be used: {error.strerror}") from error
            site = web.TCPSite(runner, self.settings.http_host, 0)
            await site.start()
        self.http_port = runner.addresses[0][1]
        log.info("metrics and health", address=f"http://{self.settings.http_host}:{self.http_port}")
        try:
            yield
        finally:
            await runner.cleanup()

    async def _metrics(self, _: web.Request) -> web.Response:
        return web.Response(body=generate_latest(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def _health(self, _: web.Request) -> web.Response:
        well = not any(self.health.values())
        body = {"service": self.service, "ok": well, "parts": {k: v or "ok" for k, v in self.health.items()}}
        return web.json_response(body, status=200 if well else 503)

    async def until_stopped(self, *tasks: asyncio.Task[None]) -> None:
        """Waits for `stopping`; a task that ends before fails the process with its error."""
        stopping = asyncio.create_task(self.stopping.wait())
        try:
            await asyncio.wait({stopping, *tasks}, return_when=asyncio.FIRST_COMPLETED)
            for task in tasks:
                if task.done():
                    task.result()
        finally:
            stopping.cancel()

    async def run(self, main: Callable[["Shell"], Awaitable[None]]) -> None:
        """Runs `main` until it returns or fails; it is expected to return soon after `stopping` is set."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self.stopping.set)
        async with self._http():
            await main(self)


def run_service(settings: Settings, service: str, main: Callable[[Shell], Awaitable[None]]) -> int:
    """Runs a service in this process and returns its exit code: 0 stopped in order, else it failed.

    Expected errors are one log line; anything else ends the process with its stack trace logged, and the
    supervisor starts it again.
    """
    logs.configure(settings, service)

    async def started() -> None:
        await Shell(settings, service).run(main)

    try:
        import uvloop

        uvloop.run(started())
    except TapedeckError as error:
        log.error(str(error))
        return error.exit_code
    except Exception:
        log.exception("unexpected error, the process ends")
        return 1
    return 0
