"""The frame splitter against anything that may come over a socket: nothing is lost, changed or put elsewhere."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from producers.split import Item, split_frame
from schemas import wire
from tests.pure.fuzz_split import check

SPACE = " \t\r\n"
spaces = st.text(SPACE, max_size=3).map(str.encode)

# -- elements, each as it may stand in an array --------------------------------------------------------

numbers = st.sampled_from(["0", "-0", "1e-05", "4.522E-05", "61000.10", "12345678901234567890123", "-1.5e300"])
texts = st.text(max_size=12).flatmap(
    lambda text: st.sampled_from([json.dumps(text), json.dumps(text, ensure_ascii=False)])
)
scalars = st.one_of(numbers, texts, st.sampled_from(["true", "false", "null"]))


def _array(parts: list[str], space: str) -> str:
    return "[" + f"{space},{space}".join(parts) + "]"


def _object(members: list[tuple[str, str]], space: str) -> str:
    return "{" + ",".join(f"{space}{name}{space}:{value}{space}" for name, value in members) + "}"


space = st.text(SPACE, max_size=2)
names = st.one_of(st.sampled_from(['"ev"', '"pair"', '"t"', '"s"', '"x"', '"status"']), texts)
valid = st.recursive(
    scalars,
    lambda deeper: st.one_of(
        st.builds(_array, st.lists(deeper, max_size=4), space),
        st.builds(_object, st.lists(st.tuples(names, deeper), max_size=5), space),
    ),
    max_leaves=12,
).map(lambda text: text.encode("utf-8", "surrogatepass"))
events = st.builds(
    lambda stream, pair, t: b'{"ev":"%b","pair":"%b","p":1.50,"t":%d,"s":1e-3}' % (stream, pair, t),
    st.sampled_from([b"XT", b"XQ", b"XA", b"status", b"new"]),
    st.sampled_from([b"BTC-USD", b"X:BTCUSD", b"], [{", b'\\"}', "é€".encode()]),
    st.integers(-(2**70), 2**70),
)
BAD = [
    *(
        b"NaN",
        b'{"ev":"XT","p":NaN}',
        b"-Infinity",
        b"'text'",
        b"01",
        b"1.",
        b"nul",
        b'"\\x"',
        b'"\n"',
        b"{5:5}",
        b"[1 2]",
    ),
    *(b'{"ev":"XT" "pair":1}', b'{"p":1.2.3}', b'{"ev":"XT",}', b"[" * 70 + b"]" * 70),
]
bad = st.sampled_from(BAD)


def framed(parts: list[tuple[bytes, bytes, bytes]], before: bytes, after: bytes) -> bytes:
    """An array of the parts, each (space, element, space)."""
    return before + b"[" + b",".join(b"".join(part) for part in parts) + b"]" + after


def spaced(elements: st.SearchStrategy[bytes]) -> st.SearchStrategy[list[tuple[bytes, bytes, bytes]]]:
    return st.lists(st.tuples(spaces, elements, spaces), max_size=8)


# -- what must hold ------------------------------------------------------------------------------------


@given(spaced(st.one_of(valid, events)), spaces, spaces)
def test_each_element_comes_out_once_in_order_with_its_own_bytes(
    parts: list[tuple[bytes, bytes, bytes]], before: bytes, after: bytes
) -> None:
    items = split_frame(framed(parts, before, after))
    assert [item.data for item in items] == [element for _, element, _ in parts]
    assert all(item.head is not None for item in items)


@given(spaced(st.one_of(events, bad)), spaces, spaces)
def test_the_neighbours_of_a_bad_element_are_saved_and_it_is_bad_alone(
    parts: list[tuple[bytes, bytes, bytes]], before: bytes, after: bytes
) -> None:
    items = split_frame(framed(parts, before, after))
    assert [item.data for item in items] == [element for _, element, _ in parts]
    assert [item.head is None for item in items] == [element in BAD for _, element, _ in parts]


@given(st.lists(st.one_of(events, valid), max_size=5))
def test_a_neighbour_changes_nothing_about_what_an_event_is(elements: list[bytes]) -> None:
    """Its head, by which it is routed, is the one that it has alone, whatever else is in the frame."""
    alone = [split_frame(b"[" + element + b"]")[0] for element in elements]
    assert split_frame(b"[" + b",".join(elements) + b"]") == alone
    assert split_frame(b"[" + b",".join([*elements, b"NaN"]) + b"]") == [*alone, Item(b"NaN", None)]


soup = st.lists(
    st.sampled_from(
        [*(bytes([c]) for c in b'[]{},:"\\ 0e-.nN\n'), b'{"ev":"XT"', b'"pair":"A-B"', b"\xff", b"\xe2\x82", b"\\u12"]
    )
).map(b"".join)


@given(st.one_of(st.binary(max_size=64), soup, soup.map(lambda inner: b"[" + inner + b"]")))
@example(b"")
@example(b"[]")
@example(b"[,]")
@example(b'["]')
@example(b"[" * 100_000)
@example(b"[" + b"[" * 100_000 + b"]" * 100_000 + b"]")
@example(b'{"a":' * 100_000)
def test_any_bytes_at_all_are_either_cut_into_their_elements_or_kept_whole(data: bytes) -> None:
    check(data)


@given(spaced(st.one_of(events, valid, bad)), st.data())
def test_a_frame_with_a_byte_changed_lost_or_cut_off_is_still_all_there(
    parts: list[tuple[bytes, bytes, bytes]], data: st.DataObject
) -> None:
    frame = framed(parts, b"", b"")
    at = data.draw(st.integers(0, len(frame) - 1))
    byte = data.draw(st.binary(max_size=1))
    check(frame[:at] + byte + frame[at + 1 :])
    check(frame[:at])


def test_events_keep_their_times_and_pairs() -> None:
    (item,) = split_frame(b'[{"ev":"XT","pair":"BTC-USD","t":1723161240000}]')
    assert item.head == wire.Head("XT", "BTC-USD", 1_723_161_240_000)


FUZZ_S = 5


@pytest.mark.skipif(find_spec("atheris") is None, reason="atheris is not installed: no wheel for this Python")
def test_fuzzing_finds_nothing_in_seconds(tmp_path: Path) -> None:
    """Longer by hand: python -m tests.pure.fuzz_split -max_total_time=600 FOLDER"""
    limits = [f"-max_total_time={FUZZ_S}", f"-artifact_prefix={tmp_path}/"]
    done = subprocess.run(
        [sys.executable, "-m", "tests.pure.fuzz_split", *limits, tmp_path],
        cwd=Path(__file__).parents[2],
        env=os.environ,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert " runs in " in done.stderr
