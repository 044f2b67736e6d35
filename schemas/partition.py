"""Which partition a pair's records lie in. Every identity hangs on it: it never changes."""

import contextlib
from functools import lru_cache

from aiokafka.partitioner import murmur2

from schemas.topics import PARTITIONS
from schemas.wire import symbol_of


@lru_cache(maxsize=65536)
def partition_of(pair: str) -> int:
    """Kafka's default partitioner by symbol, so that any producer keyed by it agrees and every spelling of
    a pair lies in one partition; what is no pair goes by its own bytes."""
    with contextlib.suppress(ValueError):
        pair = symbol_of(pair)
    return (murmur2(pair.encode()) & 0x7FFFFFFF) % PARTITIONS if pair else 0
