"""The stages of the pipeline as the processor runs them: which topic each reads, and what it makes of a partition."""

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Protocol

from processors.pipeline import RUN_IN_RECORDS, Output, Pipeline
from processors.repairs import Repairs
from processors.rollups import BarRecord, Rollups
from processors.settings import PipelineSettings
from schemas import topics
from schemas.raw import record_of
from schemas.rest import RestRecord

Headers = Iterable[tuple[str, bytes]]


class Machine(Protocol):
    """The pure state of one partition."""

    counts: Counter[str]

    @property
    def memory_ns(self) -> int:
        """How far before a record a rebuild must start."""

    @property
    def tick(self) -> int | None:
        """How far it has come, ns."""

    @property
    def taken_ms(self) -> int | None:
        """The timestamp of the last record that was taken, ms: nothing in the state is newer."""

    def process(self, record: Any) -> list[Output]:
        """The outputs of the next record."""


class Stage(NamedTuple):
    """`read` makes a Kafka record what the machine processes, and never fails. `run_in`: how many records it takes to
    find into the middle of a log."""

    topic: topics.Topic
    read: Callable[[int, int, Headers, bytes | None, int], Any]
    make: Callable[[int, PipelineSettings, int, bool, int | None], Machine]
    run_in: int


def _bar_record(_: int, timestamp_ms: int, __: Headers, value: bytes | None, offset: int) -> BarRecord:
    return BarRecord(timestamp_ms, value or b"", offset)


def _rest_record(_: int, timestamp_ms: int, headers: Headers, value: bytes | None, offset: int) -> RestRecord:
    return RestRecord(timestamp_ms, list(headers), value or b"", offset)


def _rollups(partition: int, _: PipelineSettings, __: int, lost: bool, ___: int | None) -> Rollups:
    return Rollups(partition, lost)


def _repairs(partition: int, settings: PipelineSettings, *_: object) -> Repairs:
    return Repairs(partition, settings.fingerprint())


RAW = Stage(topics.RAW, record_of, Pipeline, RUN_IN_RECORDS)
ROLLUPS = Stage(topics.BARS_1M, _bar_record, _rollups, 0)
REPAIRS = Stage(topics.RAW_REST, _rest_record, _repairs, 0)

ALL = (RAW, REPAIRS, ROLLUPS)
