"""`tapedeck produce --dry-run`: a first check of a key, without Kafka."""

import asyncio

import click
from websockets.exceptions import WebSocketException

from producers.protocol import Evicted, Protocol, SessionError, params_of
from producers.session import FINAL, explained
from producers.socket import ANSWER_TIMEOUT_S, open_socket
from tapedeck.errors import TapedeckError
from tapedeck.settings import Settings

EVENTS = 10
PATIENCE_S = 90.0  # longer than an aggregate takes to come


async def dry_run(settings: Settings) -> None:
    """Connects, authenticates, subscribes and prints ten events. Raises UsageError, TapedeckError."""
    params = params_of(settings)
    protocol = Protocol(settings.need_key("the feed"), params)
    url, shown = settings.polygon_ws_url, 0
    try:
        async with open_socket(settings) as socket:
            click.echo(f"connected to {url}", err=True)
            async with asyncio.timeout(ANSWER_TIMEOUT_S) as patience:
                while shown < EVENTS:
                    live, asked = protocol.live, protocol.asked
                    items = protocol.receive(await socket.recv(decode=False))
                    for message in protocol.to_send():
                        await socket.send(message, text=True)
                    if protocol.asked and not asked:
                        click.echo("authenticated", err=True)
                    if protocol.live and not live:
                        refused = f", refused: {', '.join(protocol.refused)}" if protocol.refused else ""
                        granted = len(params) - len(protocol.refused)
                        click.echo(f"subscribed to {granted} of {len(params)} channels{refused}", err=True)
                        patience.reschedule(asyncio.get_running_loop().time() + PATIENCE_S)
                    for item in items[: EVENTS - shown]:
                        click.echo(item.data.decode(errors="replace"))
                        shown += 1
    except FINAL as error:
        raise explained(error, params) from error
    except Evicted as error:
        raise TapedeckError(f"another client uses this key, and the vendor allows one: {error}") from error
    except TimeoutError as error:
        what = f"only {shown} events came in time" if protocol.live else "the vendor did not answer in time"
        raise TapedeckError(f"{url}: {what}") from error
    except (SessionError, WebSocketException, OSError) as error:
        raise TapedeckError(f"{url}: {error or type(error).__name__}") from error
