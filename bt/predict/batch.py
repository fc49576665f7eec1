"""A file of pairs in, a file of results out: one line for each pair, in order, resumable at any moment."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from bt.data.shards import write_atomic
from bt.engine.progress import Countdown
from bt.errors import DataError, UserError
from bt.predict.questions import Asked, Results
from bt.predict.rows import Row, Table


class Partial:
    """OUT.partial, the lines so far, and OUT.partial.json, what they are of; together they become OUT at the end.

    identity: anything JSON that is another one for other results. Raises UserError where OUT is there already, or
    OUT.partial holds lines of something else.
    """

    def __init__(self, out: Path, identity: Any):
        self.out, self.lines = out, out.with_name(out.name + ".partial")
        self.about = out.with_name(out.name + ".partial.json")
        if out.exists():
            raise UserError(f"{out} is there already: remove it or give another --out")
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        if self.lines.exists() and (not self.about.exists() or json.loads(self.about.read_text()) != digest):
            raise UserError(f"{self.lines} holds results of other input or options: remove it or give another --out")
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(self.about, json.dumps(digest).encode())
            self.file = self.lines.open("ab+")
        except OSError as error:
            raise UserError(f"{out} cannot be written: {error.strerror}") from error
        self.done = self._cut()

    def _cut(self) -> int:
        """Number of whole lines; what a kill has left of one behind them is cut off."""
        self.file.seek(0)
        done = end = 0
        for line in self.file:
            if line.endswith(b"\n"):
                done, end = done + 1, end + len(line)
        self.file.truncate(end)
        return done

    def add(self, results: Results) -> None:
        self.file.write("".join(json.dumps(result, ensure_ascii=False) + "\n" for result in results).encode())
        self.file.flush()

    def finish(self) -> None:
        os.fsync(self.file.fileno())
        self.file.close()
        self.lines.replace(self.out)
        self.about.unlink()

    def close(self) -> None:
        self.file.close()


def predict_all(table: Table, asked: Asked, partial: Partial, *, batch: int, skip_bad: bool) -> Counter[str]:
    """Writes a line for every row: what was kept of it, and the result or, with `skip_bad`, an "error".

    Returns how many rows had a result and how many an error. Raises DataError, which names the row, without skip_bad;
    what is before it stays, and a later call goes on there.
    """
    counts: Counter[str] = Counter()
    progress = Countdown("predicting", table.total, "row", partial.done)
    try:
        at = partial.done
        left = islice(table.rows(), at, None)
        while rows := [*islice(left, batch)]:
            results = _results(rows, at, asked, skip_bad, partial.add)
            partial.add(results)
            counts.update("errors" if "error" in result else "results" for result in results)
            at += len(rows)
            progress.add(len(rows))
    finally:
        progress.close()
    partial.finish()
    return counts


def _results(rows: Sequence[Row], first: int, asked: Asked, skip_bad: bool, keep: Callable[[Results], None]) -> Results:
    try:
        if not any(row.problem for row in rows):
            return [{**row.kept, **result} for row, result in zip(rows, asked(rows), strict=True)]
    except DataError:
        pass  # some row of them is bad: which one shows when each is asked alone
    done: Results = []
    for number, row in enumerate(rows, first):
        try:
            if row.problem:
                raise DataError(row.problem)
            done.append({**row.kept, **asked([row])[0]})
        except DataError as error:
            if not skip_bad:
                keep(done)
                raise DataError(f"row {number + 1}: {error} (--on-bad skip writes it down and goes on)") from error
            done.append({**row.kept, "error": str(error)})
    return done
