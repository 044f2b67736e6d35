"""The stages of the pipeline as the processor runs them: which topic each reads, and what it makes of a partition."""

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Protocol

from processors.pipeline import RUN_IN_RECORDS, Output, Pipeline
from processors.settings import PipelineSettings
from schemas import topics
from schemas.raw import from_kafka

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

    def foreign(self, value: bytes, timestamp_ms: int, reason: str) -> list[Output]:
        """The outputs of a record that is none of the topic's; changes no state."""


class Stage(NamedTuple):
    """`read` raises NotARawRecord; `run_in`: how many records it takes to find into a log's middle."""

    topic: topics.Topic
    read: Callable[[int, int, Headers, bytes | None], Any]
    make: Callable[[int, PipelineSettings, int, bool, int | None], Machine]
    run_in: int


RAW = Stage(topics.RAW, from_kafka, Pipeline, RUN_IN_RECORDS)

ALL = (RAW,)
