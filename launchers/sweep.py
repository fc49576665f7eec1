"""A sweep on disk: sweep.yaml says what it is, jobs.json what was submitted, and each member has its run directory."""

from __future__ import annotations

import copy
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from bt.config import Config, check_config, config_hash, prepare_run_dir
from bt.config.entry import one_line
from bt.config.explain import explain
from bt.config.record import record, to_config
from bt.engine.mlflow_store import Cursor, locked
from bt.errors import ConfigError, UserError

SPEC, JOBS = "sweep.yaml", "jobs.json"


@dataclass(frozen=True)
class Member:
    """One run of a sweep. key: the first digits of its configuration's hash; run_dir: absolute."""

    key: str
    overrides: tuple[str, ...]
    run_dir: Path

    label: str = ""  # the overrides that are not the same for all


@dataclass
class Sweep:
    """dir: the sweep's directory. cwd: the directory that its commands ran in, which relative paths start from.

    kind: "slurm" or "local". launcher: its parameters, with `${oc.env:...}` as written.
    """

    dir: Path
    cwd: Path
    kind: str
    launcher: dict[str, Any]
    members: dict[str, Member] = field(default_factory=dict)
    commands: list[list[str]] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.dir.name

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Two commands on one sweep wait for each other, so that no member is submitted twice."""
        self.dir.mkdir(parents=True, exist_ok=True)
        with locked(self.dir / ".lock"):
            yield

    def write(self) -> None:
        content = {
            "name": self.name,
            "cwd": str(self.cwd),
            "kind": self.kind,
            "launcher": self.launcher,
            "commands": self.commands,
            "members": {
                key: {
                    "label": member.label,
                    "overrides": list(member.overrides),
                    "run_dir": os.path.relpath(member.run_dir, self.dir),
                }
                for key, member in self.members.items()
            },
        }
        # No object of OmegaConf: it would take the unresolved values for its own.
        _replace(self.dir / SPEC, OmegaConf.to_yaml(OmegaConf.create(content)))

    def jobs(self) -> dict[str, list[str]]:
        """Each member's jobs, the newest last."""
        path = self.dir / JOBS
        return json.loads(path.read_text()) if path.exists() else {}

    def add_jobs(self, jobs: Mapping[str, str]) -> None:
        known = self.jobs()
        for key, job in jobs.items():
            known.setdefault(key, []).append(job)
        _replace(self.dir / JOBS, json.dumps(known, indent=1) + "\n")

    def params(self) -> dict[str, Any]:
        """The launcher's parameters with values from the environment."""
        return OmegaConf.to_container(OmegaConf.create(self.launcher), resolve=True)


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}-{os.getpid()}")
    temporary.write_text(text)
    temporary.replace(path)


def find(name: str) -> Sweep:
    """The sweep of a name (sweeps/NAME) or directory."""
    for directory in (Path(name), Path("sweeps", name)):
        if (directory / SPEC).is_file():
            return read(directory)
    known = sorted(path.parent.name for path in Path("sweeps").glob(f"*/{SPEC}"))
    there = f"there are: {', '.join(known)}" if known else "there are none below sweeps/"
    raise UserError(f"no sweep {name}; {there}")


def read(directory: Path) -> Sweep:
    directory = Path(directory).resolve()
    try:
        spec = OmegaConf.to_container(OmegaConf.load(directory / SPEC), resolve=False)
        members = {
            key: Member(key, tuple(node["overrides"]), (directory / node["run_dir"]).resolve(), node["label"])
            for key, node in spec["members"].items()
        }
        return Sweep(directory, Path(spec["cwd"]), spec["kind"], spec["launcher"], members, spec["commands"])
    except Exception as error:
        raise UserError(f"{directory / SPEC} cannot be read: {one_line(error)}") from error


def compose_members(loader: Any, config: DictConfig, job_overrides: Sequence[Sequence[str]]) -> dict[str, Config]:
    """{label: configuration} of a multirun's members, each checked; one that is wrong refuses them all.

    loader, config: of Hydra, as its launchers get them.
    """
    from hydra.core.hydra_config import HydraConfig

    found: dict[str, Config] = {}
    for label, overrides in zip(short_labels(job_overrides), job_overrides, strict=True):
        try:
            composed = loader.load_sweep_config(config, list(overrides))
            HydraConfig.instance().set_config(copy.deepcopy(composed))  # for ${hydra:...}
            with read_write(composed), open_dict(composed):
                del composed["hydra"]
            cfg = to_config(composed)
            check_config(cfg)
        except UserError as error:
            raise ConfigError(f"member {label}: {one_line(error)}; nothing was submitted") from error
        except Exception as error:
            raise ConfigError(f"member {label}: {explain(error, list(overrides))}; nothing was submitted") from error
        found[label] = cfg
    return found


def short_labels(overrides: Sequence[Sequence[str]]) -> list[str]:
    """Of each member what its overrides have that not all others have."""
    common = set.intersection(*map(set, overrides)) if overrides else set()
    return [" ".join(word for word in words if word not in common) or "-" for words in overrides]


def add_members(sweep: Sweep, configs: Mapping[str, Config], overrides: Sequence[Sequence[str]]) -> list[Member]:
    """Gives each configuration its run directory with config.yaml, and makes it a member; in order.

    What a job runs is what is written here: editing conf/ while it waits changes nothing.
    """
    made: list[Member] = []
    for (label, cfg), words in zip(configs.items(), overrides, strict=True):
        key = config_hash(cfg)[:8]
        run_dir = Path(cfg.run_dir).expanduser().resolve() if cfg.run_dir else sweep.dir / key
        twin = next((member for member in made if member.key == key or member.run_dir == run_dir), None)
        if twin:
            raise ConfigError(f"members {twin.label} and {label} are the same run; nothing was submitted")
        made.append(Member(key, tuple(words), run_dir, label))
    for cfg, member in zip(configs.values(), made, strict=True):
        cfg.run_dir = cfg.recorded["run_dir"] = str(member.run_dir)
        prepare_run_dir(cfg)
        Cursor(member.run_dir).set(sweep=os.path.relpath(sweep.dir, member.run_dir))
    sweep.members |= {member.key: member for member in made}
    return made


def from_hydra(kind: str, config: DictConfig) -> Sweep:
    """The sweep that a multirun is about, as far as it is on disk, with the command's launcher."""
    directory = Path(config.hydra.sweep.dir).resolve()
    known = read(directory) if (directory / SPEC).exists() else None
    launcher = {key: value for key, value in record(config, "hydra.launcher").items() if key != "_target_"}
    # Unresolved: an entry that was read from the node itself would be the value of its ${oc.env:...}.
    words = OmegaConf.to_container(config.hydra.overrides, resolve=False)
    command = [*words["hydra"], *words["task"]]
    sweep = Sweep(directory, Path.cwd(), kind, launcher)
    if known:
        sweep.members, sweep.commands = known.members, known.commands
    if not sweep.commands or sweep.commands[-1] != command:
        sweep.commands.append(command)
    return sweep


def is_finished(member: Member) -> bool:
    return (member.run_dir / "report.json").exists()


def ago(moment: float) -> float:
    """Seconds since a moment."""
    return time.time() - moment
