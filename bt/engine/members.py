"""Which members a sweep has, finished or not, so that a table of its runs can say which are missing.

Two files of a sweep's directory know: sweep.yaml of `launchers`, and Hydra's own multirun.yaml.
"""

from __future__ import annotations

from pathlib import Path

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

SUBMITTED, GRID = "sweep.yaml", "multirun.yaml"


def members_of(sweep_dir: Path) -> list[str] | None:
    """The label of each member, in order; None where another sweeper than Hydra's own decides as it goes."""
    if (submitted := Path(sweep_dir) / SUBMITTED).is_file():
        return [member.label for member in OmegaConf.load(submitted).members.values()]
    if not (grid := Path(sweep_dir) / GRID).is_file():
        return None
    config = OmegaConf.load(grid)
    if not config.hydra.sweeper._target_.endswith("BasicSweeper"):
        return None
    return labels_of_grid(config)


def labels_of_grid(config: DictConfig) -> list[str]:
    """Of a multirun's configuration (of Hydra): the settings of each job that are swept, as "bridge=add seed=0"."""
    raw = OmegaConf.to_container(config.hydra, resolve=False)
    params = raw["sweeper"].get("params") or {}
    words = [f"{key}={value}" for key, value in params.items()] + list(raw["overrides"]["task"])
    overrides = OverridesParser.create().parse_overrides(words)
    swept = set(params) | {override.key_or_group for override in overrides if override.is_sweep_override()}
    jobs = BasicSweeper.split_arguments(overrides, None)[0]
    return [" ".join(word for word in job if word.split("=")[0].lstrip("+") in swept) for job in jobs]


def member_of_job() -> str | None:
    """The label of the member that this process runs for Hydra; None outside of a multirun."""
    from hydra.core.hydra_config import HydraConfig

    if not HydraConfig.initialized() or HydraConfig.get().mode is None or HydraConfig.get().mode.name != "MULTIRUN":
        return None
    config = HydraConfig.get()
    found = members_of(Path(config.sweep.dir))
    number = int(config.job.num)
    return found[number] if found and number < len(found) else " ".join(config.overrides.task)


def submitted_label(run_dir: Path, sweep_dir: Path) -> str | None:
    """The label of a member that `launchers` has submitted, by its run directory."""
    path = Path(sweep_dir) / SUBMITTED
    if not path.is_file():
        return None
    for member in OmegaConf.load(path).members.values():
        if (Path(sweep_dir) / member.run_dir).resolve() == Path(run_dir).resolve():
            return str(member.label)
    return None
