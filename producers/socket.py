"""The vendor's WebSocket: one connection, checked and closed as it should be."""

from contextlib import AbstractAsyncContextManager

from websockets.asyncio.client import ClientConnection, connect

from schemas import topics
from tapedeck.settings import Settings

ANSWER_TIMEOUT_S = 10.0  # for connecting, authentication and subscriptions
QUEUE_FRAMES = 1024  # received and not yet read; beyond it, TCP makes the vendor wait


def open_socket(settings: Settings) -> AbstractAsyncContextManager[ClientConnection]:
    """TLS is verified. Raises InvalidURI, WebSocketException, OSError, TimeoutError."""
    return connect(
        settings.polygon_ws_url,
        max_size=topics.MAX_FRAME_BYTES,
        open_timeout=ANSWER_TIMEOUT_S,
        close_timeout=1,
        ping_interval=None,
        compression=None,
        max_queue=QUEUE_FRAMES,
    )
