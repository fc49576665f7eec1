"""Evaluates a trained run, or a checkpoint on any task and data.

python -m bt.evaluate run_dir=runs/NAME [split=val] [data.dir=...]
python -m bt.evaluate init_from=PATH task=vqa data=easy_vqa encoder=... [split=val]

With run_dir the run's own configuration holds, and what the command line says is changed in it. Prints a table and
writes evaluation-<split>.json and, where the task makes predictions, predictions-<split>.jsonl: into the run directory
or, if other data or options were asked for, below its evaluations/, so that the run's own results stay.
"""

from __future__ import annotations

from dataclasses import dataclass

from bt.config import Config, entry


@dataclass
class EvaluateConfig(Config):
    """A run's configuration and which split to evaluate."""

    split: str = "test"


@entry("config", EvaluateConfig)
def main(cfg: EvaluateConfig) -> float | None:
    """Returns the task's objective metric."""
    from bt.evaluation import evaluate_run  # after composing, so that --help answers at once

    return evaluate_run(cfg)


if __name__ == "__main__":
    main()
