"""The live table of the demo, and the accounting at its end."""

from rich.console import Group, RenderableType
from rich.table import Table

from tapedeck.demo.reconcile import Report
from tapedeck.demo.watch import Watch


def live(watch: Watch, stages: list[tuple[str, float, float, float, int]], title: str) -> RenderableType:
    """Per symbol what it trades at, per stage (name, events in, lag, errors, restarts) how it does."""
    market = Table(title=title, title_justify="left", expand=False)
    for name in ("symbol", "last", "bid", "ask", "trades/s", "last final 1m bar: o h l c", "volume", "flags"):
        market.add_column(name, justify="left" if name in ("symbol", "flags") else "right")
    for symbol in sorted(watch.price.keys() | watch.quote.keys()):
        price, quote, bar = watch.price.get(symbol), watch.quote.get(symbol), watch.bar.get(symbol)
        market.add_row(
            symbol,
            "" if price is None else f"{price:,.10g}",
            "" if quote is None else f"{quote[0]:,.10g}",
            "" if quote is None else f"{quote[1]:,.10g}",
            f"{watch.rate.get(symbol, 0):.1f}",
            "" if bar is None else f"{bar.open} {bar.high} {bar.low} {bar.close}",
            "" if bar is None else str(bar.volume),
            "" if bar is None else " ".join(bar.flags),
        )
    line = Table(expand=False)
    for name in ("stage", "events in", "lag", "errors", "restarts"):
        line.add_column(name, justify="left" if name == "stage" else "right")
    for name, events_in, lag, errors, restarts in stages:
        line.add_row(name, f"{events_in:,.0f}", f"{lag:,.0f}", f"{errors:,.0f}", str(restarts))
    return Group(market, line)


def accounting(report: Report) -> RenderableType:
    """The accounting equation, term by term, and the bars."""
    terms = Table(title="accounting: every event that the feed sent", title_justify="left")
    for name in ("stream", "sent", "= stored", "+ duplicates", "+ quarantined", "+ dead letters", "+ in gaps"):
        terms.add_column(name, justify="left" if name == "stream" else "right")
    terms.add_column("left over", justify="right")
    terms.add_column("extra rows", justify="right")
    for stream in (*report.sent, None):
        parts = (
            report.sent,
            report.stored,
            report.duplicates,
            report.quarantined,
            report.deadletters,
            report.in_gaps,
            report.left_over,
            report.extra,
        )
        values = [part.total() if stream is None else part[stream] for part in parts]
        terms.add_row("all" if stream is None else stream, *(f"{value:,}" for value in values))
    bars = Table(title="1m bars, recomputed from the feed's own record", title_justify="left")
    for name in ("checked", "wrong", "missing", "extra", "symbols without one"):
        bars.add_column(name, justify="right")
    bars.add_row(
        f"{report.bars_checked:,}",
        f"{report.bars_wrong:,}",
        f"{report.bars_missing:,}",
        f"{report.bars_extra:,}",
        ", ".join(report.unchecked_symbols) or "none",
    )
    return Group(terms, bars)
