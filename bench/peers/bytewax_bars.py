"""Bytewax: fold_window over an event clock that waits 2 s."""

from datetime import UTC, datetime, timedelta

import bytewax.operators as op
import bytewax.operators.windowing as windowing
import orjson
from bytewax.connectors.kafka import KafkaSinkMessage
from bytewax.connectors.kafka import operators as kafka
from bytewax.dataflow import Dataflow
from meter import BROKER, GRACE_MS, SHAPE, SINK, SOURCE, WINDOW_MS, Meter, final, fold, new

meter = Meter()


def keyed(event):
    meter.event()
    return event["pair"], event


def add(bar, event):
    if bar is None:
        return new(event["pair"], event["t"] - event["t"] % WINDOW_MS, event["p"], event["s"])
    fold(bar, event["p"], event["s"])
    return bar


flow = Dataflow("bars")
source = kafka.input("in", flow, brokers=[BROKER], topics=[SOURCE], tail=True)
parse = op.map if SHAPE == "single" else op.flat_map
events = op.map("key", parse("parse", source.oks, lambda message: orjson.loads(message.value)), keyed)
clock = windowing.EventClock(lambda e: datetime.fromtimestamp(e["t"] / 1000, UTC), timedelta(milliseconds=GRACE_MS))
windower = windowing.TumblingWindower(timedelta(milliseconds=WINDOW_MS), datetime(2021, 1, 1, tzinfo=UTC))
bars = windowing.fold_window("bars", events, clock, windower, lambda: None, add, lambda one, _other: one)
out = op.map("final", bars.down, lambda item: KafkaSinkMessage(item[0].encode(), orjson.dumps(final(item[1][1]))))
kafka.output("out", out, brokers=[BROKER], topic=SINK)
