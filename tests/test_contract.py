"""The published contract is what the code says. `python tests/test_contract.py` writes both files anew."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from schemas import contract, topics
from tapedeck import settings

DOCS = Path(__file__).parents[1] / "docs"

SETTINGS = """\
# Settings

Generated from `tapedeck/settings.py` by `make contract`; a test holds it current.

Every process reads the same settings, from environment variables or from a file `tapedeck.env` in the folder
it is started in, one `NAME=value` a line; a variable wins over the file. Lists are comma separated. A wrong
value ends the process with exit code 2 and names the setting.

`TAPEDECK_CACHE_DIR`, an environment variable only, says where the embedded Kafka's jars are kept; by default the
user's cache folder.

"""


def asyncapi() -> str:
    return json.dumps(flowing(contract.asyncapi()), indent=2, ensure_ascii=False) + "\n"


def flowing(node: Any) -> Any:
    """Descriptions without the line breaks of docstrings, which Python 3.13 indents otherwise than 3.11."""
    if isinstance(node, dict):
        return {
            key: " ".join(value.split()) if key == "description" and isinstance(value, str) else flowing(value)
            for key, value in node.items()
        }
    return [flowing(each) for each in node] if isinstance(node, list) else node


def settings_page() -> str:
    return SETTINGS + settings.document()


PAGES = {"asyncapi.json": asyncapi, "settings.md": settings_page}


@pytest.mark.parametrize("name", PAGES)
def test_the_page_is_current(name: str) -> None:
    assert (DOCS / name).read_text() == PAGES[name](), f"docs/{name} is out of date: run `make contract`"


def references(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        for key, value in node.items():
            if key == "$ref":
                yield value
            else:
                yield from references(value)
    elif isinstance(node, list):
        for value in node:
            yield from references(value)


def test_every_reference_of_the_contract_leads_somewhere() -> None:
    document = contract.asyncapi()
    found = set(references(document))
    assert found
    for reference in found:
        node: Any = document
        for step in reference.removeprefix("#/").split("/"):
            node = node[step]
        assert node, reference


def test_the_contract_has_every_topic_with_its_partitions_and_key() -> None:
    channels = contract.asyncapi()["channels"]
    with_records = [topic for topic in topics.ALL if topic.values]
    assert list(channels) == [topic.name for topic in with_records]
    for topic in with_records:
        channel = channels[topic.name]
        assert channel["bindings"]["kafka"]["partitions"] == topics.PARTITIONS
        assert channel["x-key"] == topic.key
        assert set(channel["messages"]) == {value.__name__ for value in topic.values}


def test_decimals_are_numbers_in_the_contract() -> None:
    text = json.dumps(contract.asyncapi())
    assert '"format": "decimal"' not in text
    schemas = contract.asyncapi()["components"]["schemas"]
    assert schemas["Trade"]["properties"]["price"] == {"type": "number"}


if __name__ == "__main__":
    for name, page in PAGES.items():
        (DOCS / name).write_text(page())
        print(f"docs/{name}")
