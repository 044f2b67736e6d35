"""The vendor's names for what the tape calls by letters and numbers: pairs and exchanges, from REST into tables.

The pipeline asks for none of them: its results depend on the log alone, where a pair has its hyphen.
"""

import msgspec

from producers.rest import Rest, RestError
from schemas import wire
from tapedeck import database
from tapedeck.errors import TapedeckError
from tapedeck.settings import Settings

TICKERS, EXCHANGES = "/v3/reference/tickers", "/v3/reference/exchanges"


class Ticker(msgspec.Struct):
    """A result of TICKERS, of market crypto."""

    ticker: str
    base_currency_symbol: str
    currency_symbol: str
    name: str = ""

    @property
    def symbol(self) -> str:
        """Raises ValueError for what is no pair."""
        return wire.symbol_of(f"{self.base_currency_symbol}-{self.currency_symbol}")


class Exchange(msgspec.Struct):
    id: int
    name: str


async def refresh(settings: Settings) -> tuple[int, int]:
    """Brings the tables `tickers` and `exchanges` up to date; how many rows there were for each. What the vendor no
    longer names is kept, for old trades have it. Raises UsageError, TapedeckError."""
    settings.need_key("REST")
    try:
        async with Rest(settings) as rest:
            tickers = [
                msgspec.json.decode(result, type=Ticker)
                for result in await rest.results(TICKERS, market="crypto", active="true", limit=1000)
            ]
            exchanges = [
                msgspec.json.decode(result, type=Exchange)
                for result in await rest.results(EXCHANGES, asset_class="crypto")
            ]
        pairs = [(t.ticker, t.symbol, *t.symbol.split("-"), t.name) for t in tickers]
    except (RestError, msgspec.MsgspecError, ValueError) as error:
        raise TapedeckError(f"REST at {settings.polygon_rest_url} does not tell its names: {error}") from error
    await database.prepare(settings)
    connection = await database.connect(settings)
    try:
        async with connection.transaction():
            await connection.executemany(
                "INSERT INTO tickers VALUES ($1, $2, $3, $4, $5) ON CONFLICT (ticker) DO UPDATE "
                "SET symbol = excluded.symbol, base = excluded.base, quote = excluded.quote, name = excluded.name",
                pairs,
            )
            await connection.executemany(
                "INSERT INTO exchanges VALUES ($1, $2) ON CONFLICT (exchange) DO UPDATE SET name = excluded.name",
                [(exchange.id, exchange.name) for exchange in exchanges],
            )
    finally:
        await connection.close()
    return len(pairs), len(exchanges)
