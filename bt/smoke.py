"""`make smoke`: experiments end to end on a few real samples, one after the other in this process, and a table.

python -m bt.smoke                                   # all of conf/experiment/
python -m bt.smoke vqa_base nlvr2_base tracking=none # these, with key=value for each of them

Each is `python -m bt.train experiment=NAME trainer=smoke`: tiny random encoders, three steps, validation and test. All
is written to a folder that is gone afterwards, the samples too, so that nothing old is used.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from bt.config import compose_run
from bt.config.entry import CONF_DIR, one_line
from bt.errors import UserError


@dataclass(frozen=True)
class Outcome:
    """What became of an experiment. metric, value: its task.metric. error: why it failed, on one line; None if it did
    not. output: what it printed, with the traceback of an error that is none of the user's."""

    experiment: str
    seconds: float
    metric: str = ""
    value: float = math.nan
    error: str | None = None
    output: str = ""

    def line(self) -> str:
        found = f"{self.metric} {self.value:.4f}" if self.error is None else f"FAILED: {self.error}"
        return f"{self.experiment:26s} {self.seconds:6.1f} s  {found}"


def all_experiments() -> list[str]:
    return sorted(path.stem for path in Path(CONF_DIR, "experiment").glob("*.yaml"))


def smoke(experiments: Iterable[str], overrides: Iterable[str] = ()) -> Iterator[Outcome]:
    """Runs experiments in the working directory, one after the other."""
    from bt.run import train  # it imports torch, which takes seconds

    for name in experiments:
        yield attempt(name, lambda name=name: _run(train, name, overrides))


def _run(train: Callable, name: str, overrides: Iterable[str]) -> tuple[str, float]:
    cfg = compose_run(f"experiment={name}", "trainer=smoke", f"run_dir=runs/{name}", *overrides)
    value = train(cfg)
    if value is None or not math.isfinite(value):
        raise UserError(f"{cfg.task.metric} is {value}")
    return cfg.task.metric, value


def attempt(name: str, run: Callable[[], tuple[str, float]]) -> Outcome:
    """Calls `run`, which returns a metric with its value, and takes down whatever comes of it."""
    start, said = time.perf_counter(), io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            metric, value = run()
    except Exception as error:  # a bug in one must not hide what becomes of the others
        if not isinstance(error, UserError):
            traceback.print_exc(file=said)
        reason = one_line(error)
        return Outcome(name, time.perf_counter() - start, error=reason, output=said.getvalue())
    return Outcome(name, time.perf_counter() - start, metric, value, output=said.getvalue())


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bt.smoke", description=__doc__.splitlines()[0])
    parser.add_argument("arguments", nargs="*", metavar="EXPERIMENT or key=value", help="default: all experiments")
    arguments = parser.parse_args(given).arguments
    overrides = [argument for argument in arguments if "=" in argument]
    chosen = [argument for argument in arguments if "=" not in argument] or all_experiments()
    outcomes = []
    with tempfile.TemporaryDirectory(prefix="bt-smoke-") as folder, contextlib.chdir(folder):
        for outcome in smoke(chosen, overrides):
            outcomes.append(outcome)
            print(outcome.line(), flush=True)
    failed = [outcome for outcome in outcomes if outcome.error is not None]
    for outcome in failed:
        print(f"\n--- {outcome.experiment} ---\n{outcome.output}", file=sys.stderr)
    seconds = sum(outcome.seconds for outcome in outcomes)
    print(f"\n{len(outcomes) - len(failed)} of {len(outcomes)} experiments ran to their end, in {seconds:.0f} s")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
