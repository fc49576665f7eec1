"""Sends what a run's tracking store has missed: `python -m bt.sync --run-dir DIR [--uri URI]`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from bt.config import read_config
from bt.config.entry import one_line
from bt.engine.mlflow_store import JOURNAL, Cursor, Sender, default_uri, without_secrets
from bt.errors import UserError


def sync(run_dir: Path, uri: str | None = None) -> str:
    """Sends everything in `run_dir` that its store does not have, and returns the id of the run there.

    uri: the store; None is the one of the run. Raises UserError where there is no run or the store does not answer.
    """
    cfg = read_config(run_dir)
    if not (run_dir / JOURNAL).is_file():
        raise UserError(f"{run_dir} has no {JOURNAL}: nothing to send")
    cursor = Cursor(run_dir)
    if cursor.get("run_id") is None and cursor.get("final") is None and (run_dir / "report.json").is_file():
        # A finished run that was not tracked.
        artifacts = ["report.json", *sorted(path.name for path in run_dir.glob("*.png"))]
        cursor.set(final={"status": "FINISHED", "artifacts": artifacts, "tags": {}})
    uri = uri or cursor.get("uri") or default_uri(cfg.tracking.uri)
    timeout = cfg.tracking.timeout_seconds
    sender = Sender(run_dir, cursor, uri, cursor.get("experiment", cfg.tracking.experiment), cfg.name, timeout)
    try:
        sender.send()
    except Exception as error:
        raise UserError(f"{without_secrets(uri)} does not take the run: {type(error).__name__}: {error}") from error
    return str(sender.run_id)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bt.sync", description=__doc__)
    parser.add_argument("--run-dir", type=Path, required=True, help="directory of the run")
    parser.add_argument("--uri", help="MLflow store or server; without it the run's own")
    arguments = parser.parse_args()
    try:
        run_id = sync(arguments.run_dir, arguments.uri)
    except UserError as error:
        print(f"error: {without_secrets(one_line(error))}", file=sys.stderr)
        sys.exit(1)
    print(f"{arguments.run_dir} is in the store as run {run_id}")


if __name__ == "__main__":
    main()
