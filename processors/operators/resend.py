"""Only the next number: what a producer sent twice, out of turn or after its time is not taken again."""

from typing import Literal, NamedTuple

from schemas.events import MINUTE_NS
from schemas.raw import RawRecord

Verdict = Literal["take", "resend", "overtook", "zombie"]


class Hole(NamedTuple):
    """A stretch that was overtaken and never came: since the time (ms) of the last record taken before it,
    None where there is none."""

    since_ms: int | None


class ResendFilter:
    """Accepts, within an epoch, only the record whose number is the next one.

    A lower one is a resend, a higher one overtook a failed send and will come again, a lower epoch is a
    zombie's. What was overtaken and had not come again when the next epoch began is lost: a hole.

    `run_in`: how many records it takes to find into a log whose beginning is not known. In the first half of
    them an epoch may be entered at any number, for it may be in its middle, with a zombie's records in front
    of it. It is entered again at a lower number, for then the higher one had overtaken it.
    """

    memory_ns = 5 * MINUTE_NS

    def __init__(self, run_in: int = 0) -> None:
        self.epoch = -1
        self.next = 0
        self.last_ms: int | None = None  # when the last record was taken
        self._half = run_in // 2
        self._run_in = run_in  # records left of it
        self._entered = 0  # the number at which the epoch was entered
        self._overtaken: dict[int, int] = {}  # by epoch, the highest number turned away as not the next one

    def judge(self, record: RawRecord) -> tuple[Verdict, Hole | None]:
        """The verdict on a record; with the first one taken of a new epoch, the hole before it, if any."""
        if record.n == self.next and record.epoch == self.epoch and not self._run_in:  # nearly always
            self.next += record.events
            self.last_ms = record.timestamp_ms
            return "take", None
        left, self._run_in = self._run_in, max(0, self._run_in - 1)
        hole = None
        if record.epoch < self.epoch:
            return "zombie", None
        if left and record.epoch == self.epoch and record.n < self._entered:
            self.next = self._entered = record.n
        if record.epoch > self.epoch and (record.n == 0 or left > self._half):
            if any(self._missing(epoch, n) for epoch, n in self._overtaken.items() if epoch < record.epoch):
                hole = Hole(self.last_ms)
            self.epoch, self.next = record.epoch, record.n
            self._entered = record.n
            self._overtaken = {epoch: n for epoch, n in self._overtaken.items() if epoch >= record.epoch}
        if (record.epoch, record.n) < (self.epoch, self.next):
            return "resend", None
        if (record.epoch, record.n) > (self.epoch, self.next):
            self._overtaken[record.epoch] = max(record.n, self._overtaken.get(record.epoch, 0))
            return "overtook", None
        self.next += record.events
        self.last_ms = record.timestamp_ms
        return "take", hole

    def _missing(self, epoch: int, n: int) -> bool:
        return (epoch, n) >= (self.epoch, self.next)

    def state(self) -> object:
        """What decides about later records; a hole that was filled again is none."""
        open_holes = {epoch: n for epoch, n in self._overtaken.items() if self._missing(epoch, n)}
        return (self.epoch, self.next, self.last_ms, open_holes, self._run_in)
