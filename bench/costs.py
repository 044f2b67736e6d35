"""Where every microsecond of the worker goes, by operator.

What the worker does to its records is done here without Kafka, with a sampler on the CPU clock that looks, a thousand
times a second, which line is at work. What the real worker takes beside that is the delivery: Faust, sockets, locks,
acknowledgements.
"""

import gc
import linecache
import re
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from aiokafka.producer.message_accumulator import BatchBuilder
from rich.table import Table

import processors
from bench.line import span
from bench.speed import SINGLE, Input, input_of, ours
from bench.stand import Stand
from bench.tape import Tape
from processors import stages
from processors.service import Batches, no_batches
from processors.settings import PipelineSettings
from producers.slicer import SlicerSettings
from schemas import topics
from tapedeck import kafka
from tapedeck.garbage import collect_seldom

ROOT = str(Path(processors.__file__).parent.parent) + "/"
SAMPLE_S = 0.001
ROUND = 1_000  # outputs to a round of publishing; the worker's are as large when it is busy
COMPRESSION_LZ4 = 3

#: The first that fits the file, a colon and the line of the innermost frame of ours.
PIECES: tuple[tuple[str, str], ...] = (
    (
        "read the record: headers, runs",
        r"^schemas/raw\.py|stage\.read|recvs = |operators/resend\.py|\.judge\(",
    ),
    ("decode the slice", r"decode_slice|split_array|decode_message"),
    ("normalise: numbers", r"^schemas/numbers\.py"),
    ("normalise: the rest", r"operators/normalize\.py|normalize\.|^schemas/wire\.py"),
    ("repeats", r"operators/repeats\.py|repeats"),
    ("bars", r"operators/bars\.py|_bars\.|Bars\("),
    ("detectors", r"detect|anomal"),
    ("encode", r"^schemas/events\.py|encode"),
    ("batches: records", r"^tapedeck/kafka\.py|_fill\("),
    ("batches: lz4", r"_build\("),
    ("the pipeline's own loop", r"^processors/pipeline\.py"),
)
OTHER = "sorting outputs by place"
_patterns = [(name, re.compile(pattern)) for name, pattern in PIECES]


class Sampler:
    """Counts which piece is at work, on the CPU clock of this process."""

    def __init__(self) -> None:
        self.samples: Counter[str] = Counter()
        self._known: dict[tuple[str, int], str] = {}

    def __enter__(self) -> "Sampler":
        signal.signal(signal.SIGPROF, self._look)
        signal.setitimer(signal.ITIMER_PROF, SAMPLE_S, SAMPLE_S)
        return self

    def __exit__(self, *_: object) -> None:
        signal.setitimer(signal.ITIMER_PROF, 0)

    def _look(self, _: int, frame: FrameType | None) -> None:
        while frame is not None:
            place = (frame.f_code.co_filename, frame.f_lineno or 0)
            piece = self._known.get(place)
            if piece is None:
                piece = self._known[place] = _piece(*place)
            if piece:
                self.samples[piece] += 1
                return
            frame = frame.f_back
        self.samples[OTHER] += 1


def _piece(file: str, line: int) -> str:
    if not file.startswith(ROOT):
        return ""
    text = f"{file.removeprefix(ROOT)}: {linecache.getline(file, line)}"
    if not text.startswith(("schemas/", "processors/", "tapedeck/")) and "bench/costs" not in text:
        return ""
    return next((name for name, pattern in _patterns if pattern.search(text)), OTHER)


class Work(NamedTuple):
    """µs per event by piece, and their sum as the CPU clock has it."""

    pieces: dict[str, float]
    whole: float


Raw = tuple[int, int, list[tuple[str, bytes]], bytes, int]


def raw_of(tape: Input) -> list[Raw]:
    """As Kafka hands them over."""
    offsets: Counter[int] = Counter()
    found: list[Raw] = []
    for record in tape.records:
        found.append((record.partition, record.timestamp_ms, record.headers(), record.value, offsets[record.partition]))
        offsets[record.partition] += 1
    return found


def work(records: Sequence[Raw], events: int) -> Work:
    """Everything but the delivery."""
    stage = stages.RAW
    machines = [stage.make(number, PipelineSettings(), 0, False, None) for number in range(topics.PARTITIONS)]
    batches: Batches = no_batches()
    waiting = 0
    gc.collect()
    collect_seldom()
    with Sampler() as sampler:
        began = time.process_time()
        for partition, timestamp_ms, headers, value, offset in records:
            outputs = machines[partition].process(stage.read(partition, timestamp_ms, headers, value, offset))
            place = batches[partition]
            for output in outputs:
                place[output.topic].append(output)
            waiting += len(outputs)
            if waiting >= ROUND:
                build(batches)
                batches, waiting = no_batches(), 0
        build(batches)
        whole = time.process_time() - began
    total = sum(sampler.samples.values()) or 1
    return Work({name: whole / events * 1e6 * n / total for name, n in sampler.samples.items()}, whole / events * 1e6)


def build(batches: Batches) -> None:
    """As Publisher and aiokafka's sender do it."""
    for records in chain.from_iterable(place.values() for place in batches.values()):
        first = 0
        while first < len(records):
            builder = BatchBuilder(kafka.BATCH_BYTES, COMPRESSION_LZ4, is_transactional=False)
            first = kafka._fill(builder, records, first)
            builder.close()
            builder._build()


async def table(stand: Stand, folder: Path, events: int, minutes: int, runs: int) -> Table:
    tapes: list[tuple[str, Callable[[], Input]]] = [
        ("trades", lambda: input_of(Tape(events, minutes), SlicerSettings())),
        ("1 trade: 3 quotes", lambda: input_of(Tape(events, minutes, quotes=3), SlicerSettings())),
        ("busier", lambda: input_of(Tape(events, minutes=max(2, events // 300_000)), SlicerSettings())),
        ("slices of 1", lambda: input_of(Tape(events // 5, minutes), SINGLE)),
    ]
    table = Table(title=f"CPU µs an event, by operator (min - max of {runs} runs)")
    table.add_column("what")
    columns: list[dict[str, list[float]]] = []
    names = [name for name, _ in PIECES] + [OTHER]
    for number, (name, make) in enumerate(tapes):
        tape = make()
        share = len(tape.records) / tape.events
        table.add_column(f"{name}\n{tape.per_slice:.0f} a slice, {share:.2f} records/event", justify="right")
        records = raw_of(tape)
        done = [work(records, tape.events) for _ in range(runs)]
        real = [await ours(stand, folder, f"costs{number}-{run}.", tape) for run in range(runs)]
        column = {piece: [one.pieces.get(piece, 0.0) for one in done] for piece in names}
        column["all of the above"] = [one.whole for one in done]
        column["the worker"] = [1e6 / run.cpu_rate for run in real if run.cpu_rate]
        least = min(one.whole for one in done)
        column["delivery: Faust, sockets, acks (the difference)"] = [whole - least for whole in column["the worker"]]
        columns.append(column)
    for piece in [*names, "all of the above", "delivery: Faust, sockets, acks (the difference)", "the worker"]:
        table.add_row(piece, *(span(c[piece], 2) if c[piece] else "-" for c in columns))
    return table
