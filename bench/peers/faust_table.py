"""Faust as its tutorial has it: records, a windowed Table updated for each event, on_window_close sends the bar.

A grace of 2 s in event time cannot be said: the table closes windows by the wall clock. Seconds, not milliseconds,
for with those its compiled window overflows and eats all memory.
"""

import faust
from meter import BROKER, GROUP, PARTITIONS, SINK, SOURCE, STATE, WINDOW_MS, Meter, final, fold, new

meter = Meter()
app = faust.App(
    GROUP,
    broker=f"kafka://{BROKER}",
    store="memory://",
    topic_partitions=PARTITIONS,
    web_enabled=False,
    datadir=STATE,
    table_cleanup_interval=1.0,
)


class Trade(faust.Record, serializer="json"):
    pair: str
    p: float
    s: float
    t: int


source = app.topic(SOURCE, value_type=Trade)
sink = app.topic(SINK, value_serializer="json")


async def closed(key, bar):
    await sink.send(key=key[0], value=final(bar))


table = app.Table("bars", default=dict, partitions=PARTITIONS, on_window_close=closed)
bars = table.tumbling(WINDOW_MS / 1000, expires=2.0).relative_to(lambda event: event.value.t / 1000)


@app.agent(source)
async def trades(stream):
    async for trade in stream:
        window = bars[trade.pair]
        bar = window.value()
        if bar:
            fold(bar, trade.p, trade.s)
        else:
            bar = new(trade.pair, trade.t // WINDOW_MS * WINDOW_MS, trade.p, trade.s)
        bars[trade.pair] = bar
        meter.event()


if __name__ == "__main__":
    app.main()
