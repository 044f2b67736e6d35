"""What the worker does with records as they are delivered, beside the pipeline."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from faust.types import TP

from processors import service, transport
from processors.service import Piece, Processor
from processors.stages import RAW
from schemas import topics


async def test_a_hole_in_what_waits_for_a_rebuild_is_behind_what_came_before_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    begun: list[int] = []
    processed: list[int] = []

    async def rebuild(*arguments: Any) -> object:
        begun.append(arguments[4])
        await asyncio.sleep(0)
        return object()

    def process(partition: service.Partition, piece: Piece) -> None:
        processed.append(piece.record.offset)
        partition.next_offset = piece.record.offset + 1

    monkeypatch.setattr(service, "rebuild", rebuild)
    processor: Any = Processor.__new__(Processor)
    processor._partitions, processor._roomy = {}, asyncio.Event()
    processor._settings = processor._pipeline = processor._moved = None
    processor._app = SimpleNamespace(consumer=SimpleNamespace(held=set()))
    processor._process = process
    for offset in (30, 31, 33, 34):
        record = SimpleNamespace(topic=topics.RAW.name, partition=0, offset=offset)
        processor._take(RAW, Piece(record, None))
    (partition,) = processor._partitions.values()
    await partition.rebuilding
    assert (processed, begun) == ([30, 31, 33, 34], [30, 33])


async def test_only_a_fetch_for_all_partitions_may_wait_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """Faust asks for those whose streams have room; the others may have it any moment."""
    waited: list[float] = []

    async def getmany(_: object, __: set[TP], timeout: float) -> dict[TP, list[Any]]:
        waited.append(timeout)
        return {}

    monkeypatch.setattr(transport.aiokafka.Consumer, "_getmany", getmany)
    busy, quiet = TP("raw", 0), TP("raw", 1)
    consumer: Any = transport._Consumer.__new__(transport._Consumer)
    consumer.held, consumer.assignment = set(), lambda: {busy, quiet}
    for active in ({busy, quiet}, None, {quiet}):
        await consumer._getmany(active, 1.0)
    consumer.held = {busy}  # being rebuilt
    await consumer._getmany({busy, quiet}, 1.0)
    assert waited == [1.0, 1.0, transport.IDLE_S, transport.IDLE_S]
