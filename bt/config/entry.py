"""The wrapper of every Hydra program of `bt`: compose, check, call, and one line for what the user did wrong."""

from __future__ import annotations

import functools
import logging
import os
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from tqdm import tqdm

from bt.config.explain import explain
from bt.config.record import to_config
from bt.config.schema import Config, check_run, check_values
from bt.config.targets import add_plugins, check_model_targets
from bt.errors import ConfigError, UserError


def conf_dir() -> Path:
    """The folder of configuration groups: that of a wheel, which holds its own, or that of the clone around `bt`."""
    package = Path(__file__).resolve().parents[1]
    own = package / "conf"
    return own if own.is_dir() else package.parent / "conf"


CONF_DIR = str(conf_dir())

# composed: until the first job starts, whatever goes wrong is in the command line or the configuration files.
# debug: as composed, so that it counts however it was written.
_progress = {"composed": False, "debug": False}

# In one process a member of a multirun that fails must not end the others, and Hydra reports only the first.
_failed_members: list[str] = []


def entry(
    config_name: str = "config", schema: type = Config, config_dir: str = CONF_DIR
) -> Callable[[Callable[[Any], Any]], Callable[[], None]]:
    """Decorates `main(cfg)` of a program whose primary configuration is conf/<config_name>.yaml.

    schema: dataclass of the whole configuration. It is in Hydra's store as `schema` (Config and its subclasses,
    which add options to it) or `<config_name>_schema`, for the top of the defaults list. A subclass of Config is
    checked as a run's configuration, any other by its fields' limits and its own `check()` where it has one.
    The program exits with 0 only if `main` returned; a user's mistake is one line on standard error and status 1.
    """

    def decorate(main: Callable[[Any], Any]) -> Callable[[], None]:
        @functools.wraps(main)
        def task(node: DictConfig) -> Any:
            _progress["composed"] = True
            try:
                return main(_checked(node))
            except UserError as error:
                if HydraConfig.get().mode == RunMode.MULTIRUN and not error.ends_sweep:
                    overrides = " ".join(HydraConfig.get().overrides.task)
                    _failed_members.append(overrides)
                    if _progress["debug"]:
                        traceback.print_exception(error)
                    print(f"error in member {overrides}: {one_line(error)}", file=sys.stderr, flush=True)
                    raise
                raise _Stop(error) from error

        @functools.wraps(main)
        def program() -> None:
            register(config_name, schema)
            _run(hydra.main(config_path=config_dir, config_name=config_name, version_base="1.3")(task))

        return program

    return decorate


def register(config_name: str, schema: type) -> None:
    """Puts a dataclass into Hydra's store under the name that conf/<config_name>.yaml lists first."""
    ConfigStore.instance().store(name="schema" if issubclass(schema, Config) else f"{config_name}_schema", node=schema)


def compose_run(*overrides: str) -> Config:
    """The checked configuration of a run, as `python -m bt.train OVERRIDES` gets it, where there is no such program.

    Raises ConfigError, in one line.
    """
    try:
        with hydra.initialize_config_dir(CONF_DIR, version_base="1.3"):
            node = hydra.compose("config", list(overrides))
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(explain(error, overrides)) from error
    return _checked(node)


class _Stop(BaseException):
    """Carries a user's mistake through Hydra, which would print lines of its own for an Exception."""


def _checked(node: DictConfig) -> Any:
    try:
        _progress["debug"] |= bool(node.get("debug"))
        cfg = to_config(node)
    except OmegaConfBaseException as error:
        raise ConfigError(explain(error)) from error
    check_config(cfg)
    return cfg


def check_config(cfg: Any) -> None:
    """Every check that needs no data: limits, what goes together, and classes with their arguments.

    Puts the configuration's plug-ins on sys.path. Raises ConfigError, which names the key.
    """
    check_values(cfg)
    add_plugins(getattr(cfg, "plugins", []))
    if isinstance(cfg, Config):
        check_run(cfg)
        check_model_targets(cfg)
    if hasattr(cfg, "check"):
        cfg.check()


def _run(program: Callable[[], None]) -> None:
    # Without this Hydra prints errors itself, in many lines, and exits.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    # What fails while it is composed has no other word on debug than the command line.
    _progress.update(composed=False, debug="debug=true" in [argument.lower() for argument in sys.argv[1:]])
    _failed_members.clear()
    log_to_stdout()
    try:
        _check_sweep(sys.argv[1:])
        sys.argv[1:] = _options_first(sys.argv[1:])
        program()
    except _Stop as stop:
        _fail(stop.__cause__)
    except UserError as error:
        if _failed_members:
            _end(UserError(f"{len(_failed_members)} of the sweep's members failed"))
        _fail(error)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if _progress["composed"]:
            raise
        _fail(ConfigError(explain(error, sys.argv[1:])), error)


def _fail(error: BaseException, shown: BaseException | None = None) -> None:
    if _progress["debug"]:
        traceback.print_exception(shown or error)
    _end(error)


def _end(error: BaseException) -> None:
    print(f"error: {one_line(error)}", file=sys.stderr, flush=True)
    sys.exit(1)


def one_line(error: BaseException) -> str:
    """The message on one line, whatever it holds."""
    return re.sub(r"\s*\n\s*", "; ", str(error).strip()) or type(error).__name__


def _check_sweep(arguments: list[str]) -> None:
    """A list of sweeps runs none of them in Hydra, without a word."""
    for argument in arguments:
        if re.match(r"\+{0,2}sweep=.*,", argument):
            raise ConfigError(f"{argument}: one sweep at a time; run the command once for each")


def _options_first(arguments: list[str]) -> list[str]:
    """`key=value -m key=value` as `-m key=value key=value`, because argparse takes overrides in one piece only."""
    with_value = {s for action in get_args_parser()._actions if action.nargs != 0 for s in action.option_strings}
    options: list[str] = []
    overrides: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        if not argument.startswith("-"):
            overrides.append(argument)
            continue
        options.append(argument)
        if argument in with_value and (value := next(rest, None)) is not None:
            options.append(value)
    return options + overrides


class _Lines(logging.Handler):
    """Log lines on standard output, which leave a progress bar whole."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stdout)
        sys.stdout.flush()


def log_to_stdout() -> None:
    """`bt`'s own log lines are shown as they are; other libraries speak from warnings on."""
    logger = logging.getLogger("bt")
    if not any(isinstance(handler, _Lines) for handler in logger.handlers):
        logger.addHandler(_Lines())
        logger.setLevel(logging.INFO)
        logger.propagate = False


# What composes conf/config.yaml without a program around it, such as a notebook, finds the schema too.
register("config", Config)
