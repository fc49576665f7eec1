"""What of a configuration is written, hashed and compared, and where a run's directory is."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from bt.config.explain import unknown_keys
from bt.config.schema import Config
from bt.errors import ConfigError

# A run may be continued with other values of these: they decide how fast, where and how loudly it runs, not what
# it computes. An entry that ends in "." covers everything below it.
MAY_CHANGE = (
    "run_dir",
    "plugins",
    "debug",
    "data.samples",  # a name for data.dir, which is compared
    "data.workers",
    "data.prefetch",
    "data.cache_dir",
    "trainer.threads",
    "trainer.device",
    "trainer.parallel",
    "trainer.timeout_minutes",
    "trainer.log_every",
    "trainer.profile",
    "checkpoint.every_steps",
    "checkpoint.every_minutes",
    "checkpoint.keep",
    "checkpoint.background",
    "tracking.",
    # Only what is measured after the last step: with false, a run whose test split turns out to be missing can still
    # end with what it has. So runs that differ in this alone share a default directory.
    "eval.test",
)
ABSENT = "(absent)"
_SECRET = "<from the environment>"


def record(cfg: DictConfig, part: str | None = None) -> dict[str, Any]:
    """`cfg` as a plain dictionary with every interpolation resolved, but `${oc.env:...}` and what depends on it.

    Values from the environment may be secrets, so they stay as they were written. part: a node of `cfg`, such as
    "hydra.launcher", to record alone.
    """
    raw = OmegaConf.to_container(cfg, resolve=False)
    masked = OmegaConf.create(_map_leaves(raw, lambda v: _SECRET if isinstance(v, str) and "oc.env:" in v else v))
    if part:
        masked = OmegaConf.select(masked, part)
        for key in part.split("."):
            raw = raw[key]
    resolved = OmegaConf.to_container(masked, resolve=True)
    return _restore(raw, resolved)


def _map_leaves(node: Any, function: Any) -> Any:
    if isinstance(node, dict):
        return {k: _map_leaves(v, function) for k, v in node.items()}
    if isinstance(node, list):
        return [_map_leaves(v, function) for v in node]
    return function(node)


def _restore(raw: Any, resolved: Any) -> Any:
    if isinstance(raw, dict) and isinstance(resolved, dict):
        return {k: _restore(raw[k], v) for k, v in resolved.items()}
    if isinstance(raw, list) and isinstance(resolved, list):
        return [_restore(r, v) for r, v in zip(raw, resolved, strict=True)]
    return raw if _SECRET in str(resolved) else resolved


def recorded(cfg: Config) -> dict[str, Any]:
    """The dictionary that stands for `cfg` in files: as composed, or of the object where there was no composing."""
    return copy.deepcopy(cfg.recorded) if cfg.recorded is not None else dataclasses.asdict(cfg)


def flatten(node: Any, prefix: str = "") -> dict[str, Any]:
    """{"optimizer.lr": 1e-5, ...}; lists and empty dictionaries are values."""
    if not isinstance(node, dict) or (not node and prefix):
        return {prefix.removesuffix("."): node}
    flat: dict[str, Any] = {}
    for key, value in node.items():
        flat |= flatten(value, f"{prefix}{key}.")
    return flat


def what_matters(cfg: Config | dict[str, Any]) -> dict[str, Any]:
    """The flat configuration without the keys that may change when a run is continued."""
    flat = flatten(recorded(cfg) if not isinstance(cfg, dict) else cfg)
    return {
        key: value
        for key, value in sorted(flat.items())
        if not any(key == free or (free.endswith(".") and key.startswith(free)) for free in MAY_CHANGE)
    }


def config_hash(cfg: Config | dict[str, Any]) -> str:
    """Hexadecimal digest of what decides the result of a run, equal on every rank and machine."""
    text = json.dumps(what_matters(cfg), sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def diff_configs(old: Config | dict[str, Any], new: Config | dict[str, Any]) -> list[str]:
    """ "key: old -> new" for every key that matters and differs."""
    before, after = what_matters(old), what_matters(new)
    keys = sorted(set(before) | set(after))
    return [
        f"{key}: {before.get(key, ABSENT)} -> {after.get(key, ABSENT)}"
        for key in keys
        if before.get(key, ABSENT) != after.get(key, ABSENT)
    ]


# What the outputs depend on though no tensor's shape shows it, and what of it is of training alone.
_MEANING = re.compile(
    r"(cross|bridge|encoder\.vision\.architecture|encoder\.text\.config)\..+|task\.objectives\.\w+\.norm_eps"
)
_TRAINING = ("dropout", "dropout_prob", "init_std", "noise", "temperature")


def other_settings(weights: Path, cfg: Config) -> list[str]:
    """ "key: there -> here" for what the weights were trained with and `cfg` has otherwise, as an epsilon or the number
    of heads; a key that only one of them has, or sets to null, is not compared."""
    places = [place for place in (weights.parent, weights.parent.parent.parent) if (place / "config.yaml").is_file()]
    if not places:
        return []
    there, here = flatten(read_recorded(places[0])), flatten(recorded(cfg))
    return [
        f"{key}: {there[key]} -> {value}"
        for key, value in here.items()
        if _MEANING.fullmatch(key)
        and not key.endswith(_TRAINING)
        and value is not None
        and there.get(key) is not None
        and there[key] != value
    ]


def resolve_run_dir(cfg: Config) -> Path:
    """The run's directory: as given, or named by the configuration's hash, so that the same command finds it again."""
    if cfg.run_dir:
        return Path(cfg.run_dir).expanduser()
    digest, sweep_dir = config_hash(cfg)[:8], resolve_sweep_dir()
    return sweep_dir / digest if sweep_dir else Path("runs", f"{cfg.name}-{digest}")


def resolve_sweep_dir() -> Path | None:
    """The directory of the multirun that this process is in the middle of; None outside of one."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    if HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
        return Path(HydraConfig.get().sweep.dir)
    return None


def prepare_run_dir(cfg: Config) -> Path:
    """Makes the run's directory and writes config.yaml into it, or checks the one that is there.

    Raises ConfigError where it cannot be written, or holds a run of another configuration (names the keys).
    """
    run_dir = resolve_run_dir(cfg)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        probe = run_dir / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
        if (run_dir / "config.yaml").exists():
            differences = diff_configs(read_recorded(run_dir), cfg)
            if differences:
                raise ConfigError(f"run_dir={run_dir} holds a run of another configuration: {'; '.join(differences)}")
        else:
            write_config(cfg, run_dir)
    except OSError as error:
        raise ConfigError(f"run_dir={run_dir} cannot be written: {error.strerror}") from error
    return run_dir


def write_config(cfg: Config, run_dir: Path) -> None:
    """Writes run_dir/config.yaml, whole or not at all."""
    temporary = run_dir / f".config.yaml-{os.getpid()}"
    temporary.write_text(config_text(cfg))
    temporary.replace(run_dir / "config.yaml")


def config_text(cfg: Config) -> str:
    """The recorded configuration as YAML."""
    return OmegaConf.to_yaml(OmegaConf.create(recorded(cfg)))


def read_recorded(run_dir: Path) -> dict[str, Any]:
    """The dictionary in run_dir/config.yaml, with `${oc.env:...}` unresolved."""
    path = Path(run_dir) / "config.yaml"
    try:
        node = OmegaConf.load(path)
        return OmegaConf.to_container(node, resolve=False)
    except FileNotFoundError as error:
        raise ConfigError(f"{run_dir} is not a run directory: it has no config.yaml") from error
    except Exception as error:
        raise ConfigError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error


def read_config(run_dir: Path, schema: type[Config] = Config) -> Config:
    """The configuration of a run, checked against the schema."""
    return from_recorded(read_recorded(run_dir), f"{run_dir}/config.yaml", schema)


def from_recorded(stored: dict[str, Any], where: str, schema: type[Config] = Config) -> Config:
    """The configuration of a recorded dictionary; ConfigError begins with `where` it is from."""
    try:
        merged = OmegaConf.merge(OmegaConf.structured(schema), stored)
        return to_config(merged)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{where}: {str(error).splitlines()[0]}") from error


def to_config(node: DictConfig) -> Any:
    """The dataclass object of a composed configuration, with what is to be recorded attached."""
    if extra := unknown_keys(node):
        raise ConfigError(extra)
    missing = sorted(OmegaConf.missing_keys(node))
    if missing:
        raise ConfigError(f"{', '.join(missing)} must be given")
    cfg = OmegaConf.to_object(node)
    cfg.recorded = record(node)
    return cfg
