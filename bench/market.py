"""Frames files at a given rate, from one seed: what the benchmarks play."""

import random
from pathlib import Path

PAIRS = [f"{base}-USD" for base in ("BTC", "ETH", "SOL", "XRP", "ADA", "DOGE", "DOT", "LTC", "LINK", "UNI")]
BEGIN_MS = 1_723_161_240_000 + 48_000  # a run of seconds sees a minute end


def write_frames(path: Path, rate: int, seconds: float, per_frame: int = 1, begin_ms: int = BEGIN_MS) -> int:
    """Trades and quotes 1:3 and minute aggregates, `rate` events/s for `seconds`, pairs weighted 1/rank.

    Returns the number of events.
    """
    rng = random.Random(rate)
    weights = [1 / (rank + 1) for rank in range(len(PAIRS))]
    total = int(rate * seconds)
    events, minutes, minute_ms = [], 0, begin_ms - begin_ms % 60_000
    with path.open("w") as file:
        for number in range(total):
            ms = begin_ms + number * 1000 // rate
            rank = rng.choices(range(len(PAIRS)), weights)[0]
            pair, price = PAIRS[rank], round(60000 / (rank + 1) ** 2 + rng.uniform(-9, 9), 2)
            if number % 4 == 0:
                side = rng.choice((1, 2))
                size = rng.randrange(1, 10**6)
                text = (
                    f'{{"ev":"XT","pair":"{pair}","p":{price},"t":{ms},"s":0.{size:06d},'
                    f'"c":[{side}],"i":"{number}","x":{rng.choice((1, 2, 6, 23))},"r":{ms + 20}}}'
                )
            else:
                text = (
                    f'{{"ev":"XQ","pair":"{pair}","bp":{price},"bs":1.5,"ap":{round(price + 0.5, 2)},'
                    f'"as":2.25,"t":{ms},"x":1,"r":{ms + 20}}}'
                )
            events.append(text)
            if (ms - minute_ms) // 60_000 > minutes or number == total // 2:
                start = minute_ms + minutes * 60_000
                minutes = max(minutes, (ms - minute_ms) // 60_000)
                events.append(
                    f'{{"ev":"XA","pair":"{pair}","o":1,"h":2,"l":1,"c":2,"v":3,"vw":1.5,"z":1,'
                    f'"s":{start},"e":{start + 60_000}}}'
                )
                total += 1
            if len(events) >= per_frame or number >= int(rate * seconds) - 1:
                file.write(f'{{"recv_ns":{(ms + 20) * 1_000_000},"frame":[{",".join(events)}]}}\n')
                events = []
    return total
