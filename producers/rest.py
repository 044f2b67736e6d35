"""The vendor's REST: one request after the other, with patience and manners."""

import asyncio
import time
from typing import Self
from urllib.parse import urlsplit

import aiohttp
import msgspec
import structlog
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, stop_after_delay, wait_random_exponential

from schemas import wire
from tapedeck.settings import Settings

log = structlog.get_logger()

APART_S = 0.2  # between two requests
REQUEST_S = 30.0
PATIENCE_S = 300.0  # the vendor's smallest plan has five requests a minute
LONGEST_REST_S = 60.0
MOST_PAGES = 100  # fifty thousand results each
MOST_BYTES = 64 * 1024**2  # of a page; fifty thousand trades are 12 MB


class RestError(Exception):
    """There is no answer to be had."""


class NotEntitled(RestError):
    """The key or its plan does not cover this: asking again will not help."""


class _TryAgain(Exception):
    """`after_s`: when the vendor said to come again; 0: it did not say."""

    def __init__(self, reason: str, after_s: float = 0) -> None:
        super().__init__(reason)
        self.after_s = after_s


class _Page(msgspec.Struct):
    results: list[msgspec.Raw] = []
    next_url: str | None = None


_decode = msgspec.json.Decoder(_Page).decode
_backoff = wait_random_exponential(multiplier=0.5, max=LONGEST_REST_S)


def _rest(state: RetryCallState) -> float:
    error = state.outcome.exception() if state.outcome else None
    return max(_backoff(state), error.after_s if isinstance(error, _TryAgain) else 0)


def _say(state: RetryCallState) -> None:
    error = state.outcome.exception() if state.outcome else None
    log.info("REST does not answer, trying again", attempt=state.attempt_number, error=str(error) or repr(error))


class Rest:
    """A context. The key goes into a header, and to no other host than the one of the settings."""

    def __init__(self, settings: Settings) -> None:
        self._url = settings.polygon_rest_url.rstrip("/")
        key = settings.polygon_api_key
        self._headers = {"Authorization": f"Bearer {key.get_secret_value() if key else ''}"}
        self._next_at = 0.0

    async def __aenter__(self) -> Self:
        timeout = aiohttp.ClientTimeout(total=REQUEST_S, connect=REQUEST_S / 3)
        self._http = aiohttp.ClientSession(headers=self._headers, timeout=timeout)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.close()

    async def results(self, path: str, pages: int = MOST_PAGES, **parameters: str | int) -> list[bytes]:
        """All results, page after page, each the bytes of one JSON object. Raises RestError, also where there are more
        than so many `pages`."""
        url, found = self._url + path, list[bytes]()
        for _ in range(pages):
            page = await self._page(url, parameters)
            found += map(bytes, page.results)
            if not page.next_url:
                return found
            if _host(page.next_url) != _host(self._url):
                raise RestError("the next page is at another host")
            url, parameters = page.next_url, {}
        raise RestError(f"more than {pages} pages")

    async def _page(self, url: str, parameters: dict[str, str | int]) -> _Page:
        try:
            async for attempt in AsyncRetrying(
                retry=retry_if_exception_type((_TryAgain, aiohttp.ClientError, TimeoutError)),
                wait=_rest,
                before_sleep=_say,
                stop=stop_after_delay(PATIENCE_S),
                reraise=True,
            ):
                with attempt:
                    return await self._ask(url, parameters)
        except (_TryAgain, aiohttp.ClientError, TimeoutError, ValueError, *wire.DECODE_ERRORS) as error:
            raise RestError(f"{type(error).__name__}: {error}") from error
        raise AssertionError("either an answer or an error")

    async def _ask(self, url: str, parameters: dict[str, str | int]) -> _Page:
        wait_s = self._next_at - time.monotonic()
        self._next_at = time.monotonic() + max(0, wait_s) + APART_S
        await asyncio.sleep(max(0, wait_s))
        async with self._http.get(url, params=parameters, allow_redirects=False) as answer:
            if answer.status in (401, 403):
                raise NotEntitled(f"the key or its plan is refused ({answer.status})")
            if answer.status == 429 or answer.status >= 500:
                after = answer.headers.get("Retry-After", "")
                raise _TryAgain(f"status {answer.status}", min(LONGEST_REST_S, int(after) if after.isdigit() else 0))
            if answer.status != 200:
                raise RestError(f"status {answer.status}")
            body = bytearray()
            async for chunk in answer.content.iter_any():
                body += chunk
                if len(body) > MOST_BYTES:
                    raise RestError(f"an answer of more than {MOST_BYTES:,} bytes")
            return _decode(body)


def _host(url: str) -> tuple[str, str] | None:
    """The key goes nowhere else; None for what is no address."""
    try:
        return urlsplit(url)[:2]
    except ValueError:
        return None
