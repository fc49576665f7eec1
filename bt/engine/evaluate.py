"""Evaluation of a model on a split: means over batches, figures over all predictions, and whole-split measurements."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import torch
from torch import nn

from bt.data.batch import Batch
from bt.engine.distributed import World, gather_objects
from bt.engine.metrics import Means
from bt.engine.parallel import gathered
from bt.engine.precision import autocast
from bt.tasks.base import Measuring


@dataclass
class Measured:
    """metrics: {"task/split/metric": value}. rows: predictions by objective, in the split's order, of all ranks.
    skipped: images that were left out because they were bad, by reason, of all ranks.
    """

    metrics: dict[str, float] = field(default_factory=dict)
    rows: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    skipped: Counter = field(default_factory=Counter)


@torch.no_grad()
def evaluate(
    model: nn.Module, batches: Iterable[Batch], world: World, how: Measuring, *, predictions: bool = False
) -> Measured:
    """Measures `model` (bt.tasks.base.TaskModel) on a split; every rank calls it with its share of the batches.

    predictions: also of the objectives whose figures do not need them. Evaluators go over the batches once more.
    """
    model.eval()
    measured, batches = Measured(), Watched(batches)
    with gathered(model):
        if model.batch_metrics:
            measured = _over_batches(model, batches, world, how, predictions)
        for name, evaluator in model.evaluators.items():
            found = evaluator(model, batches, world, how)
            measured.metrics |= {f"{name}/{how.split}/{metric}": value for metric, value in found.items()}
    measured.skipped = sum(gather_objects(batches.skipped), Counter())
    return measured


class Watched:
    """Batches, and what is left out of them, which counts once however often an evaluator goes over them."""

    def __init__(self, batches: Iterable[Batch]):
        self.batches = batches
        self.skipped: Counter = Counter()

    def __iter__(self) -> Iterator[Batch]:
        passed: Counter = Counter()
        for batch in self.batches:
            passed.update(batch.skipped)
            self.skipped |= passed
            yield batch

    def __len__(self) -> int:
        return len(self.batches)


def _over_batches(model: nn.Module, batches: Iterable[Batch], world: World, how: Measuring, wanted: bool) -> Measured:
    means = Means(world.device)
    made: dict[str, list[list[dict[str, Any]]]] = {
        name: [] for name, objective in model.objectives.items() if wanted or objective.summarises
    }
    for batch in batches:
        with autocast(world.device, how.precision):
            results = model(batch.to(world.device))
        for name, result in results.items():
            objective = model.objectives[name]
            if count := objective.count(batch.targets[name]):
                means.add(f"{name}/{how.split}/loss", result.loss / count, count)
            for metric, values in result.metrics.items():
                values, weights = values if isinstance(values, tuple) else (values, 1.0)
                means.add(f"{name}/{how.split}/{metric}", values, weights)
            if name in made:
                made[name].append(objective.predictions(batch, result))
    metrics = means.compute()
    rows = {name: _in_order(parts) for name, parts in made.items()}
    for name, found in rows.items():
        summary = model.objectives[name].summary(found) if found else {}
        metrics |= {f"{name}/{how.split}/{metric}": value for metric, value in summary.items()}
    return Measured(metrics, rows)


def _in_order(parts: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The predictions of all ranks in the split's order: rank r had the batches r, r + ranks, ..."""
    rounds = zip_longest(*gather_objects(parts), fillvalue=[])
    return [row for batches_of_round in rounds for batch in batches_of_round for row in batch]
