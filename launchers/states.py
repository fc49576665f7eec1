"""What each member of a sweep is doing: the scheduler's word, the run's own heartbeat and what the run has written."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bt.config.record import read_recorded
from bt.engine import heartbeat
from bt.engine.progress import duration, table
from bt.errors import UserError
from launchers import local, slurm
from launchers.sweep import Member, Sweep, ago, is_finished

# Nothing more to be done by the scheduler.
ENDED = ("finished", "failed", "stopped", "cancelled", "killed", "timed out", "out of memory", "not submitted")
WORDS = {"CANCELLED": "cancelled", "TIMEOUT": "timed out", "OUT_OF_MEMORY": "out of memory", "NODE_FAIL": "killed"}
USUAL = ("JobArrayTaskLimit", "Priority", "Resources", "BeginTime", "Prolog")  # reasons to wait that go without saying
QUIET = 120.0  # seconds without a heartbeat that are worth a word


@dataclass(frozen=True)
class State:
    """word: see ENDED; else waiting, requeued, starting, running, ending. why: of a failure or a wait, on one line."""

    word: str
    why: str = ""
    job: str = ""
    step: int | None = None
    total: int | None = None
    left_seconds: float | None = None  # of training, as fast as since the last start
    limit: str = ""  # time until the job's limit, as SLURM writes it

    @property
    def ended(self) -> bool:
        return self.word in ENDED


def of(sweep: Sweep, members: Iterable[Member] | None = None) -> dict[str, State]:
    """{key: state} of the members (None: all). Raises UserError where SLURM does not answer."""
    members = list(sweep.members.values() if members is None else members)
    jobs = {key: entries[-1] for key, entries in sweep.jobs().items()}
    asked = [jobs[m.key] for m in members if m.key in jobs and ":" not in jobs[m.key] and not _is_over(m)]
    known = slurm.states(asked)
    return {m.key: _state(sweep, m, jobs.get(m.key, ""), known) for m in members}


def _state(sweep: Sweep, member: Member, job: str, known: dict[str, slurm.JobState]) -> State:
    beat = heartbeat.read(member.run_dir)
    place = {"job": job, "step": beat.get("step"), "total": beat.get("total")}
    mine = beat if beat.get("job") == job else {}
    if is_finished(member):
        found = known.get(job)
        alive = local.lives(mine) if ":" in job and mine else found is not None and not found.ended
        if alive and mine.get("state") == "running":
            return State("ending", "sending the rest to MLflow", **place)
        return State("finished", **place)
    if not job:
        return State("not submitted", **place)
    if ":" in job:
        return _local_state(job, mine, place)
    return _slurm_state(sweep, member, known.get(job), mine, place)


def _is_over(member: Member) -> bool:
    """Whether a finished member's process has said so itself; before, it may still be sending."""
    return is_finished(member) and heartbeat.read(member.run_dir).get("state") == "finished"


def _local_state(job: str, mine: dict[str, Any], place: dict[str, Any]) -> State:
    if mine.get("state") in ("failed", "stopped"):
        return State(mine["state"], mine.get("error", ""), **place)
    if mine.get("state") in ("starting", "running", "finished"):
        if local.lives(mine):
            return _going(mine, place)
        return State("killed", "its process is gone", **place)
    return State("waiting", **place) if local.runs(job) else State("stopped", "its queue is gone", **place)


def _slurm_state(sweep: Sweep, member: Member, found: slurm.JobState | None, mine: dict, place: dict) -> State:
    if found is not None and not found.ended:
        if found.state in ("PENDING", "REQUEUED", "SUSPENDED", "PREEMPTED", "STOPPED"):
            why = "" if found.reason in USUAL else found.reason
            return State("requeued" if mine else "waiting", why, **place)
        if found.state == "COMPLETING" or mine.get("state") in ("failed", "stopped", "finished"):
            return State("ending", mine.get("error", ""), **place)
        return _going(mine, place, found.left)
    if mine.get("state") == "failed":
        return State("failed", mine.get("error", ""), **place)
    silent = mine.get("state") in ("starting", "running")
    # A run that is cancelled saves and says so; one that got SIGKILL could not (SLURM calls both cancelled).
    if found is not None and found.state in WORDS and not (found.state == "CANCELLED" and silent):
        return State(WORDS[found.state], mine.get("error", ""), **place)
    if mine.get("state") == "stopped":
        return State("stopped", mine.get("error", ""), **place)
    if silent:
        said = f"SLURM: {found.state}" if found else "SLURM has forgotten it"
        return State("killed", f"ended without a word ({said})", **place)
    why = _last_line(slurm.log_files(sweep, place["job"]))
    said = found.state if found else "SLURM has forgotten it"
    return State("failed", why or f"before it started ({said})", **place)


def _going(mine: dict[str, Any], place: dict[str, Any], limit: str = "") -> State:
    if mine.get("state") != "running":
        return State("starting", limit=limit, **place)
    quiet = ago(mine["time"])
    why = f"no step for {duration(quiet)}" if quiet > QUIET else ""
    return State("running", why, left_seconds=mine.get("left_seconds"), limit=limit, **place)


def _last_line(files: list[Path]) -> str:
    """The last words on standard error."""
    for path in files:
        if path.suffix == ".err":
            lines = [line for line in _tail(path).splitlines() if line.strip()]
            if lines:
                return lines[-1].strip()
    return ""


def _tail(path: Path, size: int = 65536) -> str:
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - size))
        return file.read().decode(errors="replace")


def last_metric(member: Member) -> tuple[str, float] | None:
    """The task's metric as it was last measured; before that, the last loss."""
    path = member.run_dir / "metrics.jsonl"
    if not path.is_file():
        return None
    wanted = read_recorded(member.run_dir)["task"]["metric"]
    loss = None
    for line in reversed(_tail(path).splitlines()):
        try:
            found = json.loads(line)
        except ValueError:  # cut off at either end
            continue
        if wanted in found:
            return wanted, found[wanted]
        loss = loss or next(((key, value) for key, value in found.items() if key.endswith("/train/loss")), None)
    return loss


def overview(sweep: Sweep, states: dict[str, State]) -> str:
    """A table of members: state, step, last metric and time left, then each reason on a line of its own."""
    rows, reasons = [], []
    for key, state in states.items():
        member = sweep.members[key]
        metric = last_metric(member)
        rows.append(
            (
                key,
                member.label,
                state.job or "-",
                state.word,
                "-" if state.step is None else f"{state.step}/{state.total}",
                f"{metric[0]} {metric[1]:.4f}" if metric else "-",
                "-" if state.left_seconds is None else duration(state.left_seconds),
                state.limit or "-",
            )
        )
        if state.why:
            reasons.append(f"{key} ({member.label}) {state.word}: {state.why}")
    header = ("member", "overrides", "job", "state", "step", "last metric", "time left", "job's limit")
    return "\n".join([table(rows, header), *reasons])


def summary(states: dict[str, State]) -> str:
    """ "3 finished, 2 running, 1 failed"."""
    words = [state.word for state in states.values()]
    return ", ".join(f"{words.count(word)} {word}" for word in dict.fromkeys(words)) or "no members"


def missing(sweep: Sweep, members: Iterable[Member]) -> tuple[list[Member], dict[str, State]]:
    """Members that have not finished and that no job goes on with; and the state of all of them."""
    members = list(members)
    try:
        found = of(sweep, members)
    except UserError as error:
        raise UserError(f"{error}; what is missing cannot be known, nothing was submitted") from error
    return [m for m in members if found[m.key].ended and found[m.key].word != "finished"], found
