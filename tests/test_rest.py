"""The client of the vendor's REST against a server that says what a vendor may say."""

from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from pydantic import SecretStr

from producers import rest
from producers.rest import NotEntitled, Rest, RestError
from tapedeck.settings import Settings

Answer = web.Response
KEY = "a-secret"


class Vendor:
    """Gives its answers one after the other, the last one for ever; keeps what it was asked."""

    def __init__(self) -> None:
        self.answers: list[Callable[[], Answer]] = []
        self.asked: list[web.Request] = []
        self.url = ""

    async def handle(self, request: web.Request) -> Answer:
        self.asked.append(request)
        return (self.answers.pop(0) if len(self.answers) > 1 else self.answers[0])()

    def says(self, body: dict[str, Any], status: int = 200, **headers: str) -> None:
        self.answers.append(lambda: web.json_response(body, status=status, headers=headers))


@pytest.fixture
async def vendor(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Vendor]:
    monkeypatch.setattr(rest, "_backoff", lambda _: 0.01)
    vendor = Vendor()
    app = web.Application()
    app.router.add_get("/{path:.*}", vendor.handle)
    async with TestServer(app) as server:
        vendor.url = str(server.make_url("")).rstrip("/")
        yield vendor


async def asked(vendor: Vendor) -> list[bytes]:
    settings = Settings(_env_file=None, polygon_rest_url=vendor.url, polygon_api_key=SecretStr(KEY))
    async with Rest(settings) as client:
        return await client.results("/v3/trades/X:BTCUSD", limit=2)


async def test_it_goes_through_the_pages_with_the_key_in_a_header_and_comes_again_when_told_to(vendor: Vendor) -> None:
    vendor.says({"error": "exceeded the maximum requests per minute"}, 429)
    vendor.says({"status": "ERROR"}, 500)
    vendor.says({"results": [{"id": "1"}, {"id": "2"}], "next_url": f"{vendor.url}/v3/trades/X:BTCUSD?cursor=abc"})
    vendor.says({"status": "OK"})  # an empty success has no results
    assert await asked(vendor) == [b'{"id": "1"}', b'{"id": "2"}']
    assert [dict(request.query) for request in vendor.asked] == [{"limit": "2"}] * 3 + [{"cursor": "abc"}]
    assert {request.headers["Authorization"] for request in vendor.asked} == {f"Bearer {KEY}"}


async def test_an_endless_answer_is_none(vendor: Vendor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rest, "MOST_BYTES", 1_000)
    vendor.says({"results": [{"id": "x" * 1_000}]})
    with pytest.raises(RestError, match="more than 1,000 bytes"):
        await asked(vendor)


async def test_it_rests_for_as_long_as_the_vendor_says(vendor: Vendor, monkeypatch: pytest.MonkeyPatch) -> None:
    vendor.says({}, 429, **{"Retry-After": "40"})
    monkeypatch.setattr(rest, "PATIENCE_S", 30)  # so that it gives up instead of waiting in the test
    rests: list[float] = []
    rest_for = rest._rest
    monkeypatch.setattr(rest, "_rest", lambda state: rests.append(rest_for(state)) or 0.01)
    vendor.says({"results": []})
    assert await asked(vendor) == []
    assert rests == [40]


@pytest.mark.parametrize(("status", "error"), [(401, NotEntitled), (403, NotEntitled), (400, RestError)])
async def test_what_asking_again_will_not_help_is_asked_once(
    vendor: Vendor, status: int, error: type[RestError]
) -> None:
    vendor.says({"status": "NOT_AUTHORIZED"}, status)
    with pytest.raises(error) as caught:
        await asked(vendor)
    assert len(vendor.asked) == 1
    assert KEY not in str(caught.value)


@pytest.mark.parametrize("url", ["http://elsewhere.invalid/v3/trades/X:BTCUSD?cursor=abc", "//elsewhere", "http://["])
async def test_the_key_goes_to_no_other_host(vendor: Vendor, url: str) -> None:
    vendor.says({"results": [], "next_url": url})
    with pytest.raises(RestError, match="another host"):
        await asked(vendor)
    assert len(vendor.asked) == 1


@pytest.mark.parametrize("body", [b"", b"<html>", b'{"results": 5}'])
async def test_what_is_no_answer_is_an_error(vendor: Vendor, body: bytes) -> None:
    vendor.answers.append(lambda: web.Response(body=body))
    with pytest.raises(RestError):
        await asked(vendor)


async def test_who_never_answers_is_given_up(vendor: Vendor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rest, "PATIENCE_S", 0.3)
    vendor.says({}, 503)
    with pytest.raises(RestError, match="status 503"):
        await asked(vendor)
    assert len(vendor.asked) > 1
