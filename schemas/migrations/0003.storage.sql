-- depends: 0002.notional
-- Where the rest of what tapedeck knows is kept: every order of every bar, anomalies, gaps, dead letters, quarantine;
-- what people ask for most as views and functions; roles for who writes and who reads.

CREATE TABLE IF NOT EXISTS crypto_aggregates_history (
    LIKE crypto_aggregates INCLUDING DEFAULTS,
    stored_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (symbol, interval, time, repair, revision)
);

INSERT INTO crypto_aggregates_history (
    time, symbol, interval, start, "end", open, high, low, close, volume, vwap, notional, trade_count, buy_volume,
    sell_volume, status, repair, revision, flags, missing_ns, quality, source, fingerprint
)
SELECT
    time, symbol, interval, start, "end", open, high, low, close, volume, vwap, notional, trade_count, buy_volume,
    sell_volume, status, repair, revision, flags, missing_ns, quality, source, fingerprint
FROM crypto_aggregates
ON CONFLICT DO NOTHING;

CREATE TABLE IF NOT EXISTS anomalies (
    time        timestamptz      NOT NULL,
    id          text             NOT NULL,
    kind        text             NOT NULL,
    severity    text             NOT NULL,
    symbol      text,
    ts_event    bigint           NOT NULL,
    detected    bigint           NOT NULL,
    value       double precision,
    expected    double precision,
    score       double precision,
    threshold   double precision,
    detail      text             NOT NULL,
    epoch       bigint,
    partition   integer          NOT NULL,
    n           bigint,
    interval    text,
    start       bigint,
    repair      bigint,
    revision    bigint,
    fingerprint text             NOT NULL,
    PRIMARY KEY (id, time)
);
CREATE INDEX IF NOT EXISTS anomalies_symbol_time ON anomalies (symbol, time DESC);

CREATE TABLE IF NOT EXISTS gaps (
    time      timestamptz NOT NULL,
    "from"    bigint,
    "to"      bigint      NOT NULL,
    streams   text[]      NOT NULL,
    pairs     text[]      NOT NULL,
    reason    text        NOT NULL,
    epoch     bigint      NOT NULL,
    partition integer     NOT NULL,
    n         bigint      NOT NULL,
    PRIMARY KEY (epoch, partition, n, reason, time)
);
CREATE INDEX IF NOT EXISTS gaps_time ON gaps (time DESC);

CREATE TABLE IF NOT EXISTS dead_letters (
    time      timestamptz NOT NULL,
    reason    text        NOT NULL,
    ts_recv   bigint      NOT NULL,
    encoding  text        NOT NULL,
    payload   text        NOT NULL,
    epoch     bigint      NOT NULL,
    partition integer     NOT NULL,
    n         bigint      NOT NULL,
    PRIMARY KEY (epoch, partition, n, time)
);

CREATE TABLE IF NOT EXISTS quarantine (
    time      timestamptz NOT NULL,
    symbol    text        NOT NULL,
    ts_event  bigint      NOT NULL,
    ts_recv   bigint      NOT NULL,
    ahead_ns  bigint      NOT NULL,
    encoding  text        NOT NULL,
    payload   text        NOT NULL,
    epoch     bigint      NOT NULL,
    partition integer     NOT NULL,
    n         bigint      NOT NULL,
    PRIMARY KEY (epoch, partition, n, time)
);

CREATE TABLE IF NOT EXISTS exchanges (
    exchange integer PRIMARY KEY,
    name     text NOT NULL
);
INSERT INTO exchanges VALUES (1, 'Coinbase'), (2, 'Bitfinex'), (6, 'Bitstamp'), (10, 'Binance.US'), (23, 'Kraken')
ON CONFLICT DO NOTHING;

CREATE OR REPLACE VIEW ohlcv AS
SELECT time, symbol, interval AS timeframe, open, high, low, close, volume, vwap, trade_count
FROM crypto_aggregates;

CREATE OR REPLACE VIEW bars_with_anomalies AS
SELECT b.*, a.id AS anomaly_id, a.kind AS anomaly_kind, a.severity AS anomaly_severity, a.detail AS anomaly_detail
FROM crypto_aggregates b
JOIN anomalies a ON a.symbol = b.symbol AND a.time >= b.time
    AND a.time < b.time + (b."end" - b.start) / 1000 * INTERVAL '1 microsecond';

CREATE OR REPLACE FUNCTION get_latest_price(of_symbol text)
RETURNS TABLE (symbol text, price numeric, size numeric, side text, exchange integer, "time" timestamptz)
LANGUAGE sql STABLE PARALLEL SAFE AS $$
    SELECT t.symbol, t.price, t.size, t.side, t.exchange, t.time
    FROM crypto_trades t
    WHERE t.symbol = of_symbol
    ORDER BY t.time DESC, t.epoch DESC, t.n DESC
    LIMIT 1
$$;

CREATE OR REPLACE FUNCTION calculate_returns(
    of_symbol text, of_interval text, since timestamptz, until timestamptz
)
RETURNS TABLE ("time" timestamptz, close numeric, simple_return double precision, log_return double precision)
LANGUAGE sql STABLE PARALLEL SAFE AS $$
    SELECT b.time, b.close,
        (b.close / lag(b.close) OVER byTime)::double precision - 1,
        ln((b.close / lag(b.close) OVER byTime)::double precision)
    FROM crypto_aggregates b
    WHERE b.symbol = of_symbol AND b.interval = of_interval AND b.time >= since AND b.time < until
    WINDOW byTime AS (ORDER BY b.time)
    ORDER BY b.time
$$;

DO $$
BEGIN
    -- Roles belong to the whole server: without the right to make them, or where another database just makes the
    -- same ones, this database has none of its own.
    BEGIN
        IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'tapedeck_writer') THEN
            CREATE ROLE tapedeck_writer NOLOGIN;
        END IF;
        IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'tapedeck_reader') THEN
            CREATE ROLE tapedeck_reader NOLOGIN;
        END IF;
        GRANT USAGE ON SCHEMA public TO tapedeck_writer, tapedeck_reader;
        GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO tapedeck_writer;
        GRANT SELECT ON ALL TABLES IN SCHEMA public TO tapedeck_reader;
        ALTER DEFAULT PRIVILEGES IN SCHEMA public GRANT SELECT, INSERT, UPDATE, DELETE ON TABLES TO tapedeck_writer;
        ALTER DEFAULT PRIVILEGES IN SCHEMA public GRANT SELECT ON TABLES TO tapedeck_reader;
    EXCEPTION WHEN insufficient_privilege OR unique_violation OR duplicate_object OR undefined_object THEN
        RAISE NOTICE 'roles tapedeck_writer and tapedeck_reader are left out: %', SQLERRM;
    END;
END
$$;

COMMENT ON TABLE crypto_aggregates_history IS 'Every order of every bar: what was known of it, and since when';
COMMENT ON COLUMN crypto_aggregates_history.stored_at IS 'When this order came here; the only wall clock in these tables';
COMMENT ON TABLE anomalies IS 'anomalies.v1: what the detectors found (docs/anomalies.md)';
COMMENT ON TABLE gaps IS 'gaps.v1: stretches of feed time in which events may have been missed';
COMMENT ON TABLE dead_letters IS 'deadletters.v1: bytes that could not be normalised, whole';
COMMENT ON TABLE quarantine IS 'quarantine.v1: events from too far in the future to be believed';
COMMENT ON TABLE exchanges IS 'Names of the vendor''s exchange ids';
COMMENT ON VIEW ohlcv IS 'Bars under the names that charting tools expect';
COMMENT ON VIEW bars_with_anomalies IS 'Bars and the anomalies of their symbol that lie in them';
COMMENT ON FUNCTION get_latest_price(text) IS 'The newest trade of a symbol by event time';
COMMENT ON FUNCTION calculate_returns(text, text, timestamptz, timestamptz) IS
    'Close-to-close returns of the bars of a symbol and interval in [since, until); the first has none';
