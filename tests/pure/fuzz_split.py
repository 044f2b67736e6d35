"""What must hold of the frame splitter for any bytes, and the fuzzer that looks for bytes for which it does not.

python -m tests.pure.fuzz_split [-max_total_time=SECONDS] FOLDER    (of inputs worth trying; it is added to)
"""

import json
import sys
from pathlib import Path

from producers import split

SPACE = b" \t\r\n"


def check(data: bytes) -> None:
    """Raises AssertionError, or whatever `split_frame` raises, which must be nothing.

    Either the frame is one bad item, whole, or it is an array: then its items and what stands between them
    (brackets, commas, space) are the frame again, each byte in its place.
    """
    items = split.split_frame(data)
    if len(items) == 1 and items[0].head is None and items[0].data == data:
        return
    frame = data.strip(SPACE)
    assert frame[:1] == b"[", "it is no array"
    assert frame[-1:] == b"]", "it is no whole array"
    at, limit = 1, len(frame) - 1
    for number, item in enumerate(items):
        at = _skip(frame, at)
        if number:
            assert frame[at : at + 1] == b",", "items are apart by commas alone"
            at = _skip(frame, at + 1)
        assert frame[at : at + len(item.data)] == item.data, "its bytes stand there"
        at += len(item.data)
        assert at <= limit, "an item does not reach over the end"
        if item.head is not None:
            assert _is_json(item.data), "what has a head is JSON"
    assert _skip(frame, at) == limit, "nothing is left over"


def _skip(frame: bytes, at: int) -> int:
    while frame[at : at + 1] in (b" ", b"\t", b"\r", b"\n"):
        at += 1
    return at


def _is_json(data: bytes) -> bool:
    """By another parser, which is given broken UTF-8 as some text: that is for the pipeline to judge."""
    try:
        json.loads(data.decode(errors="replace"), parse_constant=_refuse, parse_int=str, parse_float=str)
    except ValueError:
        return False
    return True


def _refuse(name: str) -> None:
    raise ValueError(name)


SEEDS = (
    b'[{"ev":"XT","pair":"BTC-USD","p":1.50,"t":1723161240000,"s":4.522e-05,"i":"7","x":1,"c":[2]}]',
    b'[{"ev":"status","status":"connected","message":"a, \\"b\\""} , {"ev":"XA","s":1,"e":2}, NaN, [[]], tru]',
)


def main() -> None:
    import atheris

    for number, data in enumerate(SEEDS):
        Path(sys.argv[-1], f"seed-{number}").write_bytes(data)
    for function in (split.split_frame, split._salvage, split._judge, split._head):
        atheris.instrument_func(function)
    atheris.Setup(sys.argv, check)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
