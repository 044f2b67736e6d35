"""The vendor's names of pairs and exchanges, from the simulator's REST into the tables that queries join."""

import asyncpg
import pytest
from pydantic import SecretStr
from test_simulator_rest import served

from producers.reference import refresh
from tapedeck.errors import TapedeckError
from tapedeck.settings import Settings

SYMBOLS = ("BTC-USD", "ETH-BTC", "SHIB-USDT")


async def test_names_come_from_rest_whose_tickers_have_no_hyphen_and_what_was_known_stays(settings: Settings) -> None:
    async with served(symbols=SYMBOLS) as feed:
        asked = settings.model_copy(update={"polygon_rest_url": f"http://127.0.0.1:{feed.rest_port}"})
        assert await refresh(asked) == (3, 5)
        connection = await asyncpg.connect(settings.database_url.get_secret_value())
        await connection.execute("UPDATE exchanges SET name = 'wrong' WHERE exchange = 23")
        await connection.execute("INSERT INTO exchanges VALUES (99, 'gone')")
        assert await refresh(asked) == (3, 5)
    pairs = await connection.fetch("SELECT ticker, symbol, base, quote FROM tickers ORDER BY ticker")
    names = dict(await connection.fetch("SELECT exchange, name FROM exchanges"))
    await connection.close()
    assert [tuple(pair) for pair in pairs] == [
        ("X:BTCUSD", "BTC-USD", "BTC", "USD"),
        ("X:ETHBTC", "ETH-BTC", "ETH", "BTC"),
        ("X:SHIBUSDT", "SHIB-USDT", "SHIB", "USDT"),
    ]
    assert names == {1: "Coinbase", 2: "Bitfinex", 6: "Bitstamp", 10: "Binance.US", 23: "Kraken", 99: "gone"}


async def test_a_key_that_is_refused_is_said_in_one_line_without_it(settings: Settings) -> None:
    async with served(keys=frozenset({"other"})) as feed:
        wrong = {"polygon_rest_url": f"http://127.0.0.1:{feed.rest_port}", "polygon_api_key": SecretStr("s3cret")}
        with pytest.raises(TapedeckError, match="refused") as raised:
            await refresh(settings.model_copy(update=wrong))
    assert "s3cret" not in str(raised.value)
    assert "\n" not in str(raised.value)
