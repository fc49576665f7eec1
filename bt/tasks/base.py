"""The shape of a task: objectives (targets, loss, metrics) on one shared encoding of the batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bt.data.batch import Batch, Texts
from bt.data.draft import Draft, Needs
from bt.models.bridgetower import BridgeTower, Encoded
from bt.models.checks import check_range


@dataclass(frozen=True)
class Context:
    """What an objective may know when it is built.

    width: cross-modal width; text_width, image_width: uni-modal widths (ITC reads the raw [CLS]).
    tokenizer: see bt.data.text. labels: label maps of the data set by name, such as {"answers": [...]}.
    """

    width: int
    text_width: int
    image_width: int
    tokenizer: Any
    labels: Mapping[str, list[str]] = field(default_factory=dict)


@dataclass
class Result:
    """What an objective returns for one micro-batch.

    loss: scalar, the *sum* over the terms that `Objective.count` counts, so that a mean over all micro-batches
    and ranks is exact. metrics: name -> values (n,), or (values, weights); means are taken over all of an
    evaluation. outputs: what predictions are made of.
    """

    loss: Tensor
    metrics: dict[str, Tensor | tuple[Tensor, Tensor]] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)


class Shared:
    """The encodings of one batch and the objectives' results, each computed once and only if someone asks for it."""

    def __init__(self, tower: BridgeTower, batch: Batch, objectives: Mapping[str, Objective] | None = None):
        self.tower = tower
        self.batch = batch
        self._objectives = objectives or {}
        self._results: dict[str, Result] = {}

    def result(self, name: str) -> Result:
        """Of the objective of that name; another one can build on it (hard negatives on ITC's similarities)."""
        if name not in self._results:
            self._results[name] = self._objectives[name](self, self.batch.targets[name])
        return self._results[name]

    @cached_property
    def pixels(self) -> Tensor:
        """The images, normalised."""
        return self.tower.vision.normalize(self.batch.images)

    @cached_property
    def images(self) -> Encoded:
        return self.tower.encode_images(self.pixels)

    @property
    def texts(self) -> Encoded:
        return self._texts[None]

    def own_texts(self, objective: Objective) -> Encoded:
        """What the objective's `own_texts` gives, encoded."""
        return self._texts[objective]

    @cached_property
    def _texts(self) -> dict[Objective | None, Encoded]:
        """The batch's texts (None) and the objectives' own, in one pass: products of more rows are faster, and the
        encoder's gradients come into being behind those of all cross-modal passes, which lowers the peak of memory."""
        wanted: dict[Objective | None, Texts] = {}
        if not self._objectives or any(objective.reads_texts for objective in self._objectives.values()):
            wanted[None] = self.batch.texts
        for name, objective in self._objectives.items():
            if (own := objective.own_texts(self.batch.targets[name])) is not None:
                wanted[objective] = own
        if len(wanted) == 1:
            return {key: self.tower.encode_texts(texts) for key, texts in wanted.items()}
        ids, masks = ([getattr(texts, part) for texts in wanted.values()] for part in ("ids", "mask"))
        encoded = self.tower.encode_texts(Texts(torch.cat(ids), torch.cat(masks)))
        return dict(zip(wanted, encoded.split([len(rows) for rows in ids]), strict=True))


class Objective(nn.Module):
    """One loss with its head.

    Class attributes to set: `head_parameters_at_base` (names of own parameters that train at the base learning rate
    instead of the head's), `token_types` (rows of the tower's type table that it needs), `fuses` (False: it does
    without the cross-modal encoder), `tower_parts` (names of the tower's modules that it reads; None: any of them),
    `reads_texts` (False: it does without the batch's texts), `summarises` (True: it has a `summary`). Instance
    attributes: `weight` (times the loss), `needs`, `targets` (called in the loader worker, must be picklable).
    """

    head_parameters_at_base: tuple[str, ...] = ()
    token_types: int = 2
    fuses: bool = True
    reads_texts: bool = True
    tower_parts: tuple[str, ...] | None = None
    summarises: bool = False

    def __init__(self, weight: float, targets: Callable[[Draft], dict[str, Tensor]], needs: Needs | None = None):
        super().__init__()
        check_range(f"{type(self).__name__}.weight", weight, at_least=0)
        self.weight = weight
        self.targets = targets
        self.needs = needs or Needs()

    def check(self, objectives: Mapping[str, Objective]) -> None:
        """Raises ConfigError where it builds on another objective of the task (all by name) that is not there."""

    def count(self, targets: dict[str, Tensor]) -> float:
        """How many terms the mean loss is taken over, from the targets on the CPU."""
        raise NotImplementedError

    def own_texts(self, targets: dict[str, Tensor]) -> Texts | None:
        """Texts that it reads beside or in place of the batch's, such as masked ones; padded to the same length."""
        return None

    def forward(self, shared: Shared, targets: dict[str, Tensor]) -> Result:
        raise NotImplementedError

    def note(self, pairs: int, ranks: int, accumulation: int) -> str | None:
        """What a user should know of this objective at `accumulation` micro-batches of `pairs` pairs on each rank."""
        return None

    def predictions(self, batch: Batch, result: Result) -> list[dict[str, Any]]:
        """One JSON object per prediction of an evaluated batch; none by default."""
        return []

    def summary(self, rows: list[dict[str, Any]]) -> dict[str, float]:
        """Metrics that are no means over samples (a correlation, an F1 score), of the predictions of a whole split."""
        return {}

    def files(self, rows: list[dict[str, Any]], split: str) -> dict[str, Any]:
        """Files to write beside the predictions of a split, such as a server's submission: JSON values by name."""
        return {}

    def start_from(self, heads: Mapping[str, Mapping[str, Tensor]]) -> tuple[str, dict[str, Tensor]] | None:
        """How a new head can start from another one of a checkpoint (tensors by name, of each objective there): the
        other's name, and own tensors by name."""
        return None


@dataclass(frozen=True)
class Measuring:
    """How a split is measured.

    split: its part in the run ("val", "test"), for names. precision: of forward passes. work_dir: where an evaluator
    may keep what it does not want to compute again after an interruption, and intermediate results that outgrow the
    memory; identity: a string that is another one for other weights or data, so that nothing stale is used.
    cache_bytes: how much of the main memory an evaluator may fill with intermediate results.
    """

    split: str
    precision: str = "fp32"
    work_dir: Path | None = None
    identity: str = ""
    cache_bytes: int = 2**32


class Evaluator:
    """A measurement over a whole split that is no mean over its batches, such as the recalls of retrieval.

    Called on every rank with the rank's share of the batches, which can be gone over more than once; returns the same
    metrics by name on all of them.
    """

    def check(self, objectives: Mapping[str, Objective]) -> None:
        """Raises ConfigError where it reads an objective of the task (all by name) that is not there."""

    def __call__(self, model: TaskModel, batches: Iterable[Batch], world: Any, how: Measuring) -> dict[str, float]:
        raise NotImplementedError


class TaskModel(nn.Module):
    """Tower and objectives under one `forward(batch)`, so that a parallel wrapper sees every parameter.

    evaluators: what is measured beside the objectives' own metrics; batch_metrics=False: in place of them.
    """

    def __init__(
        self,
        tower: BridgeTower,
        objectives: Mapping[str, Objective],
        evaluators: Mapping[str, Evaluator] | None = None,
        batch_metrics: bool = True,
    ):
        super().__init__()
        self.tower = tower
        self.objectives = nn.ModuleDict(objectives)
        self.evaluators = dict(evaluators or {})
        self.batch_metrics = batch_metrics
        for part in (*objectives.values(), *self.evaluators.values()):
            part.check(objectives)
        self._freeze_unread()

    def _freeze_unread(self) -> None:
        """Freezes what no objective reads, so that it takes no optimizer state and no exchange between ranks; it stays
        in checkpoints, for the next task."""
        parts = [objective.tower_parts for objective in self.objectives.values()]
        if parts and None not in parts:
            for name, part in self.tower.named_children():
                if not any(name in read for read in parts):
                    part.requires_grad_(False)

    def forward(self, batch: Batch) -> dict[str, Result]:
        shared = Shared(self.tower, batch, self.objectives)
        return {name: shared.result(name) for name in self.objectives}

    def counts(self, batch: Batch) -> Tensor:
        """(objectives,) float64: the number of loss terms of each objective in this batch."""
        return torch.tensor(
            [objective.count(batch.targets[name]) for name, objective in self.objectives.items()], dtype=torch.float64
        )

    def layers_above(self, name: str) -> int:
        """How many layers of its encoder lie above a parameter, for rates that decay by layer."""
        return self.tower.layers_above(name.removeprefix("tower.")) if name.startswith("tower.") else 0

    def parameter_role(self, name: str) -> str:
        """ "base", "cross" or "head": which learning-rate multiplier a parameter takes."""
        if name.startswith("tower."):
            return self.tower.parameter_role(name.removeprefix("tower."))
        _, objective, own = name.split(".", 2)
        return "base" if own in self.objectives[objective].head_parameters_at_base else "head"
