"""The protocol machine against a vendor that may say anything in any order."""

from collections.abc import Sequence
from typing import NamedTuple

import msgspec
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from producers.protocol import AuthFailed, Protocol, Refused, SessionError, pairs_of, params_of
from tapedeck.errors import UsageError
from tapedeck.settings import Settings

KEY = "secret"
PARAMS = ["XT.BTC-USD", "XQ.BTC-USD", "XT.ETH-USD"]
REPLIES = ("success", "error")
ENDS = ("auth_failed", "auth_timeout", "max_connections", "slow_consumer", "force_disconnect")

# -- what a vendor may say -----------------------------------------------------------------------------


def status(name: object, message: object = None) -> bytes:
    return orjson.dumps({"ev": "status", "status": name, "message": message})


acks = st.sampled_from([*(f"subscribed to: {param}" for param in PARAMS), "subscribed to: XT.A-B", "ok", "", None])
replies = st.one_of(
    st.builds(status, st.just("success"), acks), st.just(status("error", "not authorized")), st.just(status("error"))
)
greetings = st.sampled_from([status("connected", "Connected Successfully"), status("auth_success", "authenticated")])
ends = st.builds(status, st.sampled_from(ENDS))
odd_statuses = st.sampled_from(
    [
        b'{"ev":"status"}',
        status("reticulating"),
        status(5, 6),
        status(None, ["connected"]),
        b'{"ev":"status","status":["auth_success"]}',
        b'{"ev":"status","t":"now","status":"connected"}',
        b'{ "status" : "connected" , "ev" : "status" }',
    ]
)
junk = st.sampled_from(
    [b"5", b"null", b"[]", b"{}", b'"status"', b'{"ev":5,"status":"connected"}', b'{"status":"auth_success"}']
)
bad = st.sampled_from([b"NaN", b'{"ev":"XT","p":NaN}', b"tru", b'"\\q"'])
trades = st.builds(
    lambda number, space: b'{"ev":"XT",%b"pair":"BTC-USD", "t":1723161240000,"i":%d,"p":1e-3}' % (space, number),
    st.integers(0, 2**60),
    st.sampled_from([b"", b" ", b'"x":1 ,']),
)
quotes = st.just(b'{"ev":"XQ","pair":"BTC-USD","bp":1,"ap":2.50,"t":1723161240000}')
elements = st.one_of(greetings, replies, ends, odd_statuses, junk, bad, trades, quotes)
likely = st.sampled_from(
    [
        [status("connected")],
        [status("auth_success")],
        [status("success", f"subscribed to: {PARAMS[0]}")],
        [status("success", f"subscribed to: {param}") for param in PARAMS],
        [status("error", "not authorized")],
    ]
)


class Said(NamedTuple):
    """A frame: its elements, or None where it is no JSON array, and its bytes."""

    elements: Sequence[bytes] | None
    data: bytes


frames = st.one_of(
    st.one_of(likely, st.lists(elements, max_size=4)).map(lambda parts: Said(parts, b"[" + b",".join(parts) + b"]")),
    st.sampled_from([b"", b"{}", b"[", b'{"ev":"status","status":"connected"}', b"\xff", b'[{"ev":"XT"']).map(
        lambda data: Said(None, data)
    ),
)


class Head(msgspec.Struct):
    """What a part of a frame says to the session, if its fields have the shape that they should."""

    ev: str
    status: str | None = None
    message: str | None = None
    t: int | None = None


def said_to_the_session(part: bytes) -> Head | None:
    """The status message in here, if it is one that can be understood."""
    try:
        head = msgspec.json.decode(part, type=Head)
    except msgspec.MsgspecError:
        return None
    return head if head.ev == "status" else None


def is_status(part: bytes) -> bool:
    return b'"ev":"status"' in part.replace(b" ", b"")


# -- what must hold ------------------------------------------------------------------------------------


class Client:
    """What a client must have done after each message, kept in the plainest way."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []
        self.waiting: list[str] | None = None  # for replies; None: not asked yet
        self.refused: list[str] = []
        self.greeted = False

    def hears_all(self, parts: Sequence[bytes]) -> type[Exception] | None:
        """What must be raised."""
        for head in filter(None, map(said_to_the_session, parts)):
            if (error := self.hears(head)) is not None:
                return error
        return None

    def hears(self, head: Head) -> type[Exception] | None:
        """What must be raised."""
        name = head.status
        if name == "connected" and not self.greeted:
            self.greeted = True
            self.sent.append(orjson.dumps({"action": "auth", "params": KEY}))
        elif name == "auth_success" and self.greeted and self.waiting is None:
            self.waiting = list(PARAMS)
            self.sent.append(orjson.dumps({"action": "subscribe", "params": ",".join(PARAMS)}))
        elif name in ENDS:
            return AuthFailed if name == "auth_failed" else SessionError
        elif name in REPLIES and self.waiting:
            named = (head.message or "").removeprefix("subscribed to: ")
            param = named if named in self.waiting else self.waiting[0]
            self.waiting.remove(param)
            if name == "error":
                self.refused.append(param)
            if self.refused == PARAMS:
                return Refused
        return None

    @property
    def live(self) -> bool:
        return self.waiting == []


@given(st.lists(frames, max_size=30))
def test_whatever_the_vendor_says_in_whatever_order(said: list[Said]) -> None:
    protocol, client = Protocol(KEY, PARAMS), Client()
    sent: list[bytes] = []
    for frame in said:
        wanted = client.hears_all(frame.elements or ())
        if wanted is not None:
            with pytest.raises(wanted):
                protocol.receive(frame.data)
            return  # the session is over
        items = protocol.receive(frame.data)
        if frame.elements is None:
            assert [item.data for item in items] == [frame.data]
        else:
            assert [item.data for item in items] == [part for part in frame.elements if not is_status(part)]
        sent += protocol.to_send()
        assert sent == client.sent
        assert len(sent) == len(set(sent)) <= 2  # the key once, the subscription once
        assert protocol.live == client.live
        assert protocol.refused == client.refused


@given(st.permutations(PARAMS), st.sets(st.sampled_from(PARAMS), max_size=2))
def test_it_is_live_when_each_channel_has_had_its_reply_and_not_before(order: list[str], denied: set[str]) -> None:
    protocol = Protocol(KEY, PARAMS)
    protocol.receive(b"[" + status("connected") + b"]")
    protocol.receive(b"[" + status("auth_success") + b"]")
    granted = [param for param in order if param not in denied]
    for param in granted:
        assert not protocol.live
        protocol.receive(b"[" + status("success", f"subscribed to: {param}") + b"]")
    for _ in denied:
        assert not protocol.live
        protocol.receive(b"[" + status("error", "not authorized") + b"]")
    assert protocol.live
    assert set(protocol.refused) == denied


def test_the_key_is_sent_once_however_often_the_vendor_greets() -> None:
    protocol = Protocol(KEY, PARAMS)
    for _ in range(2):
        protocol.receive(b"[" + status("connected") + b"," + status("connected") + b"]")
    assert len(protocol.to_send()) == 1


def test_nothing_is_subscribed_to_before_the_key_was_sent() -> None:
    protocol = Protocol(KEY, PARAMS)
    protocol.receive(b"[" + status("auth_success") + b"]")
    assert protocol.to_send() == []


def test_a_pair_named_twice_is_subscribed_to_once_and_all_pairs_are_all() -> None:
    """A vendor that answers once for a channel asked for twice would keep the session waiting."""
    assert pairs_of(["BTC-USD", "X:BTCUSD", "ETHUSD", "BTCUSD"]) == ["BTC-USD", "ETH-USD"]
    assert pairs_of(["BTC-USD", "*"]) == ["*"]


@pytest.mark.parametrize("nothing", [{"symbols": []}, {"streams": []}])
def test_who_wants_nothing_is_told_so(nothing: dict[str, list[str]]) -> None:
    with pytest.raises(UsageError, match=next(iter(nothing)).upper()):
        params_of(Settings(_env_file=None, **nothing))
