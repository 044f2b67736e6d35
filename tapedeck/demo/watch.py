"""What the line does, seen from outside: its topics read like any consumer would, its metrics scraped."""

import asyncio
import time
from collections import Counter, deque
from typing import Any

import aiohttp
import msgspec
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import KafkaError
from prometheus_client.parser import text_string_to_metric_families

from schemas import events, topics
from tapedeck import kafka
from tapedeck.settings import Settings

READ = (
    topics.TRADES,
    topics.QUOTES,
    topics.BARS_1M,
    topics.GAPS,
    topics.DEAD_LETTERS,
    topics.QUARANTINE,
)


class _Trade(msgspec.Struct):
    symbol: str
    ts_recv: int
    price: float


class _Quote(msgspec.Struct):
    symbol: str
    bid_price: float
    ask_price: float


class Watch:
    """The newest of each symbol, the time from socket to trades.v1, and everything that is no plain event."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._prefix = settings.topic_prefix
        self.price: dict[str, float] = {}
        self.quote: dict[str, tuple[float, float]] = {}
        self.bar: dict[str, events.Bar] = {}
        self.rate: dict[str, float] = {}
        self.latencies_ms: deque[float] = deque(maxlen=1_000_000)
        self.gaps: dict[tuple[int, int, int], events.Gap] = {}
        self.dead: dict[tuple[int, int, int], events.DeadLetter] = {}
        self.quarantined: dict[tuple[int, int, int], events.Quarantined] = {}
        self._counts: Counter[str] = Counter()
        self._rated = time.monotonic()
        self._positions: dict[TopicPartition, int] = {}
        self._since_ns = time.time_ns()
        self.first_recv_ns = 0
        self.first_bar_s: float | None = None

    async def run(self) -> None:
        """Reads until cancelled; troubles of Kafka are waited out."""
        places = kafka.places_of(self._settings, *READ)
        while True:
            consumer = AIOKafkaConsumer(
                **self._settings.kafka_options(),
                enable_auto_commit=False,
                auto_offset_reset="earliest",
                fetch_max_wait_ms=20,
                max_partition_fetch_bytes=topics.MAX_RECORD_BYTES,
            )
            try:
                await consumer.start()
                consumer.assign(places)
                for place, position in self._positions.items():
                    consumer.seek(place, position)
                while True:
                    batches = await consumer.getmany(timeout_ms=200, max_records=5_000)
                    now = time.time_ns()
                    for place, records in batches.items():
                        self._take(place.topic.removeprefix(self._prefix), records, now)
                        self._positions[place] = records[-1].offset + 1
                    self._rates()
                    await asyncio.sleep(0)
            except (KafkaError, OSError):
                await asyncio.sleep(0.5)
            finally:
                await consumer.stop()

    def _take(self, topic: str, records: list[Any], now: int) -> None:
        for record in records:
            value = record.value
            match topic:
                case topics.TRADES.name:
                    trade = _decode_trade(value)
                    self.price[trade.symbol] = trade.price
                    self._counts[trade.symbol] += 1
                    if trade.ts_recv > self._since_ns:  # not what an earlier run left in the folder
                        self.first_recv_ns = self.first_recv_ns or trade.ts_recv
                        self.latencies_ms.append((now - trade.ts_recv) / events.NS_PER_MS)
                case topics.QUOTES.name:
                    quote = _decode_quote(value)
                    self.quote[quote.symbol] = (quote.bid_price, quote.ask_price)
                case topics.BARS_1M.name:
                    bar = events.decode_bar(value)
                    if isinstance(bar, events.Bar):
                        self.first_bar_s = self.first_bar_s or time.time()
                        held = self.bar.get(bar.symbol)
                        if held is None or (bar.start, bar.revision) >= (held.start, held.revision):
                            self.bar[bar.symbol] = bar
                case topics.GAPS.name:
                    gap = events.decode_gap(value)
                    self.gaps[gap.epoch, gap.partition, gap.n] = gap
                case topics.DEAD_LETTERS.name:
                    letter = events.decode_dead_letter(value)
                    self.dead[letter.epoch, letter.partition, letter.n] = letter
                case topics.QUARANTINE.name:
                    event = events.decode_quarantined(value)
                    self.quarantined[event.epoch, event.partition, event.n] = event

    def _rates(self) -> None:
        now = time.monotonic()
        if now - self._rated >= 1:
            self.rate = {symbol: count / (now - self._rated) for symbol, count in self._counts.items()}
            self._rated = now
            self._counts = Counter(dict.fromkeys(self._counts, 0))

    def percentiles_ms(self) -> tuple[float | None, float | None]:
        """p50 and p99 from receive time to seen here."""
        ordered = sorted(self.latencies_ms)
        if not ordered:
            return None, None
        return ordered[len(ordered) // 2], ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)]

    async def caught_up(self) -> None:
        """Waits until everything that the read topics hold now was seen; raises KafkaError."""
        ends = await kafka.ends(self._settings, kafka.places_of(self._settings, *READ))
        while any(self._positions.get(place, 0) < end for place, end in ends.items()):
            await asyncio.sleep(0.01)


_decode_trade = msgspec.json.Decoder(_Trade).decode
_decode_quote = msgspec.json.Decoder(_Quote).decode


async def healthy(http: aiohttp.ClientSession, port: int) -> bool:
    """Whether a process says that it is well."""
    try:
        async with http.get(f"http://127.0.0.1:{port}/health", timeout=aiohttp.ClientTimeout(1)) as answer:
            return answer.status == 200
    except (aiohttp.ClientError, TimeoutError, OSError):
        return False


async def scrape(http: aiohttp.ClientSession, port: int) -> dict[str, float]:
    """The metrics of one process, summed over labels; empty while it does not answer."""
    try:
        async with http.get(f"http://127.0.0.1:{port}/metrics", timeout=aiohttp.ClientTimeout(1)) as answer:
            text = await answer.text()
    except (aiohttp.ClientError, TimeoutError, OSError):
        return {}
    sums: Counter[str] = Counter()
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            sums[sample.name] += sample.value  # type: ignore[assignment]
    return dict(sums)
