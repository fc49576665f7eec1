"""Tables of finished runs.

python -m bt.report --sweep glue    # the best members of sweeps/glue, a row for each recipe
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from bt.config.entry import one_line
from bt.engine.progress import table
from bt.errors import UserError
from bt.report.sweep import Best, best_of, read_members

HEADER = ("recipe", "from", "metric", "best", "seeds", "runs", "with")


def row(best: Best) -> tuple[str | float | int, ...]:
    settings = " ".join(f"{key}={value}" for key, value in best.settings.items())
    value = "-" if best.value is None else best.value
    runs = f"{best.finished} of {best.members}"
    return best.name, best.init_from or "-", best.metric, value, best.seeds, runs, settings


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bt.report", description=__doc__.splitlines()[0])
    parser.add_argument("--sweep", required=True, metavar="NAME", help="a sweep of sweeps/, or the path of one")
    name = Path(parser.parse_args(given).sweep)
    try:
        members = read_members(name if len(name.parts) > 1 else Path("sweeps") / name)
    except UserError as error:
        sys.exit(f"error: {one_line(error)}")
    print(table([row(best) for best in best_of(members)], HEADER))


if __name__ == "__main__":
    main()
