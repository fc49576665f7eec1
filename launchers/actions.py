"""What is done with a sweep's members: submitted, waited for, planned; and what is then said."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from omegaconf import DictConfig

from bt.config import Config, read_config
from bt.engine.mlflow_store import Cursor, Sender, default_uri, without_secrets
from bt.engine.progress import table
from bt.errors import ConfigError, UserError
from launchers import local, slurm, states
from launchers.sweep import SPEC, Member, Sweep, add_members, compose_members, from_hydra, is_finished

KINDS = ("slurm", "local")
POLL = 2.0  # seconds between looks at members that are waited for

# (sweep, configurations, overrides) -> each member's result; the command sets it, and a plain multirun waits.
Action = Callable[[Sweep, dict[str, Config], list[list[str]]], list[Any]]
_chosen: list[Action] = []


def choose(action: Action) -> None:
    """What the launchers do in this process with the members that they get."""
    _chosen[:] = [action]


def launch(
    kind: str, context: Any, task: Callable, config: DictConfig, job_overrides: Sequence[Sequence[str]]
) -> list[JobReturn]:
    """What Hydra's launchers do."""
    if config.hydra.job.config_name != "config":
        raise ConfigError(f"hydra/launcher={kind} runs members of bt.train alone")
    overrides = [list(words) for words in job_overrides]
    configs = compose_members(context.config_loader, config, overrides)
    if len(configs) < len(overrides):
        raise ConfigError("the same overrides are given twice; nothing was submitted")
    sweep = from_hydra(kind, config)
    slurm.check_setup(sweep.launcher)
    (slurm if kind == "slurm" else local).check(sweep.params())
    results = (_chosen or [wait_for_all])[0](sweep, configs, overrides)
    return [
        JobReturn(overrides=words, status=JobStatus.COMPLETED, _return_value=value)
        for words, value in zip(overrides, results, strict=True)
    ]


def submit(sweep: Sweep, configs: dict[str, Config], overrides: list[list[str]]) -> list[None]:
    """Submits what is missing and returns at once."""
    return [None] * len(submit_missing(sweep, configs, overrides))


def submit_missing(sweep: Sweep, configs: dict[str, Config], overrides: list[list[str]]) -> list[Member]:
    """Makes the members, submits those that have neither finished nor are on their way, and returns all."""
    with sweep.lock():
        members = add_members(sweep, configs, overrides)
        sweep.write()
        todo, found = states.missing(sweep, members)
        links = register(sweep, todo)
        start(sweep, todo)
    _say_submitted(sweep, members, todo, found, links)
    return members


def start(sweep: Sweep, members: Sequence[Member]) -> None:
    if members:
        sweep.add_jobs((slurm if sweep.kind == "slurm" else local).submit(sweep, members))


def resubmit(sweep: Sweep, members: Sequence[Member]) -> None:
    """`retry`: submits those of the members that have ended without having finished."""
    with sweep.lock():
        todo, found = states.missing(sweep, members)
        start(sweep, todo)
    _say_submitted(sweep, members, todo, found, {})


def _say_submitted(sweep: Sweep, members, todo, found: dict[str, states.State], links: dict[str, str]) -> None:
    jobs = sweep.jobs()
    rows = [
        (
            m.key,
            m.label,
            jobs[m.key][-1] if m.key in jobs else "-",
            ("submitted" if found[m.key].word == "not submitted" else "submitted again")
            if m in todo
            else found[m.key].word,
            _shown(m.run_dir),
            links.get(m.key, "-"),
        )
        for m in members
    ]
    header = ("member", "overrides", "job", "", "run directory", "MLflow")
    print(table([row if links else row[:5] for row in rows], header if links else header[:5]))
    print(f"\n{len(todo)} of {len(members)} submitted; python -m launchers status {_shown(sweep.dir)}")


def _shown(path: Path) -> str:
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def register(sweep: Sweep, members: Sequence[Member]) -> dict[str, str]:
    """Makes the runs in MLflow, so that they can be looked at from now on; {key: link or id}.

    A store that does not answer is no reason not to submit: jobs make their runs themselves.
    """
    links: dict[str, str] = {}
    for member in members:
        cfg = read_config(member.run_dir)
        if cfg.tracking.kind != "mlflow":
            continue
        uri, cursor = default_uri(cfg.tracking.uri), Cursor(member.run_dir)
        cursor.set(name=cfg.name, experiment=cfg.tracking.experiment, final=None, sent=None)
        sender = Sender(member.run_dir, cursor, uri, cfg.tracking.experiment, cfg.name, cfg.tracking.timeout_seconds)
        try:
            run_id = sender.register()
            experiment = sender.client.get_run(run_id).info.experiment_id
        except Exception as error:
            print(
                f"tracking: {without_secrets(uri)} does not answer ({type(error).__name__}); the jobs will try",
                file=sys.stderr,
            )
            break
        page = f"/#/experiments/{experiment}/runs/{run_id}"
        links[member.key] = without_secrets(uri).rstrip("/") + page if uri.startswith("http") else run_id
    if links:
        _describe_parent(sweep, sender)
    return links


def _describe_parent(sweep: Sweep, sender: Sender) -> None:
    """The sweep's specification beside its run; what is not written now is in the sweep's directory anyway."""
    parent = Cursor(sweep.dir).get("run_id")
    try:
        sender.client.log_artifact(parent, str(sweep.dir / SPEC))
    except Exception as error:
        print(f"tracking: {SPEC} was not sent: {type(error).__name__}", file=sys.stderr)


def wait_for_all(sweep: Sweep, configs: dict[str, Config], overrides: list[list[str]]) -> list[float | None]:
    """What a plain multirun does: runs the members and returns their objective metrics.

    Raises UserError when some have failed, after all have ended.
    """
    if sweep.kind == "slurm":
        members = submit_missing(sweep, configs, overrides)
        try:
            _wait(sweep, members)
        except KeyboardInterrupt as error:
            hint = f"python -m launchers status {_shown(sweep.dir)}"
            raise UserError(f"no longer waiting; the jobs go on: {hint}, cancel ends them") from error
    else:
        with sweep.lock():
            members = add_members(sweep, configs, overrides)
            sweep.write()
            todo, _ = states.missing(sweep, members)
            register(sweep, todo)
            queue = local.Queue(sweep, todo)
            sweep.add_jobs({member.key: queue.job for member in todo})
        queue.run()
    found = states.of(sweep, members)
    print(states.overview(sweep, found))
    bad = [m for m in members if not is_finished(m)]
    for member in bad:
        print(f"error in member {member.label}: {found[member.key].word}: {found[member.key].why}", file=sys.stderr)
    if bad:
        raise UserError(f"{len(bad)} of the sweep's members failed")
    return [result(member) for member in members]


def _wait(sweep: Sweep, members: Sequence[Member]) -> None:
    """Until every member has ended; says what changes."""
    shown, ended_before, failures = "", False, 0
    while True:
        try:
            found, failures = states.of(sweep, members), 0
        except UserError as error:  # slurmctld may restart
            failures += 1
            print(f"{error}; asking again", file=sys.stderr)
            if failures == 30:
                raise
        else:
            if (line := states.summary(found)) != shown:
                print(line, flush=True)
            shown, ended = line, all(state.ended for state in found.values())
            # Twice, because a job may be between two states of SLURM, and files of other machines come late.
            if ended and ended_before:
                return
            ended_before = ended
        time.sleep(POLL)


def result(member: Member) -> float | None:
    """The task's metric in the report, which sweepers optimise."""
    metrics = json.loads((member.run_dir / "report.json").read_text())["metrics"]
    return metrics.get(read_config(member.run_dir).task.metric)
