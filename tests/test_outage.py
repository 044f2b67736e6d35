"""The producer process against Kafka that is away, its own death, a second one, and a journal that is full."""

import asyncio
import contextlib
import re
import signal
from collections.abc import AsyncIterator

import aiohttp
import pytest
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from conftest import RATE, Market, Produce, Servers, flows, recording, says, stopped, until

from bench.scoring import Score, raw_log, score, spans_of
from producers.resume import read_log_end
from schemas import topics
from tapedeck import kafka
from tapedeck.embedded.ports import free_ports
from tapedeck.errors import UsageError
from tapedeck.settings import Settings


async def result(settings: Settings, market: Market) -> Score:
    log = await raw_log(settings)
    for records in log.values():
        numbers = [(record.epoch, record.n) for record in records]
        assert numbers == sorted(set(numbers))
        assert [r.timestamp_ms for r in records] == sorted(r.timestamp_ms for r in records)
    found = score(market.record, log)
    assert found.lost == found.repeated == 0, found
    return found


@contextlib.asynccontextmanager
async def broker_away(servers: Servers) -> AsyncIterator[None]:
    if servers.broker is None:
        pytest.skip("this Kafka is not ours to kill")
    servers.broker.kill()
    try:
        yield
    finally:
        await asyncio.to_thread(servers.broker.restart)


async def caught_up(settings: Settings, market: Market) -> None:
    """Kafka has as many events as the feed has sent by now: an orderly stop does not wait for an outage to end."""
    sent = market.events()

    async def logged() -> bool:
        records = [record for part in (await raw_log(settings)).values() for record in part]
        return sum(record.events for record in records if record.kind == "slice") >= sent

    await until(logged, 120)


async def test_an_outage_of_kafka_loses_reorders_and_doubles_nothing(
    settings: Settings, servers: Servers, market: Market, produce: Produce
) -> None:
    producer = produce()
    await flows(market)
    for seconds in (6, 1):
        async with broker_away(servers):
            await flows(market, seconds)
        await flows(market)
    await caught_up(settings, market)
    await stopped(producer)
    assert "Kafka acknowledges nothing" in producer.log.read_text()
    found = await result(settings, market)
    assert found.in_gaps <= RATE  # what the feed sent while nobody was connected any more
    assert found.gaps == {}


async def test_killed_in_an_outage_what_was_received_is_sent_by_the_next_and_its_absence_is_marked(
    settings: Settings, servers: Servers, market: Market, produce: Produce
) -> None:
    producer = produce()
    await flows(market)
    async with broker_away(servers):
        await flows(market, 2)
        producer.popen.kill()
        producer.popen.wait()
    again = produce()
    await flows(market, 3)
    again.popen.kill()  # and once more while it may be sending what was left
    again.popen.wait()
    third = produce()
    await recording(third)
    await flows(market)
    await stopped(third)
    found = await result(settings, market)
    assert set(found.gaps) == {"away"}
    assert found.excess_s < 2 * 2, found


async def test_an_orderly_stop_in_an_outage_keeps_the_rest_for_the_next_start(
    settings: Settings, servers: Servers, market: Market, produce: Produce
) -> None:
    producer = produce()
    await flows(market)
    async with broker_away(servers):
        await flows(market)
        await stopped(producer)
    again = produce()
    await recording(again)
    await flows(market)
    await stopped(again)
    found = await result(settings, market)
    assert found.gaps == {"away": 1}
    assert found.excess_s < 2, found


async def test_one_records_and_the_other_takes_over_when_it_is_killed(
    settings: Settings, market: Market, produce: Produce
) -> None:
    first = produce(journal_dir=settings.journal_dir / "first")
    await flows(market)
    second = produce(journal_dir=settings.journal_dir / "second")
    await flows(market, 3)
    assert "recording" not in second.log.read_text()
    assert "recording" in first.log.read_text()
    first.popen.kill()
    await says(second, "subscribed", 30)  # half of it where the machine is not busy
    await flows(market, 2)
    await stopped(second)
    found = await result(settings, market)
    assert set(found.gaps) == {"away"}
    assert found.excess_s < 2, found


async def test_a_frozen_one_that_wakes_up_finds_its_place_taken_and_writes_nothing_that_counts(
    settings: Settings, market: Market, produce: Produce
) -> None:
    first = produce(journal_dir=settings.journal_dir / "first")
    await flows(market)
    second = produce(journal_dir=settings.journal_dir / "second")
    await flows(market, 2)
    first.popen.send_signal(signal.SIGSTOP)
    await says(second, "subscribed")
    await flows(market)
    first.popen.send_signal(signal.SIGCONT)
    await says(first, "stands by")
    await flows(market)
    await stopped(second)
    await stopped(first)
    log = await raw_log(settings)
    for records in log.values():
        highest = 0
        for record in records:  # a zombie's may stand behind: the pipeline drops them by their epoch
            highest = max(highest, record.epoch)
        taken = [r for r in records if r.epoch == highest]
        assert [r.n for r in taken] == sorted({r.n for r in taken})
    assert {span.reason for spans in spans_of(log).values() for span in spans} == {"start", "away", "stop"}
    found = score(market.record, log)
    assert found.lost == 0, found


async def test_a_full_journal_says_so_marks_the_gap_and_goes_on(
    settings: Settings, servers: Servers, market: Market, produce: Produce
) -> None:
    producer = produce(journal_max_bytes=1024**2)
    await flows(market)
    async with broker_away(servers):
        await flows(market, 8)
    assert "the journal is full" in producer.log.read_text()
    await says(producer, "the journal takes records again")
    await flows(market)
    await stopped(producer)
    found = await result(settings, market)
    assert found.in_gaps > RATE
    assert "journal" in found.gaps
    epochs = {record.epoch for records in (await raw_log(settings)).values() for record in records}
    assert len(epochs) > 1
    assert max(epochs) <= (await read_log_end(settings)).claims  # or a standby that took over might have had the same
    assert found.excess_s < 2 * sum(found.gaps.values()), found


async def configure(settings: Settings, **changed: str) -> None:
    """Gives the raw topic these settings and otherwise the registry's."""
    admin = AIOKafkaAdminClient(**settings.kafka_options())
    await admin.start()
    name = settings.topic_prefix + topics.RAW.name
    config = topics.RAW.config() | {key.replace("_", "."): value for key, value in changed.items()}
    topic = ConfigResource(ConfigResourceType.TOPIC, name, config)
    for response in await admin.alter_configs([topic]):
        assert not any(code for code, *_ in response.resources), response

    async def known() -> bool:
        (response,) = await admin.describe_configs([topic])
        ((*_, entries),) = response.resources
        return {entry[0]: entry[1] for entry in entries} == config

    await until(known)
    await admin.close()


async def test_a_topic_that_takes_no_such_record_any_more_is_told_of_once_and_costs_nothing(
    settings: Settings, market: Market, produce: Produce
) -> None:
    (port,) = free_ports(1)
    producer = produce(http_port=port)
    await flows(market)
    await configure(settings, max_message_bytes="100")
    await says(producer, "raise its max.message.bytes to 25165824")
    await flows(market, 4)
    async with aiohttp.ClientSession() as http:
        async with http.get(f"http://127.0.0.1:{port}/health") as response:
            assert response.status == 503
            assert "max.message.bytes" in (await response.json())["parts"]["kafka"]
        async with http.get(f"http://127.0.0.1:{port}/metrics") as response:
            assert 'tapedeck_producer_errors_total{kind="refused"}' in await response.text()
    assert producer.log.read_text().count("max.message.bytes") == 1
    await configure(settings)
    await says(producer, "Kafka takes the records again")
    await flows(market)
    await stopped(producer)
    found = await result(settings, market)
    assert found.gaps == {}


@pytest.mark.parametrize(
    "changed",
    [
        {"max_message_bytes": "1048576"},
        {"cleanup_policy": "compact"},
        {"message_timestamp_type": "LogAppendTime"},
    ],
    ids=lambda changed: next(iter(changed)),
)
async def test_a_topic_that_would_refuse_or_change_what_is_written_stops_the_start(
    settings: Settings, changed: dict[str, str]
) -> None:
    await kafka.prepare(settings)
    await configure(settings, **changed)
    ((key, value),) = changed.items()
    key = key.replace("_", ".")
    right = re.escape(f"{key}={topics.RAW.config()[key]}")
    with pytest.raises(UsageError, match=f"{re.escape(settings.topic_prefix)}raw.* has {key}={value}.* Set {right}"):
        await kafka.prepare(settings)
    await configure(settings, max_message_bytes=str(2 * topics.MAX_RECORD_BYTES), retention_bytes="1000000000")
    await kafka.prepare(settings)


async def test_its_statistics_are_metrics_too(market: Market, produce: Produce) -> None:
    (port,) = free_ports(1)
    produce(http_port=port)
    await flows(market, 2)
    async with aiohttp.ClientSession() as http, http.get(f"http://127.0.0.1:{port}/metrics") as response:
        text = await response.text()
    lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert float(lines['tapedeck_producer_events_total{stream="XT"}']) > 100
    assert float(lines["tapedeck_producer_lease"]) == 1
    assert "tapedeck_producer_journal_bytes" in lines
