"""Quix Streams: a tumbling window with a reducer, final results; RocksDB and a changelog, as it has them by default."""

from datetime import timedelta

from meter import BROKER, GRACE_MS, GROUP, SHAPE, SINK, SOURCE, STATE, WINDOW_MS, Meter, final, fold, new
from quixstreams import Application

meter = Meter()
app = Application(
    broker_address=BROKER,
    consumer_group=GROUP,
    auto_offset_reset="earliest",
    state_dir=STATE,
    loglevel="WARNING",
    producer_extra_config={"compression.type": "lz4"},
)


def time_of(value, _headers, _timestamp, _type):
    return value["t"] if SHAPE == "single" else value[-1]["t"]


def start(event):
    return new(event["pair"], event["t"] - event["t"] % WINDOW_MS, event["p"], event["s"])


def add(bar, event):
    fold(bar, event["p"], event["s"])
    return bar


frame = app.dataframe(app.topic(SOURCE, value_deserializer="json", timestamp_extractor=time_of))
if SHAPE == "arrays":  # no key: expand, give each its own time, and group, which is a topic in between
    frame = frame.apply(lambda value: value, expand=True)
    frame = frame.set_timestamp(lambda event, _key, _timestamp, _headers: event["t"]).group_by("pair")
frame = frame.update(lambda _event: meter.event())
frame = frame.tumbling_window(timedelta(milliseconds=WINDOW_MS), grace_ms=timedelta(milliseconds=GRACE_MS))
frame = frame.reduce(reducer=add, initializer=start).final(closing_strategy="partition")
frame.apply(lambda window: final(window["value"])).to_topic(app.topic(SINK, value_serializer="json"))
app.run()
