"""A training run: from its configuration to its report, or to a word on how it ended."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

from bt.config import Config, one_line, prepare_run_dir, resolve_run_dir
from bt.engine import distributed, heartbeat, watch
from bt.engine.distributed import World
from bt.errors import Stopped, UserError
from bt.training import Training

log = logging.getLogger("bt")


def train(cfg: Config, before_exit: Callable[[str], None] = lambda reason: None) -> float | None:
    """Runs the experiment, or says that it is finished; returns the objective metric of its best checkpoint.

    before_exit: see bt.engine.watch; the last to be called.
    """
    with distributed.joined(cfg.trainer.device, cfg.trainer.timeout_minutes) as world:
        run_dir = resolve_run_dir(cfg)
        finished = run_dir / "report.json"
        if (run_dir / "config.yaml").exists():
            prepare_run_dir(cfg)  # refuses another configuration, before anything heavy
        if finished.exists():
            metrics = json.loads(finished.read_text())["metrics"]
            if world.main:
                log.info(f"already finished: {finished}")
            return metrics.get(cfg.task.metric)
        watch.before_exit(before_exit)
        return run_to_its_end(cfg, world, run_dir)


def run_to_its_end(cfg: Config, world: World, run_dir: Path) -> float | None:
    """Trains, and leaves in the run's heartbeat how it ended."""
    watch.before_exit(lambda reason: heartbeat.write_end(run_dir, "failed", reason))
    try:
        with watch.explained(), no_space_explained(run_dir):
            value = Training(cfg, world).run()
    except BaseException as error:
        stopped = isinstance(error, Stopped | KeyboardInterrupt)
        heartbeat.write_end(run_dir, "stopped" if stopped else "failed", one_line(error))
        raise
    if world.main:
        heartbeat.write_end(run_dir, "finished")
    return value


@contextlib.contextmanager
def no_space_explained(run_dir: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise UserError(f"no space left on the disk of {error.filename or run_dir}") from error
