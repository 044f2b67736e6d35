"""Faust's Kafka driver, made prompt and cheap.

**Prompt**: Faust fixes at 1.5 s how long a fetch may wait at the broker. aiokafka has one fetch per broker under
way, so a partition that was just read waits until the fetch for the quiet ones comes back: measured here, p99 of
1.7 s from socket to trades.v1 (docs/decisions.md). And while the streams of busy partitions are full, Faust waits a
whole second for the quiet ones alone: on the backlog of a busy market the worker slept for two fifths of the time.

**Cheap**: what Faust does for a message costs more than all that the pipeline does with a record. So the records of a
fetch travel through it in bundles, as one message each: at the offset of its last record, with those before it told
to Faust as gaps of the log, so that acknowledging that one acknowledges them all.
"""

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator, Sequence
from itertools import zip_longest
from typing import Any, ClassVar

from faust.transport.drivers import aiokafka
from faust.types import TP

FETCH_WAIT_MS = 20
IDLE_S = 0.05
BUNDLE_RECORDS = 256
BUNDLE_BYTES = 256 * 1024


class Bundle(bytes):
    """Records of one partition, in order and without a hole, in the guise of one empty value."""

    records: Sequence[Any] = ()


class _Thread(aiokafka.AIOKafkaConsumerThread):
    def _create_worker_consumer(self, transport: Any) -> Any:
        consumer = super()._create_worker_consumer(transport)
        consumer._fetch_max_wait_ms = FETCH_WAIT_MS
        return consumer


class _Consumer(aiokafka.Consumer):
    """`held`: partitions not to be fetched for now. Faust's own way to pause one drops what was fetched before."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.held: set[TP] = set()
        self._gap: defaultdict[TP, list[tuple[int, int]]] = defaultdict(list)  # Faust's is a tree of intervals

    def _new_consumer_thread(self) -> Any:
        return _Thread(self, loop=self.loop, beacon=self.beacon)

    async def _getmany(self, active_partitions: set[TP] | None, timeout: float) -> Any:
        assigned = self.assignment()
        wanted = (assigned if active_partitions is None else active_partitions) - self.held
        if not wanted:  # which aiokafka would take for all
            await asyncio.sleep(IDLE_S)
            return {}
        # While it waits for these it looks at no others, and what is left out now is wanted again soon.
        return await super()._getmany(wanted, timeout if wanted == assigned else IDLE_S)

    async def _add_gap(self, tp: TP, offset_from: int, offset_to: int) -> None:
        """`offset_to` is that of the record behind the gap."""
        self._gap[tp].append((offset_from, offset_to))

    def _new_offset(self, tp: TP) -> int | None:
        """How far a commit may go: over what is acknowledged, each with the gap before it, up to a hole. As
        Faust's own, that would list each offset of the gaps: tens of millions, after a log that retention overtook."""
        acked, gaps, committed = self._acked[tp], self._gap[tp], self._committed_offset[tp]
        index = set(acked)
        told = ((begin, end) for begin, end in gaps if end in index)
        spans = sorted([*told, *((offset, offset + 1) for offset in acked)])
        # Faust tells of no gap at the first offset that it was to read.
        if not acked or (committed and spans[0][0] > committed + 1):
            return None
        reached = spans[0][0]
        for begin, end in spans:
            if begin > reached:
                break
            reached = max(reached, end)
        acked[:] = [offset for offset in acked if offset >= reached]
        self._acked_index[tp] = set(acked)
        gaps[:] = [gap for gap in gaps if gap[1] > reached]
        return reached

    async def getmany(self, timeout: float) -> AsyncIterator[tuple[TP, Any]]:
        """As Faust's own, but for the bundles: partition after partition in turn, until a rebalance begins."""
        fetched, _ = await self._wait_next_records(timeout)
        generation = self.app.consumer_generation_id
        if fetched is None or self.should_stop:
            return
        if not self.flow_active:
            await self.perform_seek()
            return
        for turn in zip_longest(*(_bundles(tp, records) for tp, records in fetched.items())):
            for tp, records in filter(None, turn):
                if not self.flow_active or self.app.consumer_generation_id != generation:
                    return
                read = self._read_offset[tp]
                if not read:  # behind any other offset Faust does it
                    await self._add_gap(tp, records[0].offset if read is None else 1, records[-1].offset)
                message = self._to_message(tp, records[-1])
                message.value = Bundle()
                message.value.records = records
                yield tp, message


def _bundles(tp: TP, records: Sequence[Any]) -> Iterator[tuple[TP, Sequence[Any]]]:
    first = size = 0
    for at, record in enumerate(records):
        size += len(record.value or b"")
        if at - first == BUNDLE_RECORDS - 1 or size >= BUNDLE_BYTES:
            yield tp, records[first : at + 1]
            first, size = at + 1, 0
    if first < len(records):
        yield tp, records[first:]


class PromptTransport(aiokafka.Transport):
    """Set as `app.transport` before the app starts."""

    Consumer: ClassVar[Any] = _Consumer
