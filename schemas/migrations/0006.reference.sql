-- depends: 0005.open_gaps
-- How REST calls the pairs: without a hyphen, so that only its own table tells base from quote.

CREATE TABLE IF NOT EXISTS tickers (
    ticker text PRIMARY KEY,
    symbol text NOT NULL,
    base   text NOT NULL,
    quote  text NOT NULL,
    name   text NOT NULL
);
CREATE INDEX IF NOT EXISTS tickers_symbol ON tickers (symbol);

COMMENT ON TABLE tickers IS 'REST''s names of the pairs, as `tapedeck reference` found them';
COMMENT ON COLUMN tickers.ticker IS 'As REST has it: X:BTCUSD';
COMMENT ON COLUMN tickers.symbol IS 'As every other table has it: BTC-USD';
COMMENT ON COLUMN tickers.base IS 'The currency that is bought and sold';
COMMENT ON COLUMN tickers.quote IS 'The currency that the price is in';
COMMENT ON COLUMN tickers.name IS 'The vendor''s words for the pair';
