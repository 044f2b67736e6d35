"""What the sources yield and the clients get: frames of events, and which of them someone wants."""

from collections.abc import Iterable, Sequence
from typing import Self

import msgspec

Topic = tuple[str, str]
"""(channel, pair), such as ("XT", "BTC-USD"); the pair of a subscription may be "*"."""


class Event(msgspec.Struct, frozen=True, gc=False):
    """The bytes of one JSON object; one that names no channel and pair has no topic, and everyone gets it."""

    topic: Topic | None
    data: bytes


class Frame(msgspec.Struct, frozen=True, gc=False):
    """One WebSocket message: `data` is the JSON array of `events`, or anything at all with no events.

    It is due `offset_ns` of market time after the source's begin; `clock_ns` is the market's time then.
    """

    offset_ns: int
    clock_ns: int
    data: bytes
    events: Sequence[Event]


class Subscriptions:
    """A set of topics, and the part of a frame that it asks for."""

    def __init__(self, topics: Iterable[Topic] = ()) -> None:
        self._topics = set(topics)

    @classmethod
    def union(cls, several: Iterable[Self]) -> Self:
        """What at least one of them asks for."""
        return cls(topic for one in several for topic in one._topics)

    def add(self, topic: Topic) -> None:
        self._topics.add(topic)

    def discard(self, topic: Topic) -> None:
        self._topics.discard(topic)

    def wants(self, topic: Topic | None) -> bool:
        return topic is None or topic in self._topics or (topic[0], "*") in self._topics

    def select(self, frame: Frame) -> Frame | None:
        """The frame itself if all of it is wanted (byte for byte), a shorter one, or None for nothing."""
        events = [event for event in frame.events if self.wants(event.topic)]
        return part(frame, events) if events or not frame.events else None

    @property
    def empty(self) -> bool:
        return not self._topics

    def within(self, other: "Subscriptions") -> bool:
        """Whether the other asks for all of it."""
        return all(other.wants(topic) for topic in self._topics)


def part(frame: Frame, events: Sequence[Event]) -> Frame:
    """The frame with only these of its events: itself if they are all."""
    if len(events) == len(frame.events):
        return frame
    return Frame(frame.offset_ns, frame.clock_ns, join(events), events)


def join(events: Iterable[Event]) -> bytes:
    """The JSON array of the events."""
    return b"[" + b",".join([event.data for event in events]) + b"]"
