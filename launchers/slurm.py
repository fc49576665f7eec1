"""SLURM: submission by Submitit, and what squeue (and sacct, where it answers) say of jobs."""

from __future__ import annotations

import contextlib
import io
import os
import shlex
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bt.errors import ConfigError, UserError
from launchers.job import Job
from launchers.sweep import Member, Sweep

LOGS = ".submitit/%j"  # below the sweep's directory, %j the job
# Until Python has handlers, signals are ignored: their default would end a job that is pre-empted in its first second,
# where it is SLURM that requeues it when the grace time is over.
PYTHON = shlex.join(["sh", "-c", 'trap "" TERM USR2; exec "$0" "$@"', sys.executable])
# States in which a job is over, whatever the rest of them is called.
ENDED = "BOOT_FAIL CANCELLED COMPLETED DEADLINE FAILED NODE_FAIL OUT_OF_MEMORY REVOKED TIMEOUT".split()


@dataclass(frozen=True)
class JobState:
    """state: SLURM's word. left: to the time limit, as SLURM writes it. reason: why it waits. nodes: where it runs."""

    state: str
    left: str = ""
    reason: str = ""
    nodes: str = ""

    @property
    def ended(self) -> bool:
        return self.state in ENDED


def submit(sweep: Sweep, members: Sequence[Member]) -> dict[str, str]:
    """Submits members as one array (as one job, if it is one) and returns {key: job}."""
    try:
        import submitit
    except ImportError as error:
        raise UserError("hydra/launcher=slurm needs Submitit: pip install -e '.[slurm]'") from error

    params = check(sweep.params())
    try:
        executor = submitit.AutoExecutor(
            sweep.dir / LOGS,
            cluster="slurm",
            slurm_max_num_timeout=params.pop("max_num_timeout"),
            slurm_python=PYTHON,
        )
    except RuntimeError as error:
        raise UserError(
            "hydra/launcher=slurm needs SLURM's sbatch and srun on this machine; hydra/launcher=local does without"
        ) from error
    base = ("name", "timeout_min", "mem_gb", "nodes", "cpus_per_task", "gpus_per_node", "tasks_per_node")
    general = {key: params.pop(key) for key in base}
    # A rank that ends with an error ends the job. srun does not take over --cpus-per-task from sbatch since 22.05.
    srun = ["--kill-on-bad-exit=1"]
    if general["cpus_per_task"]:
        srun.append(f"--cpus-per-task={general['cpus_per_task']}")
    rest = {f"slurm_{key}": value for key, value in params.items() if value is not None}
    general = {key: value for key, value in general.items() if value is not None}
    stderr = io.StringIO()
    # Submitit prints sbatch's words itself before it raises them.
    with outside_of_jobs(), contextlib.redirect_stderr(stderr):
        try:
            executor.update_parameters(**general, **rest, slurm_srun_args=srun)
            run_dirs = [str(member.run_dir) for member in members]
            jobs = executor.map_array(Job(str(sweep.cwd)), run_dirs)
        except (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError) as error:
            raise UserError(f"sbatch refuses: {error}") from error
    return {member.key: job.job_id for member, job in zip(members, jobs, strict=True)}


@contextlib.contextmanager
def outside_of_jobs() -> Iterator[None]:
    """Hides what SLURM has set for a job that this is called in, which would be the new job's too."""
    from submitit.helpers import clean_env

    configuration = os.environ.get("SLURM_CONF")
    with clean_env() if "SLURM_JOB_ID" in os.environ else contextlib.nullcontext():
        if configuration:
            os.environ["SLURM_CONF"] = configuration
        yield


def check(params: dict[str, Any]) -> dict[str, Any]:
    """The launcher's parameters as Submitit takes them. Raises ConfigError, which names the key."""
    params = dict(params)
    params.pop("submitit_folder", None)
    setup = params.get("setup") or []
    for key, value in params.items():
        # Each becomes a line of the job's script; a line break would begin another one.
        if key != "setup" and any(mark in str(part) for mark in "\n\r\0" for part in _leaves(value)):
            raise ConfigError(f"hydra.launcher.{key}={value!r} must be one line")
    if params.get("tasks_per_node") is None:
        params["tasks_per_node"] = params.get("gpus_per_node") or 1
    if params.get("gpus_per_node") and params["tasks_per_node"] != params["gpus_per_node"]:
        raise ConfigError(
            f"hydra.launcher.tasks_per_node={params['tasks_per_node']}: each of the "
            f"hydra.launcher.gpus_per_node={params['gpus_per_node']} needs one rank"
        )
    for key in ("timeout_min", "nodes", "tasks_per_node", "array_parallelism"):
        if int(params[key]) < 1:
            raise ConfigError(f"hydra.launcher.{key}={params[key]} is out of range: must be at least 1")
    params["setup"] = setup or None
    return params


def check_setup(launcher: dict[str, Any]) -> None:
    """Refuses lines of the job's script that would be written with values from the environment in them."""
    for line in launcher.get("setup") or []:
        if "oc.env:" in line:
            raise ConfigError(f"hydra.launcher.setup: {line!r} would be written with its value: use $NAME of the shell")


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [leaf for pair in value.items() for part in pair for leaf in _leaves(part)]
    return [leaf for part in value for leaf in _leaves(part)] if isinstance(value, list) else [value]


def states(jobs: Iterable[str]) -> dict[str, JobState]:
    """What SLURM knows of jobs; those that it has forgotten are left out. Raises UserError where it does not answer."""
    wanted = set(jobs)
    if not wanted:
        return {}
    arrays = ",".join(sorted({job.split("_")[0] for job in wanted}))
    # -r: each task of an array on a line of its own. The ids of one array's tasks are %i.
    try:
        done = subprocess.run(
            ["squeue", "-h", "-r", "-t", "all", "-j", arrays, "-o", "%i|%T|%L|%r|%N"],
            capture_output=True,
            text=True,
            timeout=120,
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise UserError(f"squeue does not answer: {error}") from error
    if done.returncode and "Invalid job id" not in done.stderr:
        raise UserError(f"squeue does not answer: {done.stderr.strip()}")
    found: dict[str, JobState] = {}
    for line in done.stdout.splitlines():
        job, state, left, reason, nodes = line.split("|", 4)
        if job in wanted:
            found[job] = JobState(state, left, "" if reason == "None" else reason, nodes)
    return found | _accounted(wanted - set(found))


def _accounted(jobs: Iterable[str]) -> dict[str, JobState]:
    """From sacct, for jobs that slurmctld has forgotten; nothing where there is no accounting."""
    jobs = sorted(jobs)
    if not jobs:
        return {}
    try:
        done = subprocess.run(
            ["sacct", "-n", "-P", "-X", "-j", ",".join(jobs), "-o", "JobID,State"],
            capture_output=True,
            text=True,
            timeout=120,
        )
    except (OSError, subprocess.SubprocessError):
        return {}
    if done.returncode:
        return {}
    rows = [line.split("|") for line in done.stdout.splitlines() if line.count("|") == 1]
    # "CANCELLED by 1000"
    return {job: JobState(state.split()[0]) for job, state in rows if job in jobs and state}


def cancel(jobs: Iterable[str]) -> None:
    jobs = list(jobs)
    if jobs:
        done = subprocess.run(["scancel", *jobs], capture_output=True, text=True, timeout=120)
        if done.returncode:
            raise UserError(f"scancel: {done.stderr.strip()}")


def log_files(sweep: Sweep, job: str) -> list[Path]:
    """Standard output and error of every rank, rank 0 first; the script's own error stream is rank 0's."""
    folder = Path(str(sweep.dir / LOGS).replace("%j", job))
    return sorted(folder.glob("*_log.out")) + sorted(folder.glob("*_log.err")) if os.path.isdir(folder) else []
