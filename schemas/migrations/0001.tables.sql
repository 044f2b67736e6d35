-- Tables of events, each row once. Times are ns since the epoch as in the topics; `time` is the same for
-- people, dashboards and hypertables. With TimescaleDB loaded they are hypertables, without it plain tables.
--
-- Every statement must bear being run twice: yoyo commits a migration before it notes that it did.

CREATE TABLE IF NOT EXISTS sink_offsets (
    sink        text    NOT NULL,
    topic       text    NOT NULL,
    partition   integer NOT NULL,
    next_offset bigint  NOT NULL,
    PRIMARY KEY (sink, topic, partition)
);
COMMENT ON TABLE sink_offsets IS 'Where each sink stands; moved in the transaction that writes the rows';

CREATE TABLE IF NOT EXISTS crypto_trades (
    time       timestamptz NOT NULL,
    symbol     text        NOT NULL,
    ts_event   bigint      NOT NULL,
    ts_recv    bigint      NOT NULL,
    ts_vendor  bigint,
    price      numeric     NOT NULL,
    size       numeric     NOT NULL,
    side       text        NOT NULL,
    exchange   integer     NOT NULL,
    trade_id   text        NOT NULL,
    conditions integer[]   NOT NULL,
    flags      text[]      NOT NULL,
    epoch      bigint      NOT NULL,
    partition  integer     NOT NULL,
    n          bigint      NOT NULL,
    PRIMARY KEY (symbol, exchange, trade_id, time)
);
COMMENT ON TABLE crypto_trades IS 'trades.v1, each trade once';
CREATE INDEX IF NOT EXISTS crypto_trades_symbol_time ON crypto_trades (symbol, time DESC);

CREATE TABLE IF NOT EXISTS crypto_quotes (
    time      timestamptz NOT NULL,
    symbol    text        NOT NULL,
    ts_event  bigint      NOT NULL,
    ts_recv   bigint      NOT NULL,
    bid_price numeric     NOT NULL,
    bid_size  numeric,
    ask_price numeric     NOT NULL,
    ask_size  numeric,
    exchange  integer,
    epoch     bigint      NOT NULL,
    partition integer     NOT NULL,
    n         bigint      NOT NULL,
    PRIMARY KEY (epoch, partition, n, time)
);
COMMENT ON TABLE crypto_quotes IS 'quotes.v1, each quote once, by the identity of its raw event';
CREATE INDEX IF NOT EXISTS crypto_quotes_symbol_time ON crypto_quotes (symbol, time DESC);

CREATE TABLE IF NOT EXISTS crypto_aggregates (
    time        timestamptz NOT NULL,
    symbol      text        NOT NULL,
    interval    text        NOT NULL,
    start       bigint      NOT NULL,
    "end"       bigint      NOT NULL,
    open        numeric     NOT NULL,
    high        numeric     NOT NULL,
    low         numeric     NOT NULL,
    close       numeric     NOT NULL,
    volume      numeric     NOT NULL,
    vwap        numeric     NOT NULL,
    trade_count bigint      NOT NULL,
    buy_volume  numeric     NOT NULL,
    sell_volume numeric     NOT NULL,
    status      text        NOT NULL,
    repair      bigint      NOT NULL,
    revision    bigint      NOT NULL,
    flags       text[]      NOT NULL,
    missing_ns  bigint      NOT NULL,
    quality     numeric     NOT NULL,
    source      text        NOT NULL,
    fingerprint text        NOT NULL,
    PRIMARY KEY (symbol, interval, time)
);
COMMENT ON TABLE crypto_aggregates IS 'Our bars, each at its highest (repair, revision)';

CREATE TABLE IF NOT EXISTS vendor_bars (
    time      timestamptz NOT NULL,
    symbol    text        NOT NULL,
    interval  text        NOT NULL,
    start     bigint      NOT NULL,
    "end"     bigint      NOT NULL,
    ts_recv   bigint      NOT NULL,
    open      numeric     NOT NULL,
    high      numeric     NOT NULL,
    low       numeric     NOT NULL,
    close     numeric     NOT NULL,
    volume    numeric     NOT NULL,
    vwap      numeric,
    epoch     bigint      NOT NULL,
    partition integer     NOT NULL,
    n         bigint      NOT NULL,
    PRIMARY KEY (epoch, partition, n, time)
);
COMMENT ON TABLE vendor_bars IS 'Every aggregate message of the vendor, revisions included';
CREATE INDEX IF NOT EXISTS vendor_bars_symbol_time ON vendor_bars (symbol, interval, time DESC);

CREATE OR REPLACE VIEW vendor_bars_latest AS
SELECT DISTINCT ON (symbol, interval, start) *
FROM vendor_bars
ORDER BY symbol, interval, start, epoch DESC, n DESC;
COMMENT ON VIEW vendor_bars_latest IS 'The last message for each pair and start: the one that holds';

DO $$
BEGIN
    -- A setting that is there when the library is loaded; shared_preload_libraries only superusers may read.
    IF current_setting('timescaledb.disable_load', true) IS NOT NULL THEN
        CREATE EXTENSION IF NOT EXISTS timescaledb;
        PERFORM create_hypertable('crypto_trades', by_range('time', INTERVAL '1 day'), if_not_exists => true);
        PERFORM create_hypertable('crypto_quotes', by_range('time', INTERVAL '1 day'), if_not_exists => true);
        PERFORM create_hypertable('crypto_aggregates', by_range('time', INTERVAL '30 days'), if_not_exists => true);
        PERFORM create_hypertable('vendor_bars', by_range('time', INTERVAL '30 days'), if_not_exists => true);
    END IF;
END
$$;
