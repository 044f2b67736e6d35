"""The published contract, generated from the topic registry: JSON Schemas inside an AsyncAPI 3 document."""

from typing import Any

import msgspec

from schemas import topics


def asyncapi() -> dict[str, Any]:
    """The AsyncAPI document of all topics; docs/asyncapi.json holds it, and a test holds that current."""
    types = sorted({value for topic in topics.ALL for value in topic.values}, key=lambda t: t.__name__)
    _, components = msgspec.json.schema_components(types, ref_template="#/components/schemas/{name}")
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "tapedeck",
            "version": "1",
            "description": "Times are integer nanoseconds since the epoch, UTC. Decimals are exact JSON "
            "numbers in plain notation. (epoch, partition, n) identifies the raw event.",
        },
        "channels": {
            topic.name: {
                "address": topic.name,
                "description": topic.doc,
                "messages": {t.__name__: {"$ref": f"#/components/messages/{t.__name__}"} for t in topic.values},
                "bindings": {
                    "kafka": {
                        "partitions": topic.partitions,
                        "topicConfiguration": {
                            "cleanup.policy": ["delete"],
                            "retention.ms": -1,
                            "retention.bytes": topic.retention_bytes,
                            "max.message.bytes": topic.max_message_bytes,
                        },
                    }
                },
                "x-key": topic.key,
            }
            for topic in topics.ALL
            if topic.values
        },
        "operations": {
            f"receive.{topic.name}": {"action": "receive", "channel": {"$ref": f"#/channels/{topic.name}"}}
            for topic in topics.ALL
            if topic.values
        },
        "components": {
            "messages": {
                t.__name__: {
                    "name": t.__name__,
                    "contentType": "application/json",
                    "payload": {"$ref": f"#/components/schemas/{t.__name__}"},
                }
                for t in types
            },
            "schemas": {name: _numbers(schema) for name, schema in components.items()},
        },
    }


def _numbers(schema: Any) -> Any:
    """msgspec describes a Decimal as a string; on these topics it is a number."""
    if isinstance(schema, dict):
        if schema.get("format") == "decimal":
            return {"type": "number"}
        return {key: _numbers(value) for key, value in schema.items()}
    if isinstance(schema, list):
        return [_numbers(value) for value in schema]
    return schema
