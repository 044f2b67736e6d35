"""aiokafka, orjson and a dict: what is there to gain at all. No state that survives, no grace but by order."""

import asyncio

import orjson
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from meter import BROKER, GRACE_MS, GROUP, SHAPE, SINK, SOURCE, WINDOW_MS, Meter, final, fold, new


async def main():
    meter, last = Meter(), False
    windows = {}  # by partition: (start, pair) to bar
    upto = {}
    consumer = AIOKafkaConsumer(SOURCE, bootstrap_servers=BROKER, group_id=GROUP, auto_offset_reset="earliest")
    producer = AIOKafkaProducer(bootstrap_servers=BROKER, compression_type="lz4", linger_ms=5)
    await consumer.start()
    await producer.start()
    while not last:
        for place, records in (await consumer.getmany(timeout_ms=500, max_records=5000)).items():
            open_, done = windows.setdefault(place.partition, {}), []
            for record in records:
                if SHAPE == "slices" and record.headers[0][1] != b"slice":
                    continue
                value = orjson.loads(record.value)
                for event in value if SHAPE != "single" else (value,):
                    t, pair = event["t"], event["pair"]
                    start = t - t % WINDOW_MS
                    bar = open_.get((start, pair))
                    if bar is None:
                        over = t - GRACE_MS - WINDOW_MS
                        if over >= upto.get(place.partition, 0):
                            upto[place.partition] = start
                            done += [open_.pop(key) for key in list(open_) if key[0] <= over]
                        open_[start, pair] = new(pair, start, event["p"], event["s"])
                    else:
                        fold(bar, event["p"], event["s"])
                    last = meter.event() or last
            for bar in done:
                await producer.send(SINK, orjson.dumps(final(bar)), bar["pair"].encode())
    await producer.stop()
    await consumer.stop()


asyncio.run(main())
