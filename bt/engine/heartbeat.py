"""heartbeat.json of a run: where it runs, how far it is and how it ended, for those who look from outside.

Schedulers know whether a job runs, not what the run in it does; and many clusters forget a job soon after its end.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from pathlib import Path
from typing import Any

NAME = "heartbeat.json"
EVERY = 2.0  # seconds between two writings at most


def job_id() -> str | None:
    """The scheduler's name of this job: $BT_JOB, or SLURM's, where "12_3" is task 3 of the array 12."""
    around = os.environ
    if "SLURM_ARRAY_JOB_ID" in around:
        return around.get("BT_JOB") or f"{around['SLURM_ARRAY_JOB_ID']}_{around['SLURM_ARRAY_TASK_ID']}"
    return around.get("BT_JOB") or around.get("SLURM_JOB_ID")


def restarts() -> int:
    """How often SLURM has put this job back into its queue."""
    return int(os.environ.get("SLURM_RESTART_COUNT", 0))


def process_start(pid: int) -> str | None:
    """When a process of this machine began, in the kernel's ticks: with the number it names one process for good.

    None where there is no such process (a dead one that nobody has waited for counts as none).
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def write(run_dir: Path, state: str, **values: Any) -> None:
    """Replaces the heartbeat, where the run's directory exists. A disk that is full costs the heartbeat alone.

    state: "starting", "running", "stopped" (by a signal, everything saved), "failed" or "finished".
    values: step, total, left_seconds, error.
    """
    pid = os.getpid()
    content = {
        "state": state,
        "time": round(time.time(), 3),
        "job": job_id(),
        "attempt": restarts(),
        "host": socket.gethostname(),
        "pid": pid,
        "process_start": process_start(pid),
        **values,
    }
    temporary = Path(run_dir) / f".{NAME}-{socket.gethostname()}-{pid}"
    with contextlib.suppress(OSError):
        temporary.write_text(json.dumps(content) + "\n")
        temporary.replace(Path(run_dir) / NAME)


def read(run_dir: Path) -> dict[str, Any]:
    """The last heartbeat; empty where there is none."""
    try:
        return json.loads((Path(run_dir) / NAME).read_text())
    except (OSError, ValueError):
        return {}


def failed(run_dir: Path) -> bool:
    """Whether a rank of this job's attempt has failed already."""
    last = read(run_dir)
    return last.get("state") == "failed" and bool(last.get("job")) and _attempt(last) == (job_id(), restarts())


def _attempt(heartbeat: dict[str, Any]) -> tuple[str | None, int | None]:
    return heartbeat.get("job"), heartbeat.get("attempt")


def write_end(run_dir: Path, state: str, error: str | None = None) -> None:
    """The last word of an attempt, with the step where it ended; the first rank that fails has it."""
    if failed(run_dir):
        return
    last = read(run_dir)
    kept = {key: last[key] for key in ("step", "total") if key in last}
    write(run_dir, state, **kept, **({"error": error} if error else {}))


class Heartbeat:
    """Of the training loop on one rank; the others keep quiet."""

    def __init__(self, run_dir: Path, step: int, total: int, shown: bool):
        self.run_dir, self.start, self.total, self.shown = run_dir, step, total, shown
        self.began = time.perf_counter()
        self.written = float("-inf")
        self.step(step)

    def step(self, step: int, last: bool = False) -> None:
        """`step` steps are done; last: none follows."""
        now = time.perf_counter()
        if not self.shown or (now - self.written < EVERY and not last):
            return
        self.written = now
        each = (now - self.began) / (step - self.start) if step > self.start else None
        left = None if each is None else round(each * (self.total - step), 1)
        write(self.run_dir, "running", step=step, total=self.total, left_seconds=left)
