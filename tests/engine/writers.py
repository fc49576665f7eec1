"""Members of one sweep that write to one MLflow store at the same time, each in a process of its own."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from bt.config import Config, TrackingConfig, write_config
from bt.engine import tracking
from bt.engine.tracking import Journal, Mirror

STEPS = 200
ROOT = Path(__file__).parents[2]


def write_side_by_side(uri: str, sweep_dir: Path, count: int) -> str:
    """Each process writes the journal of sweep_dir/<number> and sends it; all have sent everything.

    Returns what they have printed.
    """
    processes = []
    for number in range(count):
        run_dir = sweep_dir / str(number)
        run_dir.mkdir()
        cfg = Config(name=f"member{number}", seed=number)
        cfg.task.metric, cfg.data.dir = "vqa/val/score", "shards"
        write_config(cfg, run_dir)
        words = [sys.executable, "-m", "tests.engine.writers", uri, str(run_dir), str(sweep_dir)]
        around = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": ROOT}
        processes.append(subprocess.Popen(words, **around))
    printed = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * count, printed
    return "".join(printed)


def write(uri: str, run_dir: Path, sweep_dir: Path) -> bool:
    tracking.SEND_EVERY, tracking.FINISH_WITHIN = 0.05, 250.0  # however busy the machine is
    mirror = Mirror(
        TrackingConfig(uri=uri, timeout_seconds=60), run_dir, run_dir.name, {"git_revision": "abc"}, sweep_dir=sweep_dir
    )
    journal = Journal(run_dir)
    for step in range(1, STEPS + 1):
        journal.append({"step": step, "vqa/train/loss": 1 / step, "lr/base": 0.1 * step})
        time.sleep(0.01)
    return mirror.finish("FINISHED")


def check_store(client, sweep_dir: Path, count: int) -> None:
    """One parent, a child per member, each point once."""
    runs = client.search_runs([client.get_experiment_by_name("bt").experiment_id])
    parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert len(runs) == count + 1 and len(parents) == 1
    assert (parents[0].info.status, parents[0].info.run_name) == ("FINISHED", sweep_dir.name)
    for number in range(count):
        run_id = json.loads((sweep_dir / str(number) / "tracking.json").read_text())["run_id"]
        found = client.get_run(run_id)
        assert found.info.status == "FINISHED" and found.data.params["seed"] == str(number)
        assert found.data.tags["mlflow.parentRunId"] == parents[0].info.run_id
        points = [(point.step, point.value) for point in client.get_metric_history(run_id, "vqa/train/loss")]
        assert sorted(points) == [(step, 1 / step) for step in range(1, STEPS + 1)]


if __name__ == "__main__":
    os._exit(0 if write(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])) else 1)
