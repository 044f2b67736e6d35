"""Who gets what of a batch of frames, and what the record says of it. Pure."""

from collections import defaultdict
from collections.abc import Collection
from itertools import groupby

from simulator.connections import Connection
from simulator.faults import Fault, Incident
from simulator.frame import Event, Frame, Subscriptions, Topic, part
from simulator.record import record_line


class Deal:
    """Collects the messages for each client and the lines of the record."""

    def __init__(
        self,
        listeners: dict[Connection, Subscriptions],
        wanted: Subscriptions,
        stalls: Collection[Fault],
        recv_ns: int,
    ) -> None:
        """`wanted` is what is recorded: a superset of what the listeners ask for."""
        self._listeners = listeners
        self._wanted = wanted
        self._stalls = stalls
        self._recv_ns = recv_ns
        self._all_or_nothing = not stalls and (not listeners or [*listeners.values()] == [wanted])
        self.messages: defaultdict[Connection, list[bytes]] = defaultdict(list)
        self.lines: list[bytes] = []
        self.delivered: Frame | None = None
        """The last frame of which a client got something."""

    def add(self, frame: Frame, incident: Incident | None) -> None:
        """Deal out a frame of wanted events.

        The record has a line for each run of events that the same number of clients get.
        """
        if self._all_or_nothing or not frame.events:
            takers = [] if self._withheld(None) else list(self._listeners)
            for connection in takers:
                self._hand(frame, frame, connection)
            self._note(frame, len(takers), incident)
            return
        takers_of = [self._takers(event) for event in frame.events]
        for connection in self._listeners:
            events = [event for event, takers in zip(frame.events, takers_of, strict=True) if connection in takers]
            if events:
                self._hand(frame, part(frame, events), connection)
        for clients, run in groupby(zip(frame.events, takers_of, strict=True), key=lambda one: len(one[1])):
            self._note(part(frame, [event for event, _ in run]), clients, incident)

    def _takers(self, event: Event) -> list[Connection]:
        if self._withheld(event.topic):
            return []
        return [connection for connection, own in self._listeners.items() if own.wants(event.topic)]

    def _withheld(self, topic: Topic | None) -> bool:
        return any(stall.covers(topic) for stall in self._stalls)

    def _hand(self, frame: Frame, share: Frame, connection: Connection) -> None:
        self.messages[connection].append(share.data)
        self.delivered = frame

    def _note(self, frame: Frame, clients: int, incident: Incident | None) -> None:
        self.lines.append(record_line(frame, self._recv_ns, clients, incident))
