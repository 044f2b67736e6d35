"""What the worker does with records as they are delivered, beside the pipeline."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from processors import service
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
