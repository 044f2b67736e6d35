"""A producer's slicer driven by hand, from frames to the log and on to what becomes of it."""

from collections.abc import Iterable
from fractions import Fraction

from processors.pipeline import Output, Pipeline
from processors.settings import PipelineSettings
from producers.protocol import market_items
from producers.silences import still_silent
from producers.slicer import Resume, Slicer, SlicerSettings
from producers.split import split_frame
from schemas.events import NS_PER_MS
from schemas.raw import RawRecord

Ms = float | Fraction
T0 = 1_732_200_000_000  # ms, a whole minute
LATENCY_MS = 45


def xt(t: int, *, pair: str = "BTC-USD", x: int = 1, i: object = None, p: str = "100", s: str = "1") -> bytes:
    """A trade at `t` ms; its id is its time unless given."""
    name = t if i is None else i
    return f'{{"ev":"XT","pair":"{pair}","p":{p},"s":{s},"t":{t},"i":"{name}","x":{x},"c":[1]}}'.encode()


def xq(t: int, *, pair: str = "BTC-USD", x: int = 1) -> bytes:
    return f'{{"ev":"XQ","pair":"{pair}","bp":99.9,"bs":1,"ap":100.1,"as":2,"t":{t},"x":{x}}}'.encode()


def xa(start: int, *, pair: str = "BTC-USD") -> bytes:
    numbers = '"o":1,"h":2,"l":1,"c":2,"v":3.5'
    return f'{{"ev":"XA","pair":"{pair}",{numbers},"s":{start},"e":{start + 60_000}}}'.encode()


class Feed:
    """Frames in, records out. Times are receive times in ms; between frames everything due is done in time."""

    def __init__(
        self,
        settings: SlicerSettings | None = None,
        resume: Resume | None = None,
        streams: Iterable[str] = ("XT", "XQ", "XA"),
        connected: bool = True,
        latency_ms: int = LATENCY_MS,
    ) -> None:
        self.latency_ms = latency_ms
        self.slicer = Slicer(settings or SlicerSettings(), streams, ["*"], resume)
        self.records: list[RawRecord] = []
        self._connects = connected

    def connected(self) -> None:
        """Subscribed, from the next moment on."""
        self._connects = True

    def frame(self, recv_ms: Ms, *events: bytes) -> None:
        """One frame of these events."""
        self.raw(recv_ms, b"[" + b",".join(events) + b"]")

    def raw(self, recv_ms: Ms, data: bytes) -> None:
        """One frame of these bytes."""
        self.until(recv_ms)
        if items := market_items(split_frame(data)):
            self.slicer.frame(items, _ns(recv_ms))
        self.take()

    def at(self, t: int, *events: bytes) -> None:
        """One frame, received the usual latency after `t`."""
        self.frame(t + self.latency_ms, *events)

    def until(self, recv_ms: Ms) -> None:
        """Nothing comes until then."""
        now = _ns(recv_ms)
        if self._connects:
            self.slicer.connected(now)
            self._connects = False
        while (due := self.slicer.deadline()) is not None and due < now:
            self.slicer.advance(due)
            self.take()
        self.slicer.advance(now)
        self.take()

    def pong(self, recv_ms: Ms, asked_ms: Ms | None = None) -> None:
        """A ping is answered, at once or asked earlier."""
        self.until(recv_ms)
        self.slicer.pong(_ns(recv_ms if asked_ms is None else asked_ms), _ns(recv_ms))
        self.take()

    def idle(self, since_ms: int, until_ms: int) -> None:
        """Nothing comes but a pong each second, the last at the end."""
        for recv_ms in range(since_ms + 1_000, until_ms, 1_000):
            self.pong(recv_ms)
        self.pong(until_ms)

    def lost(self, recv_ms: Ms, reason: str = "reconnect") -> None:
        self.until(recv_ms)
        self.slicer.lost(reason, _ns(recv_ms))
        self.take()

    def stop(self, recv_ms: Ms) -> None:
        self.until(recv_ms)
        self.slicer.stop(_ns(recv_ms))
        self.take()

    def flush(self, recv_ms: Ms) -> None:
        self.until(recv_ms)
        self.slicer.flush(_ns(recv_ms))
        self.take()

    def take(self) -> None:
        self.records += self.slicer.take()

    def of(self, kind: str, partition: int | None = None) -> list[RawRecord]:
        """The records of a kind, of all partitions or one."""
        return [r for r in self.records if r.kind == kind and partition in (None, r.partition)]

    def times(self, kind: str, partition: int = 0) -> list[int]:
        """The timestamps (ms, after T0) of a kind of record in a partition."""
        return [record.timestamp_ms - T0 for record in self.of(kind, partition)]

    def resume(self) -> Resume:
        """What a producer that starts after this log goes on from."""
        last = {record.partition: record for record in self.records}
        newest = max(last.values(), key=lambda record: (record.epoch, record.timestamp_ms))
        return Resume(
            max(record.epoch for record in last.values()),
            max(record.timestamp_ms for record in last.values()),
            newest.recv[-1][0],
            [last[p].timestamp_ms if p in last else None for p in range(8)],
            silent=still_silent(self.records),
        )


def _ns(recv_ms: Ms) -> int:
    return round(recv_ms * NS_PER_MS)


def through(
    records: Iterable[RawRecord], settings: PipelineSettings | None = None, close: bool = False
) -> list[Output]:
    """One pass over all partitions, like `compute` with or without `--close`."""
    settings = settings or PipelineSettings()
    pipelines: dict[int, Pipeline] = {}
    outputs = []
    for record in records:
        if record.partition not in pipelines:
            pipelines[record.partition] = Pipeline(record.partition, settings)
        outputs += pipelines[record.partition].process(record)
    if close:
        outputs += [output for pipeline in pipelines.values() for output in pipeline.close()]
    return outputs
