"""Sweeps in the background: `python -m launchers submit|plan|status|logs|cancel|retry|sync`.

`submit` and `plan` take the options and overrides of `python -m bt.train -m` after their own.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from functools import partial

from bt.config import Config, entry
from bt.config.entry import one_line
from bt.engine.mlflow_store import without_secrets
from bt.errors import ConfigError, UserError
from launchers import actions, local, slurm, states
from launchers.sweep import Member, Sweep, find


def main() -> None:
    arguments, overrides = parser().parse_known_args()
    if overrides and arguments.command not in ("submit", "plan"):
        parser().error(f"unrecognized arguments: {' '.join(overrides)}")
    try:
        arguments.act(arguments, overrides)
    except UserError as error:
        print(f"error: {without_secrets(one_line(error))}", file=sys.stderr)
        sys.exit(1)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m launchers", description=__doc__, allow_abbrev=False)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, act, text: str, sweep: bool = True) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        made.set_defaults(act=act)
        if sweep:
            made.add_argument("sweep", help="name below sweeps/, or directory")
            made.add_argument("members", nargs="*", help="members (the first column of status); none: all")
        return made

    submit = command("submit", compose, "submit what is missing of a sweep, and return at once", sweep=False)
    plan = command("plan", compose, "say what a sweep would cost, without submitting it", sweep=False)
    for made in (submit, plan):
        made.add_argument("--name", help="the sweep's name; by default the experiment's and the sweep file's")
    speed = plan.add_mutually_exclusive_group()
    speed.add_argument("--pairs-per-second", type=float, help="of one member, all its ranks together")
    speed.add_argument("--like", metavar="RUN_DIR", help="as fast as this finished run, per rank")
    command("status", status, "show each member's state, step, last metric and time left").add_argument(
        "--json", action="store_true", help="for programs"
    )
    logs = command("logs", show_logs, "show the last lines that members have printed")
    logs.add_argument("--lines", type=int, default=20, help="of each file (default 20)")
    logs.add_argument("--follow", action="store_true", help="and those that come, until Ctrl-C")
    command("cancel", cancel, "end members; they save what they have, and retry goes on from there")
    command("retry", retry, "submit again what has ended without having finished")
    command("sync", sync, "send what the members' MLflow store has missed")
    return top


def compose(arguments: argparse.Namespace, overrides: list[str]) -> None:
    """`submit` and `plan`: Hydra makes the members and gives them to its launcher, which does as it is told here."""
    if arguments.command == "plan":
        from launchers.plan import plan

        actions.choose(partial(plan, arguments=arguments))
    else:
        actions.choose(actions.submit)
    if arguments.name:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", arguments.name):
            raise UserError(f"--name {arguments.name!r} names a directory: use letters, digits, '.', '_' and '-' only")
        overrides = [*overrides, f"hydra.sweep.dir=sweeps/{arguments.name}"]
    with tempfile.TemporaryDirectory() as nowhere:
        if arguments.command == "plan":  # Hydra writes a file of its own there
            overrides = [*overrides, f"hydra.sweep.dir={nowhere}"]
        sys.argv[1:] = [*overrides, *([] if {"-m", "--multirun"} & set(overrides) else ["-m"])]
        without_launcher()


@entry("config", Config)
def without_launcher(cfg: Config) -> None:
    """What Hydra calls where no launcher takes the members."""
    error = ConfigError(f"choose hydra/launcher={' or hydra/launcher='.join(actions.KINDS)}")
    error.ends_sweep = True
    raise error


def chosen(sweep: Sweep, keys: Sequence[str]) -> list[Member]:
    for key in keys:
        if key not in sweep.members:
            raise UserError(f"{sweep.name} has no member {key}: there are {', '.join(sweep.members)}")
    return [sweep.members[key] for key in keys] if keys else list(sweep.members.values())


def status(arguments: argparse.Namespace, _: list[str]) -> None:
    sweep = find(arguments.sweep)
    found = states.of(sweep, chosen(sweep, arguments.members))
    if arguments.json:
        rows = {}
        for key, state in found.items():
            member = sweep.members[key]
            rows[key] = vars(state) | {"overrides": list(member.overrides), "run_dir": str(member.run_dir)}
        print(json.dumps(rows, indent=1))
        return
    print(states.overview(sweep, found))
    print(f"\n{sweep.name}: {states.summary(found)}")


def show_logs(arguments: argparse.Namespace, _: list[str]) -> None:
    sweep = find(arguments.sweep)
    jobs = sweep.jobs()
    files = []
    for member in chosen(sweep, arguments.members):
        for job in jobs.get(member.key, [])[-1:]:
            files += [local.log_file(sweep, member)] if ":" in job else slurm.log_files(sweep, job)
    files = [str(path) for path in files if path.exists()]
    if not files:
        raise UserError(f"{sweep.name} has printed nothing yet")
    sys.stdout.flush()
    options = ["-F"] if arguments.follow else []
    os.execvp("tail", ["tail", "-n", str(arguments.lines), "-v", *options, "--", *files])


def cancel(arguments: argparse.Namespace, _: list[str]) -> None:
    sweep = find(arguments.sweep)
    found = states.of(sweep, chosen(sweep, arguments.members))
    going = [sweep.members[key] for key, state in found.items() if not state.ended]
    jobs = sweep.jobs()
    slurm.cancel(jobs[m.key][-1] for m in going if ":" not in jobs[m.key][-1])
    local.cancel(sweep, [m for m in going if ":" in jobs[m.key][-1]])
    print(f"cancelled {len(going)} of {len(found)}")


def retry(arguments: argparse.Namespace, _: list[str]) -> None:
    sweep = find(arguments.sweep)
    actions.resubmit(sweep, chosen(sweep, arguments.members))


def sync(arguments: argparse.Namespace, _: list[str]) -> None:
    from bt.engine.tracking import close
    from bt.sync import sync

    sweep, failures = find(arguments.sweep), 0
    for key, state in states.of(sweep, chosen(sweep, arguments.members)).items():
        member = sweep.members[key]
        if not state.ended:
            print(f"{member.key}: its job sends it")
            continue
        if state.word != "finished":  # a job that was killed, or cancelled before it started, has not ended its run
            close(member.run_dir, "FAILED" if state.word == "failed" else "KILLED")
        if not (member.run_dir / "metrics.jsonl").is_file():
            print(f"{member.key}: nothing to send")
        else:
            try:
                print(f"{member.key}: run {sync(member.run_dir)}")
            except UserError as error:
                failures += 1
                print(f"{member.key}: {without_secrets(one_line(error))}", file=sys.stderr)
    if failures:
        raise UserError(f"{failures} could not be sent; the same command tries again")


if __name__ == "__main__":
    main()
