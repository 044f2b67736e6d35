"""The journal on a real disk: in order, whole records only, nothing twice, nothing lost but what is torn."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from producers import journal as module
from producers.journal import Journal, JournalFull
from schemas.raw import RawRecord

GIB = 1024**3


def records(first: int, count: int, size: int = 10) -> list[RawRecord]:
    return [RawRecord(n % 8, 1_000 + n, "slice", 3, n, [(n, 1)], b"%d" % n * size) for n in range(first, first + count)]


@pytest.fixture(autouse=True)
def small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SEGMENT_BYTES", 2_000)
    monkeypatch.setattr(module, "ROUND_BYTES", 700)


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    journal = Journal(tmp_path, GIB)
    yield journal
    journal.close()


def everything(journal: Journal) -> list[RawRecord]:
    found: list[RawRecord] = []
    while some := journal.read():
        found += some
    return found


def segments(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.segment"))


async def test_what_is_appended_comes_out_in_order_and_its_files_go_when_it_is_acknowledged(
    journal: Journal, tmp_path: Path
) -> None:
    wanted = []
    for start in range(0, 1_000, 10):
        wanted += records(start, 10)
        journal.append(wanted[-10:])
    assert len(journal) == 1_000
    assert len(segments(tmp_path)) > 10
    assert everything(journal) == wanted
    journal.rewind()
    assert everything(journal) == wanted
    journal.acknowledge()
    assert len(journal) == 0
    assert len(segments(tmp_path)) == 1
    await journal.empty()


def test_a_record_longer_than_a_round_comes_whole(journal: Journal) -> None:
    big = records(0, 1, size=5_000)
    journal.append(big)
    journal.append(records(1, 1))
    assert everything(journal) == big + records(1, 1)


def test_a_torn_or_damaged_end_is_cut_off_and_the_rest_is_kept(tmp_path: Path) -> None:
    journal = Journal(tmp_path, GIB)
    journal.append(records(0, 5))
    (path,) = segments(tmp_path)
    whole = path.read_bytes()
    journal.append(records(5, 1))
    longer = path.read_bytes()
    journal.close()
    damaged = bytearray(longer)
    damaged[-1] ^= 1
    for rest in (*(longer[:n] for n in range(len(whole), len(longer))), bytes(damaged), whole + bytes(99)):
        path.write_bytes(rest)
        again = Journal(tmp_path, GIB)
        assert everything(again) == records(0, 5)
        assert again.epoch == 3
        again.append(records(5, 1))
        assert everything(again) == records(5, 1)
        again.close()


def test_at_its_limit_it_refuses_whole_and_goes_on_when_there_is_room(tmp_path: Path) -> None:
    journal = Journal(tmp_path, 10_000)
    taken = 0
    while journal.size < 9_000:
        journal.append(records(taken, 10))
        taken += 10
    with pytest.raises(JournalFull, match="JOURNAL_MAX_BYTES"):
        journal.append(records(taken, 30))
    assert 8_000 < journal.size <= 10_000
    assert everything(journal) == records(0, taken)
    journal.acknowledge()
    journal.append(records(taken, 10))
    assert everything(journal) == records(taken, 10)
    journal.close()


def test_a_full_disk_is_said_and_survived(tmp_path: Path) -> None:
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / f"{1:012d}.segment").symlink_to("/dev/full")
    journal = Journal(tmp_path, GIB)
    with pytest.raises(JournalFull, match="No space left"):
        journal.append(records(0, 1))
    assert (len(journal), journal.read()) == (0, [])


def test_two_at_once_have_folders_of_their_own_and_a_successor_finds_what_was_left(tmp_path: Path) -> None:
    first, second = Journal(tmp_path, GIB), Journal(tmp_path, GIB)
    assert first.name != second.name
    name = first.name
    first.append(records(0, 3))
    first.close()
    third = Journal(tmp_path, GIB)
    assert (third.name, len(third), everything(third)) == (name, 3, records(0, 3))
    second.close()
    third.close()


def test_what_another_producer_has_superseded_is_kept_and_never_sent(tmp_path: Path) -> None:
    journal = Journal(tmp_path, GIB)
    journal.append(records(0, 100))
    kept = journal.set_aside()
    assert (len(journal), journal.read()) == (0, [])
    assert sum(path.stat().st_size for path in kept.iterdir()) > 1_000
    journal.append(records(7, 1))
    journal.close()
    again = Journal(tmp_path, GIB)
    assert everything(again) == records(7, 1)
    again.close()


class Sequences(RuleBasedStateMachine):
    """Any sequence of what may happen to it, against a list."""

    def __init__(self) -> None:
        super().__init__()
        import tempfile

        self.folder = tempfile.TemporaryDirectory()
        self.journal = Journal(Path(self.folder.name), GIB)
        self.left: list[RawRecord] = []
        self.read = 0
        self.made = 0

    @rule(count=st.integers(0, 40))
    def append(self, count: int) -> None:
        new = records(self.made, count)
        self.made += count
        self.journal.append(new)
        self.left += new

    @rule()
    def take(self) -> None:
        some = self.journal.read()
        assert some == self.left[self.read : self.read + len(some)]
        assert bool(some) == (self.read < len(self.left))
        self.read += len(some)

    @rule()
    def acknowledge(self) -> None:
        self.journal.acknowledge()
        del self.left[: self.read]
        self.read = 0
        assert len(self.journal) == len(self.left)

    @rule()
    def rewind(self) -> None:
        self.journal.rewind()
        self.read = 0

    @precondition(lambda self: self.left)
    @rule()
    def die(self) -> None:
        """A successor finds all that was not acknowledged, and maybe some that was."""
        self.journal.close()
        self.journal = Journal(Path(self.folder.name), GIB)
        found = everything(self.journal)
        self.journal.rewind()
        assert found[-len(self.left) :] == self.left
        assert [r.n for r in found] == list(range(found[0].n, self.made))
        self.left, self.read = found, 0

    def teardown(self) -> None:
        self.journal.close()
        self.folder.cleanup()


Sequences.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestSequences = Sequences.TestCase


def test_no_file_descriptor_is_left(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    journal = Journal(tmp_path, GIB)
    journal.append(records(0, 500))
    journal.read()
    journal.acknowledge()
    journal.close()
    assert len(os.listdir("/proc/self/fd")) == before
