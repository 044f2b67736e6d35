"""As many pairs as one wants, the well-known first."""

from itertools import product

_CURRENCIES = (
    "BTC ETH SOL XRP DOGE ADA AVAX LINK LTC DOT SHIB MATIC UNI BCH ATOM XLM ETC FIL NEAR APT ARB OP AAVE ALGO ICP "
    "HBAR VET GRT SAND MANA AXS CRV SNX MKR COMP SUSHI YFI BAT ZRX 1INCH ENJ CHZ LRC STORJ ANKR KNC REN OMG BAL UMA "
    "EOS XTZ DASH ZEC WAVES KSM FLOW EGLD THETA RUNE INJ IMX LDO APE GALA BLUR PEPE SUI SEI TIA JTO WIF BONK FET RNDR "
    "OCEAN USDT USDC DAI TUSD PAXG"
)
_QUOTES = ("USD", "EUR", "GBP", "USDT", "USDC")
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def plausible(number: int) -> tuple[str, ...]:
    """That many pairs (18,000 at most), each once: real names first, then invented ones (QAAA-USD)."""
    real = [f"{base}-{quote}" for quote in _QUOTES for base in _CURRENCIES.split() if base != quote]
    invented = [f"Q{''.join(letters)}-USD" for letters in product(_LETTERS, repeat=3)]
    return tuple([*real, *invented][:number])
