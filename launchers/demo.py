"""`make slurm-demo`: a sweep of bridges on a local SLURM of two nodes, pre-empted, with its table from MLflow."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from mlflow import MlflowClient

from bt.engine.progress import table
from launchers import states
from launchers.sweep import Sweep, find

SCRIPT = Path(__file__).with_name("slurm_local.sh")
DATA, STORE = Path("data/easy_vqa"), "sqlite:///sweeps/slurm-demo.db"
# Small enough for two cores; the point is what SLURM does to it.
SETTINGS = [
    "experiment=easy_vqa", "sweep=bridges", "bridge=none,add", "seed=0,1", "encoder=tiny", "cross=tiny",
    "data.max_samples=600", "eval.max_samples=200", "trainer.epochs=2", "trainer.threads=1", "trainer.log_every=10",
    "global_batch=32",
    "checkpoint.every_steps=50", f"tracking.uri={STORE}", "tracking.experiment=slurm-demo",
]  # fmt: skip


def command(*words: str) -> None:
    print(f"\n$ {' '.join(words)}", flush=True)
    if status := subprocess.run(words).returncode:
        sys.exit(status)


def python(*words: str) -> None:
    print(f"\n$ python -m {' '.join(words)}", flush=True)
    if status := subprocess.run([sys.executable, "-m", *words]).returncode:
        sys.exit(status)


def preempt(sweep: Sweep) -> None:
    """Takes both nodes away in the middle of a member's training."""
    found = []
    while not any(state.word == "running" and state.step >= 50 for state in found):
        if found and all(state.ended for state in found):
            return  # `status` says why
        time.sleep(1)
        found = states.of(sweep).values()
    print("\nBoth nodes are now needed by the partition `high`:")
    command("sbatch", "-p", "high", "-N2", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 1")
    time.sleep(4)
    python("launchers", "status", "slurm-demo")


def wait(sweep: Sweep) -> None:
    shown = ""
    while True:
        found = states.of(sweep)
        if (line := states.summary(found)) != shown:
            print(time.strftime("%H:%M:%S"), line, flush=True)
        if all(state.ended for state in found.values()):
            return
        shown = line
        time.sleep(2)


def show_table(sweep: Sweep) -> None:
    """From MLflow alone."""
    client = MlflowClient(STORE)
    experiment = client.get_experiment_by_name("slurm-demo").experiment_id
    rows = []
    for run in client.search_runs([experiment], "tags.`mlflow.parentRunId` != ''"):
        bridge = run.data.params["bridge._target_"].rpartition(".")[2]
        points = len(client.get_metric_history(run.info.run_id, "vqa/train/loss"))
        row = (bridge, run.data.params["seed"], run.info.status, points, run.data.metrics.get("vqa/test/score"))
        rows.append(row)
    print("\n" + table(sorted(rows), ("bridge", "seed", "status", "points of the loss", "vqa/test/score")))


def main() -> None:
    out = subprocess.run([SCRIPT, "env"], capture_output=True, text=True, check=True).stdout
    os.environ["SLURM_CONF"] = out.strip().rpartition("=")[2]
    command(str(SCRIPT), "up")
    try:
        if not (DATA / "index.json").exists():
            python("bt.convert", "source=easy_vqa", f"out_dir={DATA}")
        settings = [*SETTINGS, f"data.dir={DATA}", "hydra/launcher=slurm", "hydra.launcher.array_parallelism=2"]
        python("launchers", "submit", "--name", "slurm-demo", *settings)
        sweep = find("slurm-demo")
        if not all(state.word == "finished" for state in states.of(sweep).values()):
            preempt(sweep)
            wait(sweep)
        python("launchers", "status", "slurm-demo")
        show_table(sweep)
    finally:
        command(str(SCRIPT), "down", "--purge")


if __name__ == "__main__":
    main()
