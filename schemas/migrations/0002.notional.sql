-- depends: 0001.tables
-- The exact sum of price x size, from which the vwap of longer bars is made. Null in bars from before this column.

ALTER TABLE crypto_aggregates ADD COLUMN IF NOT EXISTS notional numeric;
