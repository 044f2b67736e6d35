"""Which topic it is that has a name: a request that aiokafka's admin client lacks. A topic that is deleted and made
again, or is of a Kafka that began anew, has another id.
"""

from collections.abc import Iterable
from uuid import UUID

from aiokafka.protocol.api import Request, RequestStruct, Response
from aiokafka.protocol.types import Boolean, CompactArray, CompactString, Int16, Int32, Int64, Schema, TaggedFields

from tapedeck import kafka
from tapedeck.settings import Settings

_NODE = (("node_id", Int32), ("host", CompactString()), ("port", Int32), ("rack", CompactString()))
_NUMBERS = ("error_code", Int16), ("partition", Int32), ("leader", Int32), ("leader_epoch", Int32)
_NODES = (("replicas", CompactArray(Int32)), ("isr", CompactArray(Int32)), ("offline", CompactArray(Int32)))
_ID = (("high", Int64), ("low", Int64))
_TAGS = ("tags", TaggedFields)
_TOPIC = (
    ("error_code", Int16),
    ("name", CompactString()),
    *_ID,
    ("internal", Boolean),
    ("partitions", CompactArray(*_NUMBERS, *_NODES, _TAGS)),
    ("operations", Int32),
    _TAGS,
)


class _Response(Response):  # type: ignore[misc]
    API_KEY, API_VERSION = 3, 10
    SCHEMA = Schema(
        ("throttle_time_ms", Int32),
        ("nodes", CompactArray(*_NODE, _TAGS)),
        ("cluster_id", CompactString()),
        ("controller", Int32),
        ("topics", CompactArray(*_TOPIC)),
        ("operations", Int32),
        _TAGS,
    )


class _RequestV10(RequestStruct):  # type: ignore[misc]
    API_KEY, API_VERSION, FLEXIBLE_VERSION = 3, 10, True
    RESPONSE_TYPE = _Response
    SCHEMA = Schema(
        ("topics", CompactArray(*_ID, ("name", CompactString()), _TAGS)),
        ("create", Boolean),
        ("cluster_operations", Boolean),
        ("topic_operations", Boolean),
        _TAGS,
    )


class _Request(Request[_RequestV10]):  # type: ignore[misc]
    API_KEY = 3

    def __init__(self, names: Iterable[str]) -> None:
        self._names = names

    def build(self, request_struct_class: type[_RequestV10]) -> _RequestV10:
        return request_struct_class([(0, 0, name, {}) for name in self._names], False, False, False, {})


async def ids_of(settings: Settings, names: Iterable[str]) -> dict[str, UUID]:
    """By name, of those that there are; none at all from brokers that know no ids. Raises KafkaError."""
    try:
        async with kafka.admin_client(settings) as admin:
            response = await admin._send_request(_Request(names))
    except NotImplementedError:
        return {}
    found = {name: UUID(int=(high % 2**64 << 64) + low % 2**64) for _, name, high, low, *_ in response.topics}
    return {name: topic for name, topic in found.items() if topic.int}
