"""Polygon's WebSocket protocol as a state machine: bytes in, events out, bytes to send. Pure.

connected → auth → auth_success → subscribe → one acknowledgement for each parameter → live. An
acknowledgement is not delivery: unknown pairs are acknowledged and then silent (docs/protocol.md).
"""

from collections.abc import Iterable, Sequence

import orjson

from producers.split import Item, split_frame
from schemas import wire
from tapedeck.errors import UsageError
from tapedeck.settings import Settings


class SessionError(Exception):
    """The session cannot go on; connecting again may help."""


class Evicted(SessionError):
    """The vendor closed this session for another one on the same key."""


class AuthFailed(Exception):
    """The key was refused; connecting again with it will not help."""


class Refused(Exception):
    """Not one of the wanted channels may be subscribed to with this key."""


def pairs_of(symbols: Iterable[str]) -> list[str]:
    """Pairs as the vendor's subscriptions want them, each once, and only `*` where it is among them: what is
    asked for twice may come twice, or be answered once. Raises UsageError for what is no pair."""
    try:
        pairs = dict.fromkeys("*" if symbol == "*" else wire.symbol_of(symbol) for symbol in symbols)
    except ValueError as error:
        raise UsageError(f"SYMBOLS: {error}") from error
    return ["*"] if "*" in pairs else list(pairs)


def params_of(settings: Settings) -> list[str]:
    """What to subscribe to; raises UsageError for a pair that cannot be understood, and for nothing at all."""
    pairs, streams = pairs_of(settings.symbols), dict.fromkeys(settings.streams)
    for name, chosen in (("SYMBOLS", pairs), ("STREAMS", streams)):
        if not chosen:
            raise UsageError(f"{name} is empty: there is nothing to record")
    return [f"{stream}.{pair}" for stream in streams for pair in pairs]


class Protocol:
    """One session. After `receive`, send what `to_send()` returns."""

    def __init__(self, key: str, params: Sequence[str]) -> None:
        self._key = key
        self._params = list(params)
        self._pending: list[str] = []
        self._outbox: list[bytes] = []
        self._greeted = False
        self.asked = False
        self.refused: list[str] = []
        self.live = False

    def to_send(self) -> list[bytes]:
        """What must be sent now, each a text message."""
        out, self._outbox = self._outbox, []
        return out

    def receive(self, data: bytes) -> list[Item]:
        """The market events of a frame, in order. Raises SessionError, Evicted, AuthFailed, Refused."""
        items = split_frame(data)
        if (b'"status"' in data or b"\\u" in data) and any(
            item.head is not None and item.head.ev == "status" for item in items
        ):
            for item in items:
                if item.head is not None and item.head.ev == "status":
                    self._status(item.head)
            items = market_items(items)
        return items

    def _status(self, head: wire.Head) -> None:
        match head.status:
            case "connected" if not self._greeted:  # the key goes out once, whatever the vendor repeats
                self._greeted = True
                self._outbox.append(orjson.dumps({"action": "auth", "params": self._key}))
            case "auth_success" if self._greeted and not self.asked:
                self.asked, self._pending = True, list(self._params)
                params = ",".join(self._params)
                self._outbox.append(orjson.dumps({"action": "subscribe", "params": params}))
            case "auth_failed":
                raise AuthFailed(head.message or "authentication failed")
            case "auth_timeout":
                raise SessionError("the vendor timed the authentication out")
            case "max_connections":
                raise Evicted(head.message or "maximum number of connections")
            case "success" | "error" if self.asked and not self.live:
                self._acknowledged(head)
            case "slow_consumer" | "force_disconnect":
                raise SessionError(f"{head.status}: {head.message or 'the vendor ends the session'}")

    def _acknowledged(self, head: wire.Head) -> None:
        """Replies come one for each parameter, in order: a refusal, which names none, is of the first that
        has no reply yet."""
        name = (head.message or "").removeprefix("subscribed to: ")
        name = name if name in self._pending else self._pending[0]
        self._pending.remove(name)
        if head.status == "error":
            self.refused.append(name)
        if not self._pending:
            if len(self.refused) == len(self._params):
                raise Refused(head.message or "not authorized")
            self.live = True


def market_items(items: list[Item]) -> list[Item]:
    """Without the vendor's status messages, which belong to the session and not to the tape."""
    return [item for item in items if item.head is None or item.head.ev != "status"]
