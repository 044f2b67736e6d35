-- depends: 0003.storage
-- What a sink could not write, and what it never got to read.

CREATE TABLE IF NOT EXISTS sink_dead_letters (
    sink       text        NOT NULL,
    topic      text        NOT NULL,
    partition  integer     NOT NULL,
    "offset"   bigint      NOT NULL,
    reason     text        NOT NULL,
    key        bytea,
    value      bytea,
    noticed_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (sink, topic, partition, "offset")
);

CREATE TABLE IF NOT EXISTS sink_losses (
    sink        text        NOT NULL,
    topic       text        NOT NULL,
    partition   integer     NOT NULL,
    from_offset bigint      NOT NULL,
    to_offset   bigint      NOT NULL,
    noticed_at  timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (sink, topic, partition, from_offset)
);

-- For a stretch of time over all symbols; the rows come nearly in its order, so it costs next to nothing.
CREATE INDEX IF NOT EXISTS crypto_trades_time ON crypto_trades USING brin (time);
CREATE INDEX IF NOT EXISTS crypto_quotes_time ON crypto_quotes USING brin (time);

-- A name means the same thing in every table; where it does not, the table's name stands before it.
DO $$
DECLARE
    said constant jsonb := $said${
        "time": "Event time, as people, dashboards and hypertables want it: ts_event, start, to or ts_recv of the row in whole microseconds",
        "symbol": "The pair, as BTC-USD",
        "ts_event": "Exchange time in ns since the epoch, at the feed's resolution of a millisecond",
        "ts_recv": "When the producer received it, ns since the epoch",
        "ts_vendor": "The vendor's own finer time where it gave one, ns since the epoch",
        "price": "Price in quote currency, exact",
        "size": "Amount in base currency, exact",
        "side": "Who took: buy, sell or unknown",
        "exchange": "The vendor's number of the exchange; table exchanges names some",
        "trade_id": "The exchange's id of the trade",
        "conditions": "The vendor's condition codes, as they came",
        "flags": "What to know of it: late, too_late, repaired of trades; partial, gap, late, repaired of bars",
        "epoch": "Of the raw event's identity: which start of the producer; negative: the repair number",
        "partition": "Of the raw event's identity: the partition of the raw topic",
        "n": "Of the raw event's identity: its number in the epoch and partition",
        "bid_price": "Best bid, exact",
        "bid_size": "Amount bid in base currency; null where the feed does not say",
        "ask_price": "Best ask, exact",
        "ask_size": "Amount asked in base currency; null where the feed does not say",
        "interval": "Length of the bar: 1m, 5m, 15m, 30m, 1h, 4h or 1d",
        "start": "First ns of the bar",
        "end": "First ns after the bar",
        "open": "Price of the first trade by (ts_event, place in the log)",
        "high": "Highest price",
        "low": "Lowest price",
        "close": "Price of the last trade by (ts_event, place in the log)",
        "volume": "Sum of the sizes, exact",
        "vwap": "notional / volume, half-even to 12 significant digits",
        "notional": "Sum of price x size, exact; null in bars from before this column",
        "trade_count": "How many trades",
        "buy_volume": "Part of the volume whose taker bought",
        "sell_volume": "Part of the volume whose taker sold",
        "status": "final",
        "repair": "First part of the bar's order: number of the repair it was made by, 0: live; a sum in longer bars",
        "revision": "Second part of the bar's order: how many events were folded in since it became final; a sum in longer bars",
        "missing_ns": "How much of the bar marked gaps cover",
        "quality": "1 - missing_ns / length, to four digits",
        "source": "What it was made from: trades, or the vendor's aggregates where it sells no trades",
        "fingerprint": "Of the pipeline's version and settings that made it",
        "stored_at": "When this order came here, by the database's clock",
        "id": "Key: the same finding always has the same id",
        "kind": "The detector that found it (docs/anomalies.md)",
        "severity": "info, warning or critical",
        "detected": "The tick at which it was found, ns since the epoch",
        "value": "What was measured",
        "expected": "What it was compared with",
        "score": "How far the two lie apart, in the detector's own unit",
        "threshold": "From which score on that is an anomaly",
        "detail": "The same in words",
        "from": "First ns of feed time that may have been missed; null: from before the recording began",
        "to": "Last ns of feed time that may have been missed",
        "streams": "Kinds of events that may have been missed: XT, XQ, XA, XAS",
        "pairs": "Whose events; * is every pair of the partition",
        "reason": "Why",
        "encoding": "How the bytes stand in payload: utf-8 or base64",
        "payload": "The bytes, whole",
        "ahead_ns": "How far past the last tick it claims to be",
        "name": "Its name",
        "sink": "The table that the sink fills",
        "topic": "Name of the topic, prefix included",
        "next_offset": "The first record that is not yet in the table",
        "offset": "Where the record stands in the partition",
        "key": "The record's key, whole",
        "from_offset": "First record that the table lacks",
        "to_offset": "First record after those it lacks",
        "noticed_at": "When the sink noticed, by the database's clock",
        "sink_offsets.partition": "Partition of the topic",
        "sink_dead_letters.partition": "Partition of the topic",
        "sink_losses.partition": "Partition of the topic",
        "sink_dead_letters.value": "The record's value, whole; null where it had none",
        "vendor_bars.vwap": "The vendor's own; null where it gave none",
        "vendor_bars.volume": "Traded amount in base currency, as the vendor says",
        "vendor_bars.open": "First price, as the vendor says",
        "vendor_bars.close": "Last price, as the vendor says",
        "anomalies.epoch": "Of the event it is about, with partition and n; null where it is about a bar",
        "anomalies.partition": "The partition it was found on",
        "anomalies.n": "Of the event it is about; null where it is about a bar",
        "anomalies.start": "Of the bar it is about, with interval, repair and revision; null where it is about an event"
    }$said$;
    found record;
BEGIN
    FOR found IN
        SELECT c.oid::regclass AS name, c.relname, a.attname
        FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid
        WHERE c.relnamespace = 'public'::regnamespace AND c.relkind = 'r' AND a.attnum > 0 AND NOT a.attisdropped
            AND c.relname IN (
                'crypto_trades', 'crypto_quotes', 'crypto_aggregates', 'crypto_aggregates_history', 'vendor_bars',
                'anomalies', 'gaps', 'dead_letters', 'quarantine', 'exchanges', 'sink_offsets', 'sink_dead_letters',
                'sink_losses'
            ) AND col_description(c.oid, a.attnum) IS NULL
    LOOP
        EXECUTE format(
            'COMMENT ON COLUMN %s.%I IS %L', found.name, found.attname,
            coalesce(said ->> (found.relname || '.' || found.attname), said ->> found.attname)
        );
    END LOOP;
END
$$;

COMMENT ON TABLE sink_dead_letters IS 'Records that make no row of their table, or that the database refused, whole and with the reason';
COMMENT ON TABLE sink_losses IS 'Records that retention took from the log before a sink had read them; tapedeck rebuild makes them anew';
