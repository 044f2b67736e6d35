DROP VIEW vendor_bars_latest;
DROP TABLE vendor_bars, crypto_aggregates, crypto_quotes, crypto_trades, sink_offsets;
