"""Only the next number: what a producer sent twice, out of turn or after its time is not taken again."""

from typing import Literal

from schemas.events import MINUTE_NS
from schemas.raw import RawRecord

Verdict = Literal["take", "resend", "overtook", "zombie"]


class ResendFilter:
    """Accepts, within an epoch, only the record whose number is the next one.

    A lower one is a resend, a higher one overtook a failed send and will come again, a lower epoch is a
    zombie's. What was overtaken and had not come again when the next epoch began is lost: a hole. `lenient`
    takes an epoch up in its middle: for a rebuild's run-in, or a log whose beginning is gone.
    """

    memory_ns = 5 * MINUTE_NS

    def __init__(self) -> None:
        self.epoch = -1
        self.next = 0
        self.last_ms: int | None = None
        self.overtaken = (-1, 0)  # the highest (epoch, number) that was turned away as not the next one

    def judge(self, record: RawRecord, lenient: bool) -> tuple[Verdict, int | None]:
        """The verdict on a record; with the first of a new epoch, since when (ms) there is a hole, if so."""
        hole = None
        if record.epoch != self.epoch:
            if record.epoch < self.epoch:
                return "zombie", None
            if record.n and not lenient:
                self.overtaken = max(self.overtaken, (record.epoch, record.n))
                return "overtook", None
            if (self.epoch, self.next) <= self.overtaken < (record.epoch, 0):
                hole = self.last_ms
            self.epoch, self.next = record.epoch, record.n
        if record.n < self.next:
            return "resend", None
        if record.n > self.next:
            self.overtaken = max(self.overtaken, (record.epoch, record.n))
            return "overtook", None
        self.next += record.events
        self.last_ms = record.timestamp_ms
        return "take", hole

    def state(self) -> object:
        """What decides about later records; a hole that was filled again is none."""
        open_hole = self.overtaken if self.overtaken >= (self.epoch, self.next) else None
        return (self.epoch, self.next, self.last_ms, open_hole)
