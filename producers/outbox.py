"""Raw records on their way to Kafka: appended in order, published in order, kept until acknowledged.

It lives in memory: what is in it when the process is killed lies in the `away` gap that the next start
writes. (A segment file takes this place next; the interface is the same.)
"""

import asyncio

from schemas.raw import RawRecord

ROOM_BYTES = 128 * 1024**2
ROUND_RECORDS = 5_000


class Outbox:
    """`append` never blocks; a reader that must not run ahead awaits `room`."""

    def __init__(self) -> None:
        self._records: list[RawRecord] = []
        self._bytes = 0
        self._filled = asyncio.Event()
        self._roomy = asyncio.Event()
        self._emptied = asyncio.Event()
        self._roomy.set()
        self._emptied.set()

    def __len__(self) -> int:
        return len(self._records)

    def append(self, records: list[RawRecord]) -> None:
        if records:
            self._records += records
            self._bytes += sum(len(record.value) for record in records)
            self._filled.set()
            self._emptied.clear()
            if self._bytes > ROOM_BYTES:
                self._roomy.clear()

    async def room(self) -> None:
        """Waits until there is room for more."""
        await self._roomy.wait()

    async def empty(self) -> None:
        """Waits until everything is acknowledged."""
        await self._emptied.wait()

    async def next(self) -> list[RawRecord]:
        """The oldest unacknowledged records, at least one; the same ones again until `acknowledge`."""
        await self._filled.wait()
        return self._records[:ROUND_RECORDS]

    def acknowledge(self, count: int) -> None:
        """The first `count` records are safe in Kafka."""
        self._bytes -= sum(len(record.value) for record in self._records[:count])
        del self._records[:count]
        if not self._records:
            self._filled.clear()
            self._emptied.set()
        if self._bytes <= ROOM_BYTES // 2:
            self._roomy.set()
