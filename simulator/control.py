"""The HTTP control: faults while the feed runs.

POST /control/faults      a fault as JSON; 201 with its state, or 400 with {"error": …}
GET /control/faults       the market's time, how many clients are subscribed, and every fault with its state
DELETE /control/faults/L  end the fault with label L, or call it off
"""

import asyncio
from typing import Any

import msgspec
from aiohttp import web

from simulator.faults import Fault, Incident
from simulator.feed import Feed
from simulator.injector import Injector

_decode = msgspec.json.Decoder(Fault).decode


class Control:
    """The handlers."""

    def __init__(self, injector: Injector, feed: Feed) -> None:
        self._injector = injector
        self._feed = feed

    def add_to(self, router: web.UrlDispatcher) -> None:
        """Serve at /control."""
        router.add_get("/control/faults", self._state)
        router.add_post("/control/faults", self._add)
        router.add_delete("/control/faults/{label}", self._end)

    async def _state(self, _: web.Request) -> web.Response:
        return web.json_response(
            {
                "clock_ns": self._feed.clock_ns,
                "clients": self._feed.clients,
                "faults": [_state_of(incident) for incident in self._injector.incidents],
            }
        )

    async def _add(self, request: web.Request) -> web.Response:
        try:
            incident = self._injector.add(_decode(await request.read()))
        except ValueError as error:  # msgspec's too
            return web.json_response({"error": str(error)}, status=400)
        await asyncio.sleep(0)  # it begins before the answer, unless it is for later
        return web.json_response(_state_of(incident), status=201)

    async def _end(self, request: web.Request) -> web.Response:
        label = request.match_info["label"]
        try:
            await self._injector.end(label)
        except KeyError:
            return web.json_response({"error": f"there is no fault called {label}"}, status=404)
        return web.Response(status=204)


def _state_of(incident: Incident) -> dict[str, Any]:
    return {**msgspec.to_builtins(incident.fault), "label": incident.label, "state": incident.state}
