"""From the vendor's messages to ours: what they carry survives exactly, and what cannot be is kept whole."""

import base64
import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from processors.operators.normalize import side_of
from processors.pipeline import Pipeline
from processors.settings import PipelineSettings
from schemas import topics
from schemas.events import NS_PER_MS
from schemas.raw import Foreign, GapValue, RawRecord
from schemas.wire import symbol_of

from .feed import T0, Feed, through, xt

CAPTURES = Path(__file__).parents[3] / "shared" / "data" / "polygon-captures"
captured = pytest.mark.skipif(not CAPTURES.is_dir(), reason=f"the captured messages are not in {CAPTURES}")
RECV = 1_732_200_000_045_000_000


def made_of(*events: bytes) -> list[tuple[str, dict[str, Any]]]:
    """(topic, value) of what the pipeline makes of one slice; numbers stay the text they are."""
    value = b"[" + b",".join(events) + b"]"
    start = msgspec.json.encode(GapValue(None, T0 * NS_PER_MS, ["XT"], ["*"], "start"))
    pipeline = Pipeline(1, PipelineSettings())
    pipeline.process(RawRecord(1, T0, "gap", 1, 0, [(RECV, 1)], start))
    outputs = pipeline.process(RawRecord(1, T0 + 10, "slice", 1, 1, [(RECV, len(events))], value))
    return [(o.topic, json.loads(o.value, parse_float=str, parse_int=str)) for o in outputs]


def made_of_frame(frame: bytes, recv_ms: int) -> list[tuple[str, dict[str, Any]]]:
    """The same from a frame, through the producer's slicer."""
    feed = Feed()
    feed.raw(recv_ms, frame)
    feed.flush(recv_ms + 1_000)
    return values_of(feed)


def values_of(feed: Feed) -> list[tuple[str, dict[str, Any]]]:
    """What was made of the events that a feed sent."""
    outputs = [o for o in through(feed.records) if o.topic not in (topics.GAPS.name, topics.BARS_1M.name)]
    return [(o.topic, json.loads(o.value, parse_float=str, parse_int=str)) for o in outputs]


def trade(**fields: str) -> bytes:
    """A trade as JSON text; fields are given as JSON text, `-` leaves one out."""
    texts = {"ev": '"XT"', "pair": '"BTC-USD"', "p": "100", "s": "1", "t": str(T0), "i": '"a"', "x": "1"} | fields
    return ("{" + ",".join(f'"{name}":{text}' for name, text in texts.items() if text != "-") + "}").encode()


def quote(**fields: str) -> bytes:
    texts = {"ev": '"XQ"', "pair": '"BTC-USD"', "bp": "99", "ap": "101", "t": str(T0)} | fields
    return ("{" + ",".join(f'"{name}":{text}' for name, text in texts.items() if text != "-") + "}").encode()


def aggregate(**fields: str) -> bytes:
    texts = {"ev": '"XA"', "pair": '"BTC-USD"', "o": "1", "h": "2", "l": "1", "c": "2", "v": "3"}
    texts |= {"s": str(T0 - 60_000), "e": str(T0)} | fields
    return ("{" + ",".join(f'"{name}":{text}' for name, text in texts.items() if text != "-") + "}").encode()


@captured
class TestCapturedMessages:
    def test_a_trade_with_a_uuid_and_a_size_in_scientific_notation(self) -> None:
        frame = (CAPTURES / "xt_btcusd_2024-01-30_frame.json").read_bytes().strip()
        ((topic, value),) = made_of_frame(frame, 1_706_649_628_068)
        assert topic == topics.TRADES.name
        assert value == {
            "symbol": "BTC-USD",
            "ts_event": "1706649628023000000",
            "ts_recv": "1706649628068000000",
            "ts_vendor": "1706649628068000000",
            "price": "43575.6",
            "size": "0.00004522",
            "side": "buy",
            "exchange": "23",
            "trade_id": "1b254a48-7258-4465-8215-2610ccf9ab21",
            "conditions": ["2"],
            "flags": [],
            "epoch": "1",
            "partition": "1",
            "n": "1",
        }

    def test_aggregates_with_a_revision_are_kept_message_by_message(self) -> None:
        lines = (CAPTURES / "xa_btcusd_2020-07-16_with_revision.jsonl").read_bytes().split()
        feed = Feed()
        for minute, line in enumerate(lines):
            feed.raw(1_594_917_782_000 + minute * 60_000, b"[" + line + b"]")
        feed.flush(1_594_918_100_000)
        made = values_of(feed)
        assert {topic for topic, _ in made} == {topics.VENDOR_BARS.name}
        bars = [value for _, value in made]
        assert len(bars) == len({bar["n"] for bar in bars}) == 5
        assert (bars[0]["start"], bars[0]["volume"], bars[0]["close"]) == (
            "1594917720000000000",
            "725.09209352",
            "9134.3",
        )
        assert (bars[4]["start"], bars[4]["volume"], bars[4]["close"]) == (
            "1594917720000000000",
            "725.19209352",
            "9134.2",
        )
        assert bars[0]["interval"] == "1m"


class TestWhatIsTolerated:
    @pytest.mark.parametrize(
        "fields",
        [
            {"lp": "0", "ls": "0", "new": '{"deep":[1,{"a":null}]}'},
            {"i": "123"},
            {"i": "18446744073709551616"},
            {"c": "null"},
            {"c": "[]"},
            {"r": "null"},
            {"p": '"100"'},
            {"p": "1.00e2"},
            {"p": "100.000"},
        ],
    )
    def test_a_trade_is_a_trade(self, fields: dict[str, str]) -> None:
        ((topic, value),) = made_of(trade(**fields))
        assert topic == topics.TRADES.name
        assert value["price"] == "100"

    @pytest.mark.parametrize(
        ("fields", "sizes"),
        [
            ({}, (None, None)),
            ({"bs": "0", "as": "0.0"}, ("0", "0")),
            ({"bs": "1e-8", "as": "5"}, ("0.00000001", "5")),
        ],
    )
    def test_a_quote_may_lack_sizes_or_have_them_empty(self, fields: dict[str, str], sizes: tuple[Any, Any]) -> None:
        ((topic, value),) = made_of(quote(**fields))
        assert topic == topics.QUOTES.name
        assert (value["bid_size"], value["ask_size"]) == sizes

    def test_an_aggregate_of_a_second_says_so(self) -> None:
        ((_, value),) = made_of(aggregate(ev='"XAS"', s=str(T0 - 1_000)))
        assert value["interval"] == "1s"

    @pytest.mark.parametrize(
        ("conditions", "side"),
        [
            (None, "unknown"),
            ([], "unknown"),
            ([0], "unknown"),
            ([1], "sell"),
            ([2], "buy"),
            ([1, 2], "unknown"),
            ([7, 2], "buy"),
            ([1, 9], "sell"),
        ],
    )
    def test_the_side_is_the_aggressors_by_the_vendors_conditions(
        self, conditions: list[int] | None, side: str
    ) -> None:
        assert side_of(conditions) == side

    @pytest.mark.parametrize("pair", ["BTC-USD", "X:BTC-USD", "X:BTCUSD", "BTCUSD", "btc-usd"])
    def test_a_pair_has_one_symbol(self, pair: str) -> None:
        assert symbol_of(pair) == "BTC-USD"

    @pytest.mark.parametrize(
        ("pair", "symbol"),
        [("USDTUSD", "USDT-USD"), ("1INCHUSD", "1INCH-USD"), ("BTCEUR", "BTC-EUR"), ("X:ETHBTC", "ETH-BTC")],
    )
    def test_without_a_hyphen_the_last_three_letters_are_the_quote_currency(self, pair: str, symbol: str) -> None:
        assert symbol_of(pair) == symbol


BAD: list[tuple[bytes, str]] = [
    (trade(p="-1"), "price is -1"),
    (trade(p="0"), "price is 0"),
    (trade(p="-0.0"), "price is 0"),
    (trade(p='"NaN"'), "price is not a number"),
    (trade(p='"sNaN"'), "price is not a number"),
    (trade(p='"Infinity"'), "price is not a number"),
    (trade(p='"-Infinity"'), "price is not a number"),
    (trade(p='"1_0"'), "price is not a number"),
    (trade(s='"١"'), "size is not a number"),
    (trade(p="1e21"), "price is 1e+21"),
    (trade(p="1e400"), "price is 1e+400"),
    (trade(p="1e999999999999999999999"), "price is not a number"),
    (trade(p="9" * 5_000), "price is"),
    (trade(p="1e-21"), "price is 1e-21"),
    (trade(p="1." + "3" * 60), "more than 40 digits"),
    (trade(p="true"), "price is not a number"),
    (trade(p="null"), "price is not a number"),
    (trade(p='"free"'), "price is not a number"),
    (trade(p="[1]"), "price is not a number"),
    (trade(p="-"), "missing required field `p`"),
    (trade(s="0"), "size is 0"),
    (trade(s="-4.522e-05"), "size is -0.00004522"),
    (trade(s="-"), "missing required field `s`"),
    (trade(t=str(T0 // 1_000)), "t is 1732200000, not a time in milliseconds"),
    (trade(t=str(T0 * 1_000)), "not a time in milliseconds"),
    (trade(t=str(T0 * NS_PER_MS)), "not a time in milliseconds"),
    (trade(t="0"), "not a time in milliseconds"),
    (trade(t="-1"), "not a time in milliseconds"),
    (trade(t="1" + "0" * 100), "not a time in milliseconds"),
    (trade(t="1732200000000.5"), "$.t"),
    (trade(t='"1732200000000"'), "$.t"),
    (trade(t="-"), "missing required field `t`"),
    (trade(r=str(T0 * NS_PER_MS)), "r is"),
    (trade(i='""'), "trade id is empty"),
    (trade(i='"' + "a" * 201 + '"'), "too long"),
    (trade(i='"a\\u0000b"'), "NUL"),
    (trade(i="9" * 5_000), "$.i"),
    (trade(i="9" * 300), "too long"),
    (trade(i="1.5"), "$.i"),
    (trade(i="null"), "$.i"),
    (trade(i="-"), "missing required field `i`"),
    (trade(x="-1"), ">= 0 - at `$.x`"),
    (trade(x=str(2**31)), "<= 2147483647 - at `$.x`"),
    (trade(x="1.5"), "$.x"),
    (trade(x="-"), "missing required field `x`"),
    (trade(c="[1.5]"), "$.c"),
    (trade(c="7"), "$.c"),
    (trade(c="[99999999999999999999]"), "<= 2147483647 - at `$.c[0]`"),
    (trade(pair='""'), "is not a currency pair"),
    (trade(pair='"BTC"'), "is not a currency pair"),
    (trade(pair='"BTC-USD-X"'), "is not a currency pair"),
    (trade(pair='"BTC-"'), "is not a currency pair"),
    (trade(pair='"B/C-USD"'), "is not a currency pair"),
    (trade(pair='"\\u00c4BC-USD"'), "is not a currency pair"),
    (trade(pair="5"), "$.pair"),
    (trade(pair="-"), "missing required field `pair`"),
    (trade(ev='"XL2"'), "Invalid value 'XL2'"),
    (trade(ev='"xt"'), "Invalid value 'xt'"),
    (trade(ev="5"), "$.ev"),
    (trade(ev="-"), "missing required field `ev`"),
    (quote(bp="-1"), "bid price is -1"),
    (quote(ap='"NaN"'), "ask price is not a number"),
    (quote(bs="-1"), "bid size is -1"),
    (quote(**{"as": '"Infinity"'}), "ask size is not a number"),
    (quote(t=str(T0 * 1_000)), "not a time in milliseconds"),
    (quote(ap="-"), "missing required field `ap`"),
    (quote(x="-5"), ">= 0 - at `$.x`"),
    (aggregate(e=str(T0 - 60_000)), "ends before it starts"),
    (aggregate(s=str(T0 // 1_000)), "s is"),
    (aggregate(o="0"), "open is 0"),
    (aggregate(v="-1"), "volume is -1"),
    (aggregate(vw='"NaN"'), "vwap is not a number"),
    (aggregate(h="-"), "missing required field `h`"),
    (b"5", "Expected `object`"),
    (b"null", "Expected `object`"),
    (b'"XT"', "Expected `object`"),
    (b"[]", "Expected `object`"),
    (b"{}", "missing required field `ev`"),
]


class TestDeadLetters:
    @pytest.mark.parametrize(("event", "reason"), BAD, ids=[repr(event)[:60] for event, _ in BAD])
    def test_what_cannot_be_is_kept_whole_with_the_reason_and_its_neighbours_survive(
        self, event: bytes, reason: str
    ) -> None:
        made = made_of(trade(i='"before"'), event, quote())
        assert [topic for topic, _ in made] == [topics.TRADES.name, topics.DEAD_LETTERS.name, topics.QUOTES.name]
        letter = made[1][1]
        assert reason in letter["reason"]
        assert (letter["encoding"], letter["payload"]) == ("utf-8", event.decode())
        assert (letter["epoch"], letter["partition"], letter["n"]) == ("1", "1", "2")
        assert letter["ts_recv"] == str(RECV)
        assert [value["n"] for _, value in made] == ["1", "2", "3"]

    @pytest.mark.parametrize(("event", "reason"), BAD, ids=[repr(event)[:60] for event, _ in BAD])
    def test_it_is_judged_the_same_when_it_comes_in_a_frame(self, event: bytes, reason: str) -> None:
        frame = b"[" + trade(i='"before"') + b"," + event + b"," + quote() + b"]"
        made = made_of_frame(frame, T0 + 45)
        assert sorted(topic for topic, _ in made) == [
            topics.DEAD_LETTERS.name,
            topics.QUOTES.name,
            topics.TRADES.name,
        ]
        (letter,) = [value for topic, value in made if topic == topics.DEAD_LETTERS.name]
        assert reason in letter["reason"]
        assert letter["payload"] == event.decode()

    def test_bytes_that_are_not_utf_8_are_kept_in_base64(self) -> None:
        event = b'{"ev":"XT","pair":"BTC-USD","p":1,"s":1,"t":1732200000000,"i":"\xff","x":1}'
        ((topic, letter),) = made_of(event)
        assert topic == topics.DEAD_LETTERS.name
        assert letter["encoding"] == "base64"
        assert base64.b64decode(letter["payload"]) == event

    @pytest.mark.parametrize("element", [b'{"ev":"XT","pair":"BTC-USD","p":NaN}', b'{"p":-Infinity}', b"?"])
    def test_what_is_not_json_is_a_dead_letter_and_its_frame_survives(self, element: bytes) -> None:
        made = made_of_frame(b"[" + xt(T0) + b"," + element + b"," + quote() + b"]", T0 + 45)
        by_topic = dict(made)
        assert by_topic.keys() == {topics.TRADES.name, topics.DEAD_LETTERS.name, topics.QUOTES.name}
        letter = by_topic[topics.DEAD_LETTERS.name]
        assert (letter["reason"], letter["payload"]) == ("not JSON", element.decode())

    def test_a_frame_cut_short_is_one_dead_letter(self) -> None:
        frame = b"[" + xt(T0) + b',{"ev":"XT","pai\xc3'
        feed = Feed()
        feed.frame(T0 + 45, xt(T0))
        feed.raw(T0 + 46, frame)
        feed.flush(T0 + 3_000)
        (letter,) = [json.loads(o.value) for o in through(feed.records) if o.topic == topics.DEAD_LETTERS.name]
        assert base64.b64decode(letter["payload"]) == frame

    def test_a_slice_whose_header_counts_wrong_is_kept_whole(self) -> None:
        pipeline = Pipeline(1, PipelineSettings())
        value = b"[" + trade() + b"]"
        outputs = pipeline.process(RawRecord(1, T0, "slice", 1, 0, [(RECV, 2)], value))
        (letter,) = [json.loads(output.value) for output in outputs]
        assert "holds 1 events, its header counts 2" in letter["reason"]
        assert letter["payload"] == value.decode()

    @pytest.mark.parametrize("kind", ["slice", "gap", "new"])
    def test_a_record_with_nonsense_in_it_is_kept_whole(self, kind: str) -> None:
        pipeline = Pipeline(1, PipelineSettings())
        outputs = pipeline.process(RawRecord(1, T0, kind, 1, 0, [(RECV, 1)], b"nonsense"))
        (letter,) = [json.loads(output.value) for output in outputs]
        assert letter["payload"] == "nonsense"

    @pytest.mark.parametrize("name", ["pair", "ev"])
    def test_what_is_refused_for_an_endless_name_makes_records_that_their_topics_take(self, name: str) -> None:
        """A reason that quoted all of it stopped the partition for ever."""
        event = trade(**{name: '"' + "\x80" * 6 * 1024**2 + '"'})
        tick = RawRecord(1, T0 + 1_000, "tick", 1, 1, [(RECV, 1)], b"{}")
        pipeline = Pipeline(1, PipelineSettings())
        outputs = pipeline.process(RawRecord(1, T0, "slice", 1, 0, [(RECV, 1)], b"[" + event + b"]"))
        outputs += pipeline.process(tick)
        limits = {topic.name: topic.max_message_bytes for topic in topics.ALL}
        assert [output.topic for output in outputs if len(output.value) > limits[output.topic] - 10_000] == []
        assert json.loads(outputs[0].value)["payload"] == event.decode()

    def test_a_foreign_record_larger_than_any_frame_is_cut(self) -> None:
        data = bytes(range(256)) * (90 * 1024)
        (letter,) = Pipeline(1, PipelineSettings()).process(Foreign(1, T0, 7, data, "foreign"))
        assert len(letter.value) < topics.MAX_RECORD_BYTES
        found = json.loads(letter.value)
        assert data.startswith(base64.b64decode(found["payload"]))
        assert found["reason"] == f"{len(data)} bytes, of which these are the first: foreign"


def text_forms(number: Decimal) -> st.SearchStrategy[str]:
    """Ways to write a number in JSON."""
    plain = format(number, "f")
    scientific = format(number, "e")
    trailing = plain + ("0" if "." in plain else ".00")
    return st.sampled_from([plain, scientific, scientific.upper(), trailing])


prices = st.decimals("1e-10", "1e9", allow_nan=False, allow_infinity=False, places=10).filter(lambda d: d > 0)
sizes = st.decimals("1e-18", "1e9", allow_nan=False, allow_infinity=False, places=18).filter(lambda d: d > 0)


def plain(number: Decimal) -> str:
    """Plain notation without trailing zeros."""
    text = format(number, "f")
    return text.rstrip("0").rstrip(".") if "." in text else text


class TestDecimals:
    @given(st.data(), prices, sizes)
    @example(None, Decimal("1e-10"), Decimal("1e-18"))
    @example(None, Decimal("1000000000"), Decimal("1000000000"))
    @example(None, Decimal("0.000001"), Decimal("0.0000001"))
    @example(None, Decimal("61837.63000000"), Decimal("4.522e-05"))
    def test_prices_and_sizes_survive_exactly_in_plain_notation(
        self, data: st.DataObject | None, price: Decimal, size: Decimal
    ) -> None:
        p, s = (str(number) if data is None else data.draw(text_forms(number)) for number in (price, size))
        made = made_of(trade(p=p, s=s), quote(bp=p, ap=p, bs=s, **{"as": s}), aggregate(o=p, h=p, l=p, c=p, v=s, vw=p))
        (_, trade_), (_, quote_), (_, bar) = made
        assert (trade_["price"], trade_["size"]) == (plain(price), plain(size))
        assert (quote_["bid_price"], quote_["ask_size"]) == (plain(price), plain(size))
        assert (bar["open"], bar["vwap"], bar["volume"]) == (plain(price), plain(price), plain(size))

    @given(prices, sizes)
    def test_so_do_they_in_bars(self, price: Decimal, size: Decimal) -> None:
        feed = Feed()
        event = xt(T0, p=str(price), s=str(size))
        feed.at(T0, event)
        feed.until(T0 + 3_000)
        feed.at(T0 + 65_000, xt(T0 + 65_000))
        feed.flush(T0 + 66_000)
        (bar,) = [
            json.loads(o.value, parse_float=str, parse_int=str)
            for o in through(feed.records)
            if o.topic == topics.BARS_1M.name and o.key is not None
        ]
        assert [bar[name] for name in ("open", "high", "low", "close")] == [plain(price)] * 4
        assert (bar["volume"], bar["sell_volume"], bar["buy_volume"]) == (plain(size), plain(size), "0")


mutations = st.lists(
    st.tuples(
        st.integers(0, 200), st.sampled_from([b"", b"0", b"9", b"-", b"e", b'"', b"null", b"\xff", b"1e9", b"{"])
    ),
    min_size=1,
    max_size=4,
)


class TestAnything:
    @given(st.sampled_from([trade(c="[1]", r=str(T0)), quote(bs="1", x="2"), aggregate(vw="1.5", z="0.1")]), mutations)
    def test_no_event_ends_the_pipeline_and_every_event_becomes_something(
        self, event: bytes, changes: list[tuple[int, bytes]]
    ) -> None:
        for at, piece in changes:
            at %= len(event) + 1
            event = event[:at] + piece + event[at + 1 :]
        feed = Feed()
        feed.frame(T0 + 45, xt(T0, i="before"), event, xt(T0, i="after"))
        feed.flush(T0 + 3_000)
        made = [(topic, value) for topic, value in values_of(feed) if topic != topics.FORMING.name]
        events = sum(r.events for r in feed.records if r.kind in ("slice", "bad"))
        assert len(made) == events
