"""Members as processes of this machine, fed from a queue: `python -m launchers.local SWEEP_DIR MEMBER ...` detached.

Submitit's own local executor starts all members at once; here `max_parallel` run at a time, each on GPUs of its own.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from bt.config.entry import one_line
from bt.engine import heartbeat
from bt.engine.mlflow_store import locked
from bt.errors import ConfigError, UserError
from launchers.sweep import Member, Sweep, read

LOGS = "logs"  # below the sweep's directory
LOCK = ".queue.lock"  # in LOGS: held while members are started or cancelled


def check(params: dict) -> None:
    for key in ("max_parallel", "gpus_per_member"):
        if params[key] is not None and params[key] < 1:
            raise ConfigError(f"hydra.launcher.{key}={params[key]} is out of range: must be at least 1")
    gpus = visible_gpus()
    if gpus and params["gpus_per_member"] > len(gpus):
        raise ConfigError(f"hydra.launcher.gpus_per_member={params['gpus_per_member']}: there are {len(gpus)} here")


def visible_gpus() -> list[str]:
    """GPUs as CUDA_VISIBLE_DEVICES names them, without importing torch."""
    if (chosen := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for name in chosen.split(",") if name and name != "-1"]
    if not shutil.which("nvidia-smi"):
        return []
    done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
    return [str(number) for number, line in enumerate(done.stdout.splitlines()) if line.startswith("GPU ")]


def slots(params: dict) -> list[list[str]]:
    """The GPUs of each place for a member (none on a CPU); as many places as members run at a time."""
    gpus, each = visible_gpus(), params["gpus_per_member"]
    if gpus:
        places = [gpus[start : start + each] for start in range(0, len(gpus) - each + 1, each)]
        return places[: params["max_parallel"] or len(places)]
    return [[]] * (params["max_parallel"] or max(1, len(os.sched_getaffinity(0)) // 2))


def name_of(pid: int) -> str:
    """The name of a queue, which stands for the job of all its members."""
    return f"{socket.gethostname()}:{pid}:{heartbeat.process_start(pid)}"


def runs(job: str) -> bool:
    """Whether the queue of that name is alive; True for another machine's, which cannot be seen from here."""
    host, pid, start = job.rsplit(":", 2)
    return host != socket.gethostname() or heartbeat.process_start(int(pid)) == start


class Queue:
    """Runs members, so many at a time, in this process's children."""

    def __init__(self, sweep: Sweep, members: Sequence[Member]):
        self.sweep, self.members = sweep, list(members)
        self.job = name_of(os.getpid())
        self.places = slots(sweep.params())
        self.running: dict[int, subprocess.Popen] = {}
        self.logs = sweep.dir / LOGS
        self.logs.mkdir(exist_ok=True)
        self.stopping = False

    def run(self) -> None:
        """Returns when all have ended, or, after SIGTERM or SIGINT, when those that ran have saved."""
        previous = {s: signal.signal(s, self._stop) for s in (signal.SIGTERM, signal.SIGINT)}
        waiting = list(self.members)
        try:
            while self.running or (waiting and not self.stopping):
                for place in range(len(self.places)):
                    if place in self.running and self.running[place].poll() is not None:
                        del self.running[place]
                    if place not in self.running and waiting and not self.stopping:
                        self._fill(place, waiting)
                time.sleep(0.1)
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
        if self.stopping:
            raise UserError("stopped; the same command goes on from there")

    def _fill(self, place: int, waiting: list[Member]) -> None:
        """Starts the next member at a place, unless another queue of this sweep has one there, alive or left over."""
        name = "+".join(self.places[place]) or str(place)
        with open(self.logs / f".place-{name}", "a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return
            with locked(self.logs / LOCK):
                member = waiting.pop(0)
                if self._may_start(member):
                    # The member inherits the lock and holds it as long as it lives.
                    self.running[place] = self._start(member, self.places[place], lock.fileno())

    def _may_start(self, member: Member) -> bool:
        """Not one that `cancel` has marked, nor one that was submitted again since, which is another queue's."""
        beat, jobs = heartbeat.read(member.run_dir), self.sweep.jobs().get(member.key, [])
        # A queue may be here before `submit` has noted its job; then there is no newer one.
        superseded = self.job in jobs and jobs[-1] != self.job
        return not superseded and (beat.get("job"), beat.get("state")) != (self.job, "stopped")

    def _start(self, member: Member, gpus: list[str], lock: int) -> subprocess.Popen:
        command = [sys.executable, "-u"]
        if len(gpus) > 1:
            command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={len(gpus)}"]
        # A job of SLURM that the queue itself runs in is not the members' to requeue.
        around = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")} | {"BT_JOB": self.job}
        # A process that the queue does not share its cores with would take them all.
        around.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // len(self.places))))
        if gpus:
            around["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
        with open(log_file(self.sweep, member), "ab") as log:
            process = subprocess.Popen(
                [*command, "-m", "launchers.job", str(member.run_dir)],
                cwd=self.sweep.cwd,
                env=around,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is the queue's to pass on
                pass_fds=[lock],
            )
        own = {"pid": process.pid, "process_start": heartbeat.process_start(process.pid)}
        heartbeat.write(member.run_dir, "starting", job=self.job, **own)
        return process

    def _stop(self, number: int, frame: object) -> None:
        self.stopping = True
        for process in list(self.running.values()):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)


def submit(sweep: Sweep, members: Sequence[Member]) -> dict[str, str]:
    """Starts the queue in the background and returns {key: job}."""
    log = sweep.dir / LOGS / "queue.log"
    log.parent.mkdir(exist_ok=True)
    with open(log, "ab") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "launchers.local", str(sweep.dir), *(member.key for member in members)],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
    job = name_of(process.pid)
    return {member.key: job for member in members}


def cancel(sweep: Sweep, members: Sequence[Member]) -> None:
    """Asks members that run to end, and marks those that wait, which their queue then leaves out."""
    if not members:
        return
    jobs = sweep.jobs()
    with locked(sweep.dir / LOGS / LOCK):
        for member in members:
            job = jobs[member.key][-1]
            if job.rsplit(":", 2)[0] != socket.gethostname():
                raise UserError(f"member {member.key} is one of another machine: cancel it on {job.rsplit(':', 2)[0]}")
            beat = heartbeat.read(member.run_dir)
            if beat.get("job") != job:
                kept = {key: beat[key] for key in ("step", "total") if key in beat}
                heartbeat.write(member.run_dir, "stopped", job=job, error="cancelled before it started", **kept)
            elif beat["state"] in ("starting", "running") and lives(beat):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(beat["pid"], signal.SIGTERM)


def lives(beat: dict) -> bool:
    """Whether the process of a heartbeat is there; True for one of another machine."""
    return beat["host"] != socket.gethostname() or heartbeat.process_start(beat["pid"]) == beat["process_start"]


def log_file(sweep: Sweep, member: Member) -> Path:
    return sweep.dir / LOGS / f"{member.key}.log"


def main() -> None:
    sweep = read(Path(sys.argv[1]))
    try:
        Queue(sweep, [sweep.members[key] for key in sys.argv[2:]]).run()
    except UserError as error:
        print(one_line(error), file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
