"""The server's side of one connection's conversation: bytes in, bytes out, no socket and no clock.

Frames and messages are those of Polygon's documentation and official client; what neither shows (a message
that is no command, a command before auth) is answered by the nearest documented status.
"""

from collections.abc import Collection

import msgspec

from simulator.faults import Faults
from simulator.frame import Subscriptions, Topic

CHANNELS = frozenset({"XT", "XQ", "XA", "XAS", "XL2"})


class Command(msgspec.Struct, frozen=True):
    """What a client sends: auth (params is the key), subscribe or unsubscribe (comma separated)."""

    action: str
    params: str = ""


class Status(msgspec.Struct, frozen=True, tag_field="ev", tag="status"):
    """What the server says about the conversation, as opposed to the market."""

    status: str
    message: str


CONNECTED = Status("connected", "Connected Successfully")
AUTH_SUCCESS = Status("auth_success", "authenticated")
AUTH_FAILED = Status("auth_failed", "authentication failed")
AUTH_TIMEOUT = Status("auth_timeout", "No authentication request received.")
MAX_CONNECTIONS = Status("max_connections", "Maximum number of connections exceeded.")
SLOW_CONSUMER = Status("slow_consumer", "Data is not read fast enough.")
FORCE_DISCONNECT = Status("force_disconnect", "The connection will be closed.")
NOT_AUTHORIZED = Status("error", "not authorized")
NOT_UNDERSTOOD = Status("error", "not understood: send an action (auth, subscribe, unsubscribe) and params")

_decode_command = msgspec.json.Decoder(Command).decode


def status_frame(*statuses: Status) -> bytes:
    """One WebSocket message of these statuses."""
    return msgspec.json.encode(statuses)


def parse_topic(param: str) -> Topic | None:
    """("XT", "BTC-USD") for `XT.BTC-USD` and `XT.X:BTC-USD`, None for what is no crypto channel.

    `XT.X:BTCUSD` is a topic too, but no message carries such a pair, so it stays silent, as Polygon's does.
    """
    channel, _, pair = param.partition(".")
    pair = pair.removeprefix("X:")
    return (channel, pair) if channel in CHANNELS and pair else None


class Session:
    """One client's conversation. After `refused` the server closes the connection."""

    def __init__(self, keys: Collection[str] = (), faults: Faults | None = None) -> None:
        self._keys = keys
        self._faults = faults or Faults()
        self.key = ""  # with which it authenticated
        self.authenticated = False
        self.refused = False
        self.subscribed = False  # ever: a client that gave up its last topic still is one
        self.subscriptions = Subscriptions()

    def receive(self, message: str | bytes) -> bytes:
        """The frame that answers a client's message: one status, or one per param of a subscription."""
        try:
            command = _decode_command(message)
        except (msgspec.MsgspecError, UnicodeError):
            return status_frame(NOT_UNDERSTOOD)
        match command.action:
            case "auth":
                return status_frame(self._auth(command.params))
            case "subscribe" | "unsubscribe" if not self.authenticated:
                return status_frame(NOT_AUTHORIZED)
            case "subscribe":
                return status_frame(*map(self._subscribe, command.params.split(",")))
            case "unsubscribe":
                return status_frame(*map(self._unsubscribe, command.params.split(",")))
        return status_frame(NOT_UNDERSTOOD)

    def _auth(self, key: str) -> Status:
        if self._faults.strike("auth-timeout"):
            answer = AUTH_TIMEOUT
        elif self._faults.strike("auth-failed") or (self._keys and key not in self._keys):
            answer = AUTH_FAILED
        else:
            answer = AUTH_SUCCESS
            self.key = key
        self.authenticated = answer is AUTH_SUCCESS
        self.refused = not self.authenticated
        return answer

    def _subscribe(self, param: str) -> Status:
        topic = parse_topic(param.strip())
        if topic is None or self._faults.strike("refuse", topic):
            return NOT_AUTHORIZED
        self.subscriptions.add(topic)
        self.subscribed = True
        return Status("success", f"subscribed to: {param.strip()}")

    def _unsubscribe(self, param: str) -> Status:
        topic = parse_topic(param.strip())
        if topic is None:
            return NOT_AUTHORIZED
        self.subscriptions.discard(topic)
        return Status("success", f"unsubscribed to: {param.strip()}")
