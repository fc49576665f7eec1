"""What a run says while it goes on: a bar on a terminal, plain lines elsewhere, tables at the end."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from tqdm import tqdm


class Progress:
    """Steps, losses, pairs/s and time left of a run.

    total: steps of the whole run; start: steps already done (a continued run). shown: False on ranks that keep quiet.
    """

    def __init__(self, total: int, start: int = 0, *, stream: TextIO | None = None, shown: bool = True):
        self.stream = stream or sys.stdout
        self.total, self.start, self.shown = total, start, shown
        self.began = time.perf_counter()
        # tqdm's own rate counts evaluations and saving too, so the rate shown is the loop's.
        layout = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
        self.bar = (
            tqdm(total=total, initial=start, file=self.stream, bar_format=layout, dynamic_ncols=True)
            if shown and self.stream.isatty()
            else None
        )

    def step(self, step: int) -> None:
        """`step` steps are done."""
        if self.bar is not None:
            self.bar.update(step - self.bar.n)

    def report(
        self, step: int, epoch: float, losses: Mapping[str, float], pairs_per_second: float, data_wait: float
    ) -> None:
        """Losses, speed and the share of time that was spent waiting for data, since the last report: beside the bar,
        or as a line of its own."""
        if not self.shown:
            return
        values = "  ".join(f"{name} {value:.4f}" for name, value in losses.items())
        speed = f"{pairs_per_second:,.0f} pairs/s  data wait {100 * data_wait:.0f} %"
        if self.bar is not None:
            self.bar.set_postfix_str(f"{values}  {speed}", refresh=False)
            self.step(step)
            self.bar.refresh()
            return
        left = (time.perf_counter() - self.began) / max(1, step - self.start) * (self.total - step)
        self.say(f"step {step}/{self.total}  epoch {epoch:.2f}  {values}  {speed}  {duration(left)} left")

    def say(self, line: str) -> None:
        """A line of text that leaves the bar whole."""
        if not self.shown:
            return
        if self.bar is not None:
            self.bar.write(line, file=self.stream)
        else:
            print(line, file=self.stream, flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


class Countdown:
    """How far a piece of work is, with the time left: a bar on a terminal, elsewhere a line every `every` seconds.

    start: what of `total` was done before, which says nothing about the speed.
    """

    def __init__(self, what: str, total: int, unit: str, start: int = 0, *, shown: bool = True, every: float = 30.0):
        self.what, self.total, self.unit, self.every, self.shown = what, total, unit, every, shown
        self.start = self.done = start
        self.began = self.said = time.perf_counter()
        self.bar = (
            tqdm(total=total, initial=start, desc=what, unit=unit, leave=False, file=sys.stdout, dynamic_ncols=True)
            if shown and sys.stdout.isatty()
            else None
        )

    def add(self, count: int) -> None:
        self.done += count
        now = time.perf_counter()
        if self.bar is not None:
            self.bar.update(count)
        elif self.shown and now - self.said >= self.every and self.done > self.start:
            left = (now - self.began) / (self.done - self.start) * (self.total - self.done)
            print(f"{self.what}: {self.done:,}/{self.total:,} {self.unit}s  {duration(left)} left", flush=True)
            self.said = now

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def duration(seconds: float) -> str:
    """3725.2 -> "1:02:05"."""
    minutes, seconds = divmod(int(round(max(0.0, seconds))), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


def table(rows: Sequence[Sequence[Any]], header: Sequence[str]) -> str:
    """Plain text in columns: numbers to the right, floats with four digits."""
    cells = [[f"{value:.4f}" if isinstance(value, float) else str(value) for value in row] for row in rows]
    widths = [max(len(row[i]) for row in [list(header), *cells]) for i in range(len(header))]
    numeric = [all(isinstance(row[i], (int, float)) for row in rows) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        parts = [c.rjust(w) if n else c.ljust(w) for c, w, n in zip(row, widths, numeric, strict=True)]
        return "  ".join(parts).rstrip()

    return "\n".join([line(header), line(["-" * width for width in widths]), *map(line, cells)])
