"""`make ablation`: compares bridges and numbers of cross-modal layers on easy-VQA, with equal budgets and three seeds.

    python -m bt.ablation [key=value ...]

The ordinary commands, one after the other: shards, contrastive training of the encoders that all runs start from, the
sweeps ablation_bridges and ablation_layers through hydra/launcher=local, and their tables in docs/ablation. Says first
how long it will take; the same command again goes on where it was stopped. key=value settings go to both sweeps.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from pathlib import Path

from bt.demo import run_module
from bt.engine.progress import duration

DATA_DIR, ENCODERS = "data/easy_vqa", "runs/ablation_encoders"
# Name, members, and the setting that the others are tested against.
SWEEPS = (("ablation_bridges", 36, "bridge=none"), ("ablation_layers", 36, None))
TABLES = Path("docs/ablation")
# Of the encoders' training and of a run with three layers, as measured; used until there are finished runs to go by.
SECONDS = {"encoders": 100.0, "run": 100.0}


def finished_seconds(sweep: str) -> list[float]:
    """What each finished run of a sweep took."""
    return [json.loads(path.read_text())["seconds"] for path in Path("sweeps", sweep).glob("*/report.json")]


def forecast() -> tuple[int, float]:
    """Runs that are missing, and the seconds that they and the encoders take on a core, one after the other."""
    done = {name: finished_seconds(name) for name, _, _ in SWEEPS}
    missing = sum(max(0, members - len(done[name])) for name, members, _ in SWEEPS)
    known = [seconds for found in done.values() for seconds in found]
    each = statistics.mean(known) if known else SECONDS["run"]
    encoders = 0 if Path(ENCODERS, "report.json").exists() else SECONDS["encoders"]
    return missing, missing * each + encoders


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bt.ablation", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("settings", nargs="*", metavar="key=value", help="for the runs of both sweeps")
    settings = parser.parse_args().settings
    missing, seconds = forecast()
    runs = sum(members for _, members, _ in SWEEPS)
    cores = len(os.sched_getaffinity(0))  # a run computes with one thread
    print(f"{missing} of {runs} runs are missing: about {duration(seconds / cores)} with {cores} at a time")
    run_module("bt.convert", "source=easy_vqa", f"out_dir={DATA_DIR}")
    run_module("bt.train", "experiment=ablation_encoders", f"data.dir={DATA_DIR}", f"run_dir={ENCODERS}")
    for name, _, against in SWEEPS:
        start = [f"data.dir={DATA_DIR}", f"init_from={ENCODERS}", "hydra/launcher=local"]
        run_module("bt.train", "-m", f"sweep={name}", *start, f"hydra.launcher.max_parallel={cores}", *settings)
        tested = ["--against", against] if against else []
        run_module("bt.report", "--sweep", name, "--metric", "vqa/test/score", "--out", str(TABLES), *tested)


if __name__ == "__main__":
    main()
