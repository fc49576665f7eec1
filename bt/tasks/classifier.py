"""What tasks of labelled samples share: class targets, cross-entropy, accuracy, predictions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bt.data.batch import Batch
from bt.data.draft import Draft
from bt.errors import DataError
from bt.tasks.base import Context, Objective, Result, Shared

NO_LABEL = -100


@dataclass
class ClassTargets:
    """labels (pairs,) int64: the class number that an entry has as `label`, NO_LABEL where it has none.

    Raises DataError for anything else than the number of a class.
    """

    task: str
    classes: list[str]

    def __call__(self, draft: Draft) -> dict[str, Tensor]:
        labels = [self._label(entry, pair) for entry, pair in zip(draft.entries, draft.pair_ids, strict=True)]
        return {"labels": torch.tensor(labels, dtype=torch.int64)}

    def _label(self, entry: dict[str, Any], pair: int) -> int:
        label = entry.get("label")
        if label is None:
            return NO_LABEL
        if type(label) is int and 0 <= label < len(self.classes):
            return label
        shown = ", ".join(self.classes[:3]) + (", ..." if len(self.classes) > 3 else "")
        raise DataError(
            f"task {self.task}: label {label!r} of entry {entry.get('id', f'number {pair}')} is not the number of a "
            f"class: allowed are 0 to {len(self.classes) - 1} ({shown})"
        )


def class_names(context: Context, task: str) -> list[str]:
    """The data set's classes. Raises DataError if its index has none."""
    classes = context.labels.get("classes")
    if not classes:
        raise DataError(f"task {task}: the index of data.dir has no label map 'classes'; convert a source that has one")
    return list(classes)


def describe(batch: Batch) -> list[dict[str, Any]]:
    """What predictions say of each pair before the prediction itself: the entry's id and texts, the image's key."""
    kept = ("id", "part", "text", "text_pair")
    rows = [{key: entry[key] for key in kept if key in entry} for entry in batch.entries]
    for row, image in zip(rows, batch.pairs[:, 0].tolist(), strict=True):
        if image >= 0:
            row["image"] = batch.keys[image]
    return rows


class Classifier(Objective):
    """Cross-entropy over `classes`, mean over the pairs that have a label. Metric `accuracy`, of evaluations.

    A subclass gives `logits`.
    """

    def __init__(self, task: str, classes: list[str], weight: float):
        super().__init__(weight, ClassTargets(task, classes))
        self.classes = classes

    def logits(self, shared: Shared) -> Tensor:
        """(pairs, classes)."""
        raise NotImplementedError

    def count(self, targets: dict[str, Tensor]) -> float:
        return (targets["labels"] != NO_LABEL).sum().item()

    def forward(self, shared: Shared, targets: dict[str, Tensor]) -> Result:
        logits, labels = self.logits(shared).float(), targets["labels"]
        loss = F.cross_entropy(logits, labels, ignore_index=NO_LABEL, reduction="sum")
        metrics = {}
        if not self.training:  # choosing rows makes the host wait for the device
            metrics["accuracy"] = (logits.argmax(1) == labels)[labels != NO_LABEL].float()
        return Result(loss, metrics, {"logits": logits})

    def predictions(self, batch: Batch, result: Result) -> list[dict[str, Any]]:
        """Id, texts and image key, as far as there are such; best class with its probability, true class."""
        probabilities, best = result.outputs["logits"].softmax(1).max(1)
        found = zip(describe(batch), batch.entries, best.tolist(), probabilities.tolist(), strict=True)
        return [
            {
                **row,
                "prediction": self.classes[number],
                "probability": round(probability, 4),
                "truth": None if entry.get("label") is None else self.classes[entry["label"]],
            }
            for row, entry, number, probability in found
        ]
