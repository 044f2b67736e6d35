"""The command line. Every part is imported only by the command that needs it, so that --help is instant."""

import asyncio
import math
import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

if TYPE_CHECKING:
    from tapedeck.history import Source
    from tapedeck.settings import Settings

SHOWN = 20  # differences on the screen
PROCESSES = os.cpu_count() or 1  # of a rebuild
Existing = click.Path(exists=True, dir_okay=False, path_type=Path)
Writable = click.Path(dir_okay=False, writable=True, path_type=Path)
Folder = click.Path(file_okay=False, path_type=Path)


class Speed(click.ParamType):
    """A factor above 0, or `max`."""

    name = "X|max"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if value == "max":
            return math.inf
        try:
            speed = float(value)
        except ValueError:
            self.fail(f"{value!r} is neither a number nor max", param, ctx)
        if not 0 < speed < math.inf:
            self.fail("it must be above 0", param, ctx)
        return speed


class Symbols(click.ParamType):
    """Pairs, comma separated."""

    name = "BTC-USD,…"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[str]:
        from schemas.wire import symbol_of

        try:
            symbols = [s if s == "*" else symbol_of(s) for s in (part.strip() for part in value.split(",")) if s]
        except ValueError as error:
            self.fail(str(error), param, ctx)
        if not symbols:
            self.fail("name at least one pair, like BTC-USD", param, ctx)
        return symbols


class Moment(click.ParamType):
    """A time in ISO 8601, UTC unless it says otherwise, or since the epoch in s, ms, µs or ns; becomes ns."""

    name = "TIME"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        from datetime import UTC, datetime, timedelta

        try:
            if value.isdecimal() and len(value) != 8:  # which is a date
                unit = next((unit for unit in (10**9, 10**6, 10**3) if int(value) * unit < 10**19), 1)
                moment_ns = int(value) * unit
            else:
                moment = datetime.fromisoformat(value)
                since = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)) - datetime(1970, 1, 1, tzinfo=UTC)
                moment_ns = since // timedelta(microseconds=1) * 1000
        except ValueError:
            self.fail(f"{value!r} is no time like 2026-11-26, 2026-11-26T14:30 or 2026-11-26T14:30:00Z", param, ctx)
        if not 0 <= moment_ns < 2**63:
            self.fail(f"{value!r} is not between 1970 and 2262", param, ctx)
        return moment_ns


class FaultSpec(click.ParamType):
    """A fault and when it comes."""

    name = "AT_S:KIND[,NAME=VALUE…]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        from simulator.faults import parse

        try:
            return parse(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


from_source = click.option(
    "--source",
    type=click.Choice(["kafka", "archive"]),
    default="kafka",
    show_default=True,
    help="Where history is read.",
)


def main() -> NoReturn:
    """The entry point: expected errors are one line on standard error, with exit code 1 or 2."""
    from tapedeck.errors import TapedeckError
    from tapedeck.garbage import collect_seldom

    collect_seldom()
    try:
        code = cli.main(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except click.exceptions.Abort:
        code = 130
    except TapedeckError as error:
        click.echo(f"tapedeck: {error}", err=True)
        code = error.exit_code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except OSError as error:
        click.echo(f"tapedeck: {error}", err=True)
        code = 1
    sys.exit(code or 0)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="tapedeck")
def cli() -> None:
    """Record the crypto tape and play it back exactly.

    \b
    See it run, with nothing set up:   tapedeck demo
    One process each, on your own Kafka and PostgreSQL:
      eval "$(tapedeck local start)"   (or set KAFKA_BOOTSTRAP_SERVERS and DATABASE_URL)
      tapedeck produce & tapedeck process & tapedeck sink all &

    Settings come from environment variables or the file tapedeck.env: see docs/settings.md.
    Exit codes: 0 success, 1 failure, 2 wrong use or configuration.
    """


def _settings(**overrides: Any) -> "Settings":
    from tapedeck.settings import load

    return load(**overrides)


# -- services -------------------------------------------------------------------------------------


@cli.command()
@click.option("--record", type=Writable, help="Also append every frame, as received, to this frames file.")
@click.option("--dry-run", is_flag=True, help="Only connect, subscribe and print ten events: a first check of a key.")
def produce(record: Path | None, dry_run: bool) -> int:
    """Take the vendor's feed onto the raw topic.

    Needs POLYGON_API_KEY and Kafka. SYMBOLS and STREAMS say what to record, POLYGON_WS_URL where from.
    One producer records, others stand by. What Kafka does not take yet waits in JOURNAL_DIR.
    SIGTERM or Ctrl+C: everything received is published, then it ends.
    """
    from producers import service
    from tapedeck.shell import run_service

    if dry_run:
        from producers.dry_run import dry_run as check

        asyncio.run(check(_settings()))
        return 0

    return run_service(_settings(), "produce", lambda shell: service.run(shell, record))


@cli.command()
def process() -> int:
    """Turn the raw topic into trades, quotes, bars, gaps and dead letters, with Faust.

    Start as many as there is work for: partitions spread over them, and any may be killed at any time.
    """
    from processors import service
    from tapedeck.shell import run_service

    return run_service(_settings(), "process", service.run)


@cli.command()
@click.argument(
    "name",
    type=click.Choice(["trades", "quotes", "bars", "audit", "archive", "all"]),
    metavar="trades|quotes|bars|audit|archive|all",
)
def sink(name: str) -> int:
    """Write topics into PostgreSQL, or the raw ones into the archive, each event exactly once.

    The tables are made, or migrated, at the start. `bars` writes our bars of all intervals
    and the vendor's, `audit` what says how far to trust the rest: anomalies, gaps, dead letters, quarantine.
    `archive` needs no database: it writes Parquet files below ARCHIVE_URL, and is part of `all` where that is set.
    """
    from sinks import service
    from tapedeck.shell import run_service

    return run_service(_settings(), f"sink {name}", lambda shell: service.run(shell, name))


@cli.command()
@click.option("--port", type=click.IntRange(0, 65535), required=True, help="Port to listen on; 0: a free one.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--rest-port", type=click.IntRange(0, 65535), default=0, help="Of REST and the control; default: a free one."
)
@click.option("--rest-hours", type=click.FloatRange(min=0), default=6, help="Market time that REST knows; 0: none.")
@click.option("--rest-per-minute", type=click.IntRange(min=0), help="Requests a key may make; default: any number.")
@click.option("--frames", type=Existing, help="Play this frames file instead of a synthetic market.")
@click.option("--speed", type=Speed(), default="1", show_default=True, help="Times real time, or max.")
@click.option("--seed", type=int, default=1, show_default=True, help="Of the synthetic market.")
@click.option("--symbols", type=Symbols(), help="Pairs of the synthetic market.")
@click.option("--pairs", type=click.IntRange(1, 10_000), help="Instead: so many pairs, from busy to nearly asleep.")
@click.option("--record", type=Writable, help="Append what is sent to this frames file, before sending it.")
@click.option("--start-ns", type=int, help="Market time to begin at, ns since the epoch; default: 24 h ago.")
@click.option("--seconds", type=click.FloatRange(min=0), help="Stop sending this long after the first subscription.")
@click.option("--keys", help="Accept only these API keys, comma separated; default: any.")
@click.option("--connections-per-key", type=click.IntRange(1), help="One more evicts the oldest; default: any number.")
@click.option("--backlog-bytes", type=click.IntRange(1), help="Cut a client off that leaves more than this unread.")
@click.option("--fault", "faults", type=FaultSpec(), multiple=True, help="Let this go wrong; may be repeated.")
def simulate(symbols: list[str] | None, pairs: int | None, keys: str | None, **options: Any) -> int:
    """A server that speaks the vendor's WebSocket protocol at ws://127.0.0.1:PORT/crypto.

    The market's time begins with the first subscription.

    A fault is the wall seconds after that, its kind, and what the kind takes (docs/simulator.md):

    \b
      --fault 20:drop
      --fault 20:stall,stream=XT,pair=BTC-USD,seconds=5
      --fault 20:clock,exchange=23,amount=3600,count=50

    More of them while it runs: POST {"kind": "stall", "seconds": 5} to /control/faults at the REST port.
    """
    from simulator.config import DEFAULT_SYMBOLS, SimulatorConfig
    from simulator.server import Bound, serve
    from simulator.symbols import plausible
    from tapedeck.errors import TapedeckError, UsageError
    from tapedeck.shell import Shell, log, run_service

    if symbols and pairs:
        raise click.UsageError("give either --symbols or --pairs")
    try:
        config = SimulatorConfig(
            symbols=plausible(pairs) if pairs else tuple(symbols or DEFAULT_SYMBOLS),
            wide=pairs is not None,
            keys=frozenset(filter(None, (keys or "").split(","))),
            **options,
        )
    except ValueError as error:
        raise UsageError(str(error)) from error

    def ready(bound: Bound) -> None:
        host = f"[{config.host}]" if ":" in config.host else config.host
        log.info("feed", url=f"ws://{host}:{bound.port}/crypto", rest=f"http://{host}:{bound.rest_port}")

    async def run(shell: Shell) -> None:
        try:
            await serve(config, shell.stopping, ready)
        except (OSError, ValueError) as error:
            raise TapedeckError(f"the simulated feed ends: {error}") from error

    return run_service(_settings(), "simulate", run)


# -- everything on this machine -------------------------------------------------------------------


@cli.command()
@click.argument("action", type=click.Choice(["start", "stop", "status"]), metavar="start|stop|status")
@click.option("--data-dir", type=Folder, default=Path(".tapedeck"), show_default=True, help="Where the data live.")
def local(action: str, data_dir: Path) -> int:
    """The embedded Kafka and PostgreSQL: no Docker, no Java, no root.

    `start` and `status` print on standard output how to reach them, as environment variables to paste;
    `status` exits with 1 when either is down.
    """
    from tapedeck import embedded

    if action == "stop":
        embedded.stop(data_dir)
        return 0
    states = embedded.start(data_dir) if action == "start" else embedded.status(data_dir)
    for state in states:
        if state.pid is None:
            click.echo(f"{state.name} is not running", err=True)
            continue
        click.echo(f"{state.name} runs as process {state.pid}, log {state.log}", err=True)
        for name, value in state.addresses.items():
            click.echo(f"export {name}={value}")
    return 0 if all(state.pid for state in states) else 1


@cli.command()
@click.option("--seconds", type=click.FloatRange(1), help="End by itself after this long; default: at Ctrl+C.")
@click.option("--symbols", type=Symbols(), help="Pairs to trade; with --frames: those in the file.")
@click.option("--frames", type=Existing, help="Play this frames file and end after it.")
@click.option("--speed", type=Speed(), default="10", show_default=True, help="Times real time, or max.")
@click.option("--seed", type=int, default=1, show_default=True, help="Of the synthetic market.")
@click.option("--data-dir", type=Folder, help="Keep the data here; default: a temporary folder.")
@click.option("--live", is_flag=True, help="The vendor's feed instead of the simulator; needs POLYGON_API_KEY.")
@click.option("--json", "as_json", is_flag=True, help="The last line of standard output is the result as JSON.")
def demo(**options: Any) -> int:
    """The whole line on this machine: feed, Kafka, Faust, PostgreSQL, and a live table.

    At the end every event that the feed sent is accounted for and every final bar recomputed; it exits
    with 0 only if nothing is left over.
    """
    from tapedeck.demo import DemoOptions, run

    return run(_settings(symbols=options["symbols"]), DemoOptions(**options))


@cli.command()
@click.option("--from", "since", type=Moment(), required=True, help="The first time played, as 2026-11-26T14:30.")
@click.option("--to", "until", type=Moment(), required=True, help="The time before which it ends.")
@click.option("--symbols", type=Symbols(), help="Only these pairs; default: all.")
@click.option("--speed", type=Speed(), default="max", show_default=True, help="Times real time, or max.")
@from_source
@click.option("--prefix", default="replay.", show_default=True, help="Of the topics to play it onto.")
def replay(since: int, until: int, symbols: list[str] | None, speed: float, source: "Source", prefix: str) -> int:
    """Play history onto topics again, with its order, times and identities.

    The topics are made as TOPIC_PREFIX names them, with the prefix given here in its place, and must be empty. Then

    \b
      TOPIC_PREFIX=replay. tapedeck process

    makes of them what was made of the originals. A time is that of the records, which is the feed's.
    """
    import uvloop

    from producers.replay import Wanted
    from producers.replay import replay as play
    from schemas.events import NS_PER_MS
    from tapedeck import logs

    if since >= until:
        raise click.UsageError("--from must lie before --to")
    settings = _settings()
    logs.configure(settings, "replay")
    wanted = frozenset() if "*" in (symbols or "*") else frozenset(symbols or [])
    want = Wanted(-(-since // NS_PER_MS), -(-until // NS_PER_MS), wanted, speed)
    count = uvloop.run(play(settings, source, prefix, want))
    click.echo(f"{count:,} records onto the topics under {prefix}", err=True)
    return 0


@cli.command()
@click.argument("kind", type=click.Choice(["bars", "trades", "quotes"]), metavar="bars|trades|quotes")
@click.option("--from", "since", type=Moment(), required=True, help="The first time compared, as 2026-11-26T14:30.")
@click.option("--to", "until", type=Moment(), required=True, help="The first one that is not; UTC.")
@from_source
@click.option("--verify/--apply", "verify", default=True, help="Only compare (default), or put the tables right.")
@click.option("--out", type=Writable, help="Write every difference to this file, one JSON object a line.")
def rebuild(**options: Any) -> int:
    """Compute a stretch of history anew from the raw log, and compare the tables with it.

    With --apply they are put right, in one transaction. Bars are those of all intervals that lie in the stretch, with
    their history, and the vendor's. Exit code 0: no difference, or none any more; 1: there are.
    """
    from tapedeck import logs

    settings = _settings()
    logs.configure(settings, "rebuild")
    return asyncio.run(_rebuild(settings, **options))


async def _rebuild(
    settings: "Settings", kind: str, since: int, until: int, source: "Source", verify: bool, out: Path | None
) -> int:
    from rich.console import Console
    from rich.progress import Progress

    from processors.recompute import Recomputation
    from processors.settings import chosen
    from schemas.topics import RAW_REST
    from sinks import differences, mend
    from sinks.tables import copied
    from tapedeck.errors import TapedeckError

    if since >= until:
        raise click.UsageError("--from must be before --to")
    pipeline = chosen(settings)
    async with mend.mending(settings, kind, since, until) as tables:
        made = Recomputation(settings, pipeline, source, tables.topics, since, until)
        with Progress(console=Console(stderr=True)) as progress:
            async for topic, rows in made.values(progress, copied, PROCESSES):
                await tables.stage(topic, rows)
        reach = made.reach()

        async def bounds() -> mend.Bounds:
            moved = await made.moved()
            moves, repairs_move = bool(moved), RAW_REST.name in moved
            fingerprint = pipeline.fingerprint()
            return mend.Bounds(
                reach.since, until, reach.begins, reach.settled, moves, repairs_move, fingerprint, reach.taken
            )

        if reach.since >= until:
            raise TapedeckError(f"the log ({source}) was deleted up to there: another --source may still have it")
        if reach.begins >= until:
            click.echo(
                "the log begins after that: it can only tell what REST said, and leaves the rest alone", err=True
            )
        if reach.since > since:
            click.echo("the log begins too late to tell of all of it: another --source may still have it", err=True)
        counts = await tables.compare(bounds, not verify, None if out else SHOWN)
        listed: list[mend.Difference] = []
        with out.open("wb") if out else nullcontext() as file:
            async for difference in tables.differences():
                if file:
                    file.write(differences.line(difference))
                if len(listed) < SHOWN:
                    listed.append(difference)
    if counts:
        Console().print(differences.screen(counts, listed))
    wrong = sum(count for (_, what), count in counts.items() if what in mend.WRONG)
    found = f"{wrong:,} differences" if wrong else "no difference"
    verdict = "put right" if wrong and not verify else "--apply puts them right" if wrong else "the log makes the same"
    click.echo(f"{kind} from {mend.timestamp(reach.since)} to {mend.timestamp(until)}: {found}, {verdict}")
    return 1 if wrong and verify else 0


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="As one JSON object, with all symbols.")
def status(as_json: bool) -> int:
    """The line on one screen: topics and who is behind, newest rows, gaps, what was kept aside, sizes on disk.

    Whatever cannot be asked is said, and the exit code is then 1.
    """
    import msgspec

    from tapedeck import logs
    from tapedeck.status import look

    settings = _settings()
    logs.configure(settings, "status")
    found = asyncio.run(look(settings))
    if as_json:
        click.echo(msgspec.json.encode(found))
    else:
        from rich.console import Console

        from tapedeck.status_view import screen

        Console().print(screen(found))
    return 1 if found.trouble else 0


# -- the log without the line ---------------------------------------------------------------------


@cli.command()
@click.option("--out", type=Folder, required=True, help="Folder for one NDJSON file per output topic.")
@click.option("--frames", type=Existing, help="Frames file: raw records are made of it first.")
@click.option("--log", "log_file", type=Existing, help="Raw records as `tapedeck log` dumped them.")
@click.option("--close", is_flag=True, help="Finalise what is still open at the end, flagged partial.")
def compute(out: Path, frames: Path | None, log_file: Path | None, close: bool) -> int:
    """The pure pipeline with no Kafka: exactly what the topics would carry.

    Writes trades.ndjson, quotes.ndjson, bars.1m.ndjson, bars.vendor.ndjson and the other outputs.
    """
    from processors.compute import compute as compute_files
    from processors.settings import chosen
    from producers.offline import records_of
    from producers.slicer import SlicerSettings
    from schemas.frames import NotAFramesFile, open_lines, read_frames
    from schemas.raw import NotARawRecord, read_log
    from tapedeck.errors import UsageError

    if (frames is None) == (log_file is None):
        raise click.UsageError("give either --frames or --log")
    settings = _settings()
    pipeline = chosen(settings)
    try:
        if frames is not None:
            slicer = SlicerSettings(linger_ns=settings.linger_ns, usual_ns=settings.usual_ns)
            made = records_of(read_frames(frames), slicer, list(settings.streams), ["*"])
            counts = compute_files(((record.n, record) for record in made), out, pipeline, close)
        else:
            assert log_file is not None
            with open_lines(log_file) as lines:
                read = ((line.offset, record) for line, record in read_log(lines))
                counts = compute_files(read, out, pipeline, close)
    except (NotAFramesFile, NotARawRecord, EOFError) as error:
        raise UsageError(str(error)) from error
    for name, count in counts.items():
        click.echo(f"{count:>10,}  {out / name}", err=True)
    return 0


@cli.command()
@click.option("--out", type=Writable, required=True, help="File to write, one JSON object a record.")
def log(out: Path) -> int:
    """Dump the raw topic from Kafka to a file: value, headers, partition, offset, timestamp."""
    from tapedeck import logs
    from tapedeck.dump import dump

    settings = _settings()
    logs.configure(settings, "log")
    count = asyncio.run(dump(settings, out))
    click.echo(f"{count:,} records in {out}", err=True)
    return 0


@cli.command()
def reference() -> int:
    """Fetch the names of pairs and exchanges from the vendor's REST into the database.

    Queries join them; nothing waits for them. Needs POLYGON_API_KEY; again whenever something new is listed.
    """
    from producers.reference import refresh
    from tapedeck import logs

    settings = _settings()
    logs.configure(settings, "reference")
    pairs, exchanges = asyncio.run(refresh(settings))
    click.echo(f"{pairs:,} pairs in tickers, {exchanges:,} exchanges in exchanges", err=True)
    return 0


@cli.command()
@click.argument("action", type=click.Choice(["compact"]), metavar="compact")
def archive(action: str) -> int:
    """Merge the small files of the archive, as its sink does by itself once an hour is past.

    At any time, beside a running sink too. Nothing is lost when it is interrupted.
    """
    from rich.console import Console
    from rich.progress import track

    from schemas.topics import ARCHIVED
    from sinks.merging import merge, mergeable
    from tapedeck.archive import Archive

    settings = _settings()
    files = Archive(settings)
    files.sweep(time.time())
    hours = mergeable(span for topic in ARCHIVED for span in files.spans(settings.topic_prefix + topic.name))
    for hour in track(sorted(hours), "merging", console=Console(stderr=True)):
        merge(files, hour)
    click.echo(f"{len(hours):,} hours of a partition were in several files and are in one", err=True)
    return 0
