"""What runs in a job: one rank of one member's training run, `python -m launchers.job RUN_DIR` outside of SLURM.

Imports nothing slow at the top: a job that is pre-empted while it still starts must hear it.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

from bt.engine import heartbeat

SIGNALS = (signal.SIGTERM, signal.SIGUSR2)


class Job:
    """What Submitit calls on every rank, with the member's directory; it holds nothing that could be a secret.

    cwd: where relative paths of the configuration start.
    """

    def __init__(self, cwd: str):
        self.cwd = cwd

    def __call__(self, run_dir: str) -> None:
        from submitit.helpers import TorchDistributedEnvironment

        preemption = Preemption(Path(run_dir))
        # PyTorch's variables from SLURM's. Each rank sees all GPUs of its node and takes the one of its local rank.
        TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        os.chdir(self.cwd)
        run(Path(run_dir), preemption)

    def checkpoint(self, run_dir: str):
        """For Submitit's own handler, which hears a signal only before `__call__`: the same again."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, run_dir)


class Preemption:
    """SIGTERM (preemption) and SIGUSR2 (time limit, and preemption too where the cluster is so configured).

    In the training loop, which has its own handler, the run finishes its step, saves and ends with `Stopped`; anywhere
    else there is nothing to save. Then rank 0 puts the job back into the queue. This replaces Submitit's handlers,
    which ignore SIGTERM and count signals as time-outs.
    """

    def __init__(self, run_dir: Path):
        self.run_dir = run_dir
        self.main = int(os.environ.get("SLURM_PROCID", os.environ.get("RANK", 0))) == 0
        for number in SIGNALS:
            signal.signal(number, self._outside_the_loop)

    def _outside_the_loop(self, number: int, frame: object) -> None:
        if not self.main:
            return  # rank 0 hears it too, and the job ends as one
        self.requeue(f"{signal.Signals(number).name} outside of the training loop")
        sys.stdout.flush()
        os._exit(1)

    def requeue(self, reason: str) -> None:
        """Puts the job of this process back into SLURM's queue, if it is one and was not cancelled."""
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        # One that another rank has failed in is ended by the same signal.
        if not self.main or heartbeat.failed(self.run_dir):
            return
        heartbeat.write_end(self.run_dir, "stopped", reason)
        if "SLURM_JOB_ID" not in os.environ:
            return
        # "12_3" for a task of an array: its $SLURM_JOB_ID may be 12, which would name all of them.
        job = str(heartbeat.job_id())
        # `scontrol requeue` would bring a cancelled job back to life.
        state = _command("squeue", "-h", "-j", job, "-o", "%T")
        if state != "RUNNING":
            print(f"not requeued: job {job} is {state or 'unknown to SLURM'}", flush=True)
            return
        # SLURM may be faster; that it is requeued already is an error which does no harm.
        print(f"requeueing job {job}: {reason}; {_command('scontrol', 'requeue', job) or 'done'}", flush=True)


def wait_for_slurm(reason: str) -> None:
    """Where a rank of another node went without a word, its node may be down, and SLURM know it only minutes later; it
    puts the job back then, if the job still runs. Where the rank alone died, SLURM ends the job while this waits."""
    from bt.engine.watch import LOST

    if not reason.startswith(LOST) or int(os.environ.get("SLURM_NNODES", 1)) < 2:
        return
    found = re.search(r"^SlurmdTimeout\s*=\s*(\d+)", _command("scontrol", "show", "config"), re.MULTILINE)
    seconds = 60 + (int(found[1]) if found else 300)
    print(f"{reason}; waiting {seconds} s for SLURM to find the node down and requeue the job", flush=True)
    time.sleep(seconds)


def _command(*words: str) -> str:
    """Standard output and error of a command of SLURM."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        return str(error)
    return (done.stdout + done.stderr).strip()


def run(run_dir: Path, preemption: Preemption) -> None:
    """Trains what run_dir/config.yaml says; exits with 1 after one line where it fails."""
    if preemption.main:
        heartbeat.write(run_dir, "starting")
    from bt.config import check_config, log_to_stdout, one_line, read_config

    log_to_stdout()
    try:
        cfg = read_config(run_dir)
        cfg.run_dir = str(run_dir)
        check_config(cfg)
        from bt.errors import Stopped
        from bt.run import train
    except Exception as error:
        _fail(run_dir, error)
    try:
        train(cfg, wait_for_slurm)
    except Stopped as error:
        preemption.requeue(one_line(error))
        if preemption.main:
            sys.exit(1)
        # A rank that ended now would take rank 0 along in the middle of requeueing; SLURM ends them together.
        time.sleep(30 if "SLURM_JOB_ID" in os.environ else 0)
    except Exception as error:
        _fail(run_dir, error)


def _fail(run_dir: Path, error: Exception) -> None:
    from bt.config import one_line
    from bt.errors import UserError

    reason = one_line(error) if isinstance(error, UserError) else f"{type(error).__name__}: {one_line(error)}"
    if not isinstance(error, UserError):
        traceback.print_exc()
    heartbeat.write_end(run_dir, "failed", reason)
    print(f"error: {reason}", file=sys.stderr, flush=True)
    if int(os.environ.get("RANK", 0)) == 0:
        from bt.engine.tracking import close

        close(run_dir, "FAILED")
    wait_for_slurm(reason)
    sys.exit(1)


if __name__ == "__main__":
    where = Path(sys.argv[1])
    run(where, Preemption(where))
