"""Tables of sweeps.

python -m bt.report --sweep easy_vqa-bridges --against bridge=none   # from MLflow: mean and spread over seeds, cost
python -m bt.report --sweep glue --best                              # from sweeps/glue: the best members of each recipe
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from bt.config.entry import one_line
from bt.engine.progress import table
from bt.errors import UserError
from bt.report.compare import compare
from bt.report.runs import read_sweep
from bt.report.sweep import Best, best_of, read_members
from bt.report.write import as_text, export

HEADER = ("recipe", "from", "metric", "best", "seeds", "runs", "with")


def row(best: Best) -> tuple[str | float | int, ...]:
    settings = " ".join(f"{key}={value}" for key, value in best.settings.items())
    value = "-" if best.value is None else best.value
    runs = f"{best.finished} of {best.members}"
    return best.name, best.init_from or "-", best.metric, value, best.seeds, runs, settings


def arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bt.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sweep", required=True, metavar="NAME", help="a sweep of sweeps/, or the path of one")
    parser.add_argument(
        "--best", action="store_true", help="the best settings of each recipe, from the run directories"
    )
    parser.add_argument("--uri", help="MLflow tracking URI; default: $MLFLOW_TRACKING_URI, or mlflow.db here")
    parser.add_argument("--metric", help="as in MLflow, such as vqa/test/score; default: what chose the checkpoints")
    parser.add_argument("--against", metavar="SETTING", help="test the others against this setting, as bridge=none")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="for .md, .tex, .csv, .png; default: the sweep's directory"
    )
    return parser.parse_args(given)


def main(given: list[str] | None = None) -> None:
    options = arguments(given)
    name = Path(options.sweep)
    folder = name if len(name.parts) > 1 else Path("sweeps") / name
    try:
        if options.best:
            print(table([row(best) for best in best_of(read_members(folder))], HEADER))
            return
        comparison = compare(read_sweep(name.name, options.uri), options.metric, options.against)
        print(as_text(comparison))
        paths = export(comparison, options.out or folder)
        print(f"\nwritten: {', '.join(map(str, paths))}")
    except UserError as error:
        sys.exit(f"error: {one_line(error)}")


if __name__ == "__main__":
    main()
