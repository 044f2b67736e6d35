"""A feed that is never the limit: Polygon's protocol, every frame encoded beforehand, written in large chunks."""

import argparse
import asyncio
import base64
import contextlib
import hashlib
import random
import time

import orjson

BASES = [
    "BTC",
    "ETH",
    "SOL",
    "ADA",
    "XRP",
    "DOGE",
    "DOT",
    "LTC",
    "LINK",
    "BCH",
    "AVAX",
    "UNI",
    "ATOM",
    "XLM",
    "ALGO",
    "FIL",
    "ETC",
    "EOS",
    "AAVE",
    "MKR",
]
CHUNK_BYTES = 64 * 1024


def encode(text: bytes) -> bytes:
    """A server's WebSocket text frame."""
    size = len(text)
    if size < 126:
        return bytes([0x81, size]) + text
    if size < 65_536:
        return b"\x81\x7e" + size.to_bytes(2, "big") + text
    return b"\x81\x7f" + size.to_bytes(8, "big") + text


def trades(events: int, per_frame: int, pairs: int, rate: int) -> list[list[bytes]]:
    """Frames of trades whose times run at `rate` events per second, from now on: for records older than a day a
    broker that was killed no longer knows what it has of a producer (docs/decisions.md)."""
    rng = random.Random(7)
    begin_ms = int(time.time() * 1000)
    names = [f"{BASES[n % len(BASES)]}{n // len(BASES) or ''}-USD" for n in range(pairs)]
    frames: list[list[bytes]] = [[]]
    for number in range(events):
        if len(frames[-1]) == per_frame:
            frames.append([])
        ms = begin_ms + number * 1000 // rate
        frames[-1].append(
            b'{"ev":"XT","pair":"%s","p":%.2f,"t":%d,"s":%.8f,"c":[%d],"i":"%d","x":%d,"r":%d}'
            % (
                rng.choice(names).encode(),
                30_000 * (1 + rng.random()),
                ms,
                rng.random(),
                rng.choice((1, 2)),
                14_272_084 + number,
                rng.choice((1, 2, 6, 23)),
                ms + 20,
            )
        )
    return frames


def chunks(frames: list[list[bytes]]) -> list[bytes]:
    """Encoded frames, several to a chunk."""
    found, size = [b""], 0
    for frame in frames:
        data = encode(b"[" + b",".join(frame) + b"]")
        if size + len(data) > CHUNK_BYTES:
            found.append(b"")
            size = 0
        found[-1] += data
        size += len(data)
    return found


async def _read(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    """One client frame: (opcode, payload), unmasked."""
    op, size = await reader.readexactly(2)
    size &= 127
    if size > 125:
        size = int.from_bytes(await reader.readexactly(2 if size == 126 else 8), "big")
    mask = await reader.readexactly(4)
    return op & 15, bytes(byte ^ mask[at & 3] for at, byte in enumerate(await reader.readexactly(size)))


def _status(status: str, message: str) -> bytes:
    return encode(orjson.dumps([{"ev": "status", "status": status, "message": message}]))


class Server:
    """Sends everything once to whoever subscribes: at once, or `rate` events a second."""

    def __init__(self, events: int, per_frame: int, pairs: int, rate: int | None) -> None:
        self._rate = rate
        frames = trades(events, per_frame, pairs, rate or 100_000)
        self._per_frame = per_frame
        self._chunks = chunks(frames) if rate is None else [encode(b"[" + b",".join(f) + b"]") for f in frames]

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        lines = (line.partition(":") for line in head.split("\r\n"))
        key = next(value.strip() for name, _, value in lines if name.lower() == "sec-websocket-key")
        digest = hashlib.sha1((key + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11").encode()).digest()
        writer.write(
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Accept: " + base64.b64encode(digest) + b"\r\n\r\n"
        )
        writer.write(_status("connected", "Connected Successfully"))
        feed = None
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                op, body = await _read(reader)
                if op == 9:
                    writer.write(b"\x8a" + bytes([len(body)]) + body)
                elif op == 8:
                    break
                elif op == 1:
                    command = orjson.loads(body)
                    if command["action"] == "auth":
                        writer.write(_status("auth_success", "authenticated"))
                    elif command["action"] == "subscribe":
                        for param in command["params"].split(","):
                            writer.write(_status("success", f"subscribed to: {param}"))
                        feed = feed or asyncio.create_task(self._pump(writer))
        if feed:
            feed.cancel()
        writer.close()

    async def _pump(self, writer: asyncio.StreamWriter) -> None:
        loop = asyncio.get_running_loop()
        began, sent = loop.time(), 0
        for chunk in self._chunks:
            if self._rate is not None:
                due = began + sent / self._rate
                if due > loop.time():
                    await asyncio.sleep(due - loop.time())
                sent += self._per_frame
            writer.write(chunk)
            await writer.drain()


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("port", type=int)
    parser.add_argument("--events", type=int, default=300_000)
    parser.add_argument("--per-frame", type=int, default=20)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--rate", type=int, help="events a second; default: as fast as they are taken")
    options = parser.parse_args()
    server = Server(options.events, options.per_frame, options.pairs, options.rate)
    async with await asyncio.start_server(server.serve, "127.0.0.1", options.port, limit=1 << 20) as listening:
        print("ready", flush=True)
        await listening.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
