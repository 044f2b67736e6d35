"""One client that puts a feed onto Kafka, measured from inside: ours, or a peer. Prints one line of JSON.

`tapedeck`: the producer process as it is, journal included. `massive-*`: the vendor's client, each event handed
to aiokafka or confluent-kafka. `ws-*`: websockets and orjson, a send for each event. `*-null`: no Kafka.
"""

import argparse
import asyncio
import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import orjson


class Count:
    """Clock: from the first event handed to the client's code until all are acknowledged."""

    def __init__(self, events: int) -> None:
        self.wanted = events
        self.seen = 0
        self.first = self.last = 0.0
        self.cpu = 0.0
        self.all = asyncio.Event()

    def begin(self) -> None:
        """The first events have come."""
        if not self.first:
            self.first, self.cpu = time.perf_counter(), time.process_time()

    def add(self, events: int) -> None:
        self.begin()
        self.seen += events
        if self.seen >= self.wanted:
            self.all.set()

    def done(self, latencies_ms: list[float]) -> None:
        """All is acknowledged."""
        elapsed, cpu = time.perf_counter() - self.first, time.process_time() - self.cpu
        latencies_ms.sort()
        quantiles = {
            f"p{q}_ms": latencies_ms[min(len(latencies_ms) - 1, len(latencies_ms) * q // 100)]
            for q in (50, 99)
            if latencies_ms
        }
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        rates = {"events_per_s": self.seen / elapsed, "cpu_us": cpu / self.seen * 1e6, "rss_mb": memory}
        print(json.dumps(rates | quantiles), flush=True)
        os._exit(0)  # a peer's client need not end in order


class Sink:
    """Takes events onto Kafka by one of the clients, or nowhere."""

    def __init__(self, client: str, broker: str, topic: str) -> None:
        self._client, self._broker, self._topic = client, broker, topic
        self._producer: Any = None

    async def start(self) -> None:
        if self._client == "aiokafka":
            from aiokafka import AIOKafkaProducer

            self._producer = AIOKafkaProducer(
                bootstrap_servers=self._broker, acks="all", compression_type="lz4", linger_ms=5
            )
            await self._producer.start()
        elif self._client == "confluent":
            from confluent_kafka import Producer

            options = {"bootstrap.servers": self._broker, "acks": "all", "compression.type": "lz4", "linger.ms": 5}
            self._producer = Producer(options)

    async def send(self, value: bytes, key: str) -> None:
        if self._client == "aiokafka":
            await self._producer.send(self._topic, value, key.encode())
        elif self._client == "confluent":
            while True:
                try:
                    self._producer.produce(self._topic, value, key)
                    self._producer.poll(0)
                    return
                except BufferError:
                    self._producer.poll(0.05)

    async def flush(self) -> None:
        if self._client == "aiokafka":
            await self._producer.flush()
        elif self._client == "confluent":
            self._producer.flush()


async def massive(options: argparse.Namespace, sink: Sink, count: Count) -> None:
    from massive import WebSocketClient

    async def handle(messages: Any) -> None:
        for message in messages:
            await sink.send(orjson.dumps(message), message.pair)
        count.add(len(messages))

    client = WebSocketClient(
        api_key="k", feed=f"127.0.0.1:{options.port}", market="crypto", secure=False, subscriptions=["XT.*"]
    )
    asyncio.create_task(client.connect(handle))  # noqa: RUF006
    await count.all.wait()


async def websocket(options: argparse.Namespace, sink: Sink, count: Count) -> None:
    import websockets

    async with websockets.connect(f"ws://127.0.0.1:{options.port}/crypto", compression=None) as socket:
        await socket.recv()
        await socket.send('{"action":"auth","params":"k"}')
        await socket.recv()
        await socket.send('{"action":"subscribe","params":"XT.*"}')
        await socket.recv()
        while not count.all.is_set():
            events = orjson.loads(await socket.recv())
            for event in events:
                await sink.send(orjson.dumps(event), event["pair"])
            count.add(len(events))


async def tapedeck(options: argparse.Namespace, count: Count) -> None:
    from producers import service
    from schemas.raw import RawRecord
    from tapedeck import logs, settings
    from tapedeck.shell import Shell

    loaded = settings.load(
        kafka_bootstrap_servers=options.broker,
        topic_prefix=options.topic,
        polygon_api_key="k",
        polygon_ws_url=f"ws://127.0.0.1:{options.port}/crypto",
        symbols="*",
        streams="XT",
        journal_dir=Path(options.journal),
        log_level="WARNING",
    )
    logs.configure(loaded, "produce")
    latencies: list[float] = []
    publishing = service.kafka.Publisher.publish
    journal: service.Journal | None = None

    class Watched(service.Journal):
        """Counts events as they are appended, and times them as they are acknowledged."""

        def append(self, records: list[RawRecord]) -> None:
            nonlocal journal
            journal = self
            super().append(records)
            events = sum(record.events for record in records if record.kind == "slice")
            if events:
                count.add(events)

        def acknowledge(self) -> None:
            super().acknowledge()
            if count.all.is_set() and not len(self):
                count.done(latencies)

    async def timed(publisher: Any, messages: Any) -> None:
        messages = list(messages)
        await publishing(publisher, messages)
        now = time.time_ns()
        for message in messages:
            headers = dict(message.headers)
            if headers["kind"] == b"slice":
                latencies.extend((now - recv) / 1e6 for recv, n in orjson.loads(headers["recv"]) for _ in range(n))

    class Begun(service.Slicer):
        """Tells when the first frame has come: the journal sees its events a tenth of a second later."""

        def frame(self, items: list[Any], recv: int) -> None:
            count.begin()
            super().frame(items, recv)

    service.Journal = Watched  # type: ignore[misc]
    service.Slicer = Begun  # type: ignore[misc]
    if options.latency:
        service.kafka.Publisher.publish = timed  # type: ignore[method-assign]
    await service.run(Shell(loaded, "produce"))


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("mode")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--broker", required=True)
    parser.add_argument("--topic", required=True, help="a topic that exists; of ours, the prefix")
    parser.add_argument("--events", type=int, required=True)
    parser.add_argument("--latency", action="store_true")
    options = parser.parse_args()
    count = Count(options.events)
    if options.mode == "tapedeck":
        with tempfile.TemporaryDirectory() as options.journal:
            await tapedeck(options, count)
        return
    reader, client = options.mode.split("-")
    sink = Sink(client, options.broker, options.topic)
    await sink.start()
    await (massive if reader == "massive" else websocket)(options, sink, count)
    await sink.flush()
    count.done([])


if __name__ == "__main__":
    if "tapedeck" in sys.argv:
        import uvloop

        uvloop.run(main())
    else:
        asyncio.run(main())
