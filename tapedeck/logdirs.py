"""How much room topics take on the brokers' disks: a request that aiokafka's admin client lacks."""

from collections import Counter

from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.protocol.api import Request, RequestStruct, Response
from aiokafka.protocol.types import Array, Boolean, Int16, Int32, Int64, Schema, String

_PARTITION = (("partition", Int32), ("size", Int64), ("offset_lag", Int64), ("is_future", Boolean))
_TOPIC = (("topic", String("utf-8")), ("partitions", Array(*_PARTITION)))


class _Response(Response):  # type: ignore[misc]
    API_KEY, API_VERSION = 35, 1
    SCHEMA = Schema(
        ("throttle_time_ms", Int32),
        ("dirs", Array(("error_code", Int16), ("path", String("utf-8")), ("topics", Array(*_TOPIC)))),
    )


class _RequestV1(RequestStruct):  # type: ignore[misc]
    API_KEY, API_VERSION = 35, 1
    RESPONSE_TYPE = _Response
    SCHEMA = Schema(("topics", Array(("topic", String("utf-8")), ("partitions", Array(Int32)))))


class _Request(Request[_RequestV1]):  # type: ignore[misc]
    API_KEY = 35

    def __init__(self, places: list[tuple[str, list[int]]]) -> None:
        self._places = places

    def build(self, request_struct_class: type[_RequestV1]) -> _RequestV1:
        return request_struct_class(self._places)


async def sizes(admin: AIOKafkaAdminClient, partitions: dict[str, list[int]]) -> Counter[str]:
    """Bytes by topic, all copies on all brokers together. Raises KafkaError."""
    found = Counter[str]()
    for broker in (await admin.describe_cluster())["brokers"]:
        response = await admin._send_request(_Request(list(partitions.items())), broker["node_id"])
        for _, _, topics in response.dirs:
            for topic, places in topics:
                found[topic] += sum(size for _, size, _, _ in places)
    return found
