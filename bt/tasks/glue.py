"""Sentences and pairs of sentences by the text encoder alone, after vision-language pre-training (GLUE; official
run_glue.py)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torchmetrics.functional import pearson_corrcoef, spearman_corrcoef
from torchmetrics.functional.classification import binary_f1_score

from bt.data.batch import Batch
from bt.data.draft import Draft
from bt.data.sources.glue import TASKS
from bt.errors import ConfigError, DataError
from bt.models.checks import check_range
from bt.models.heads import SentenceHead
from bt.tasks.base import Context, Result, Shared
from bt.tasks.classifier import Classifier, describe

# What the official code compares checkpoints by; accuracy for the other tasks, of MNLI's two parts the mean.
SELECTED_BY = {"cola": "matthews", "mrpc": "f1", "qqp": "f1", "stsb": "spearman"}


@dataclass
class ScoreTargets:
    """labels (pairs,) float32: the score that an entry has as `label`, NaN where it has none. Raises DataError."""

    def __call__(self, draft: Draft) -> dict[str, Tensor]:
        labels = [entry.get("label") for entry in draft.entries]
        for entry, label in zip(draft.entries, labels, strict=True):
            if label is not None and (type(label) not in (int, float) or not math.isfinite(label)):
                raise DataError(f"task glue: label {label!r} of entry {entry.get('id')} is not a score")
        return {"labels": torch.tensor([math.nan if label is None else label for label in labels])}


class GLUE(Classifier):
    """transformers' sequence classification: cross-entropy, or for STS-B the squared error of one output, mean over
    samples, by a head on the first token's last state.

    task: which of GLUE's tasks, for its metrics. They are of the whole split: `accuracy`; CoLA `matthews` too, MRPC and
    QQP `f1`; MNLI `accuracy_matched`, `accuracy_mismatched` and their mean as `accuracy`; STS-B only `pearson` and
    `spearman`. `score` is the one that checkpoints are chosen by. What is not defined, such as the correlation of
    predictions that are all the same, is 0.
    dropout: of the head, before both of its linear maps.
    """

    fuses = False
    tower_parts = ("text",)
    summarises = True

    def __init__(
        self,
        context: Context,
        task: Literal["cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte"],
        weight: float = 1.0,
        dropout: float = 0.1,
    ):
        if task not in TASKS:
            raise ConfigError(f"GLUE.task={task}: allowed are {', '.join(TASKS)}")
        check_range("GLUE.dropout", dropout, at_least=0, below=1)
        classes = list((TASKS[task].classes or {}).values())
        found = list(context.labels.get("classes", []))
        if found != classes:
            wanted, there = (", ".join(names[:5]) or "none, but scores" for names in (classes, found))
            raise DataError(f"task glue: the classes of {task} are {wanted}; those of data.dir are {there}")
        super().__init__("glue", classes, weight)
        if not classes:
            self.targets = ScoreTargets()
        self.task = task
        self.head = SentenceHead(context.text_width, max(len(classes), 1), dropout)

    def logits(self, shared: Shared) -> Tensor:
        texts = shared.batch.texts
        cls = shared.tower.text(texts.ids, texts.mask, 1)[-1][:, 0]
        return self.head(cls.index_select(0, shared.batch.pairs[:, 1]))

    def count(self, targets: dict[str, Tensor]) -> float:
        return super().count(targets) if self.classes else (~targets["labels"].isnan()).sum().item()

    def forward(self, shared: Shared, targets: dict[str, Tensor]) -> Result:
        if self.classes:
            result = super().forward(shared, targets)
            return Result(result.loss, {}, result.outputs)
        scores, labels = self.logits(shared).float().squeeze(1), targets["labels"]
        loss = torch.where(labels.isnan(), 0.0, scores - labels.nan_to_num()).square().sum()
        return Result(loss, {}, {"scores": scores})

    def predictions(self, batch: Batch, result: Result) -> list[dict[str, Any]]:
        """The entry's id and texts, part of the split for MNLI; best class with its probability, or score; truth."""
        if self.classes:
            return super().predictions(batch, result)
        found = zip(describe(batch), batch.entries, result.outputs["scores"].tolist(), strict=True)
        return [{**row, "prediction": score, "truth": entry.get("label")} for row, entry, score in found]

    def summary(self, rows: list[dict[str, Any]]) -> dict[str, float]:
        rows = [row for row in rows if row["truth"] is not None]
        if not rows:
            return {}
        found = self._correlations(rows) if self.task == "stsb" else self._shares(rows)
        return found | {"score": found[SELECTED_BY.get(self.task, "accuracy")]}

    def _correlations(self, rows: list[dict[str, Any]]) -> dict[str, float]:
        scores, truth = (
            torch.tensor([row[key] for row in rows], dtype=torch.float64) for key in ("prediction", "truth")
        )
        if len(scores.unique()) < 2 or len(truth.unique()) < 2:
            return {"pearson": 0.0, "spearman": 0.0}
        return {
            "pearson": pearson_corrcoef(scores, truth).item(),
            "spearman": spearman_corrcoef(scores, truth).item(),
        }

    def _shares(self, rows: list[dict[str, Any]]) -> dict[str, float]:
        parts: dict[str, list[bool]] = {}
        for row in rows:
            parts.setdefault(row.get("part", ""), []).append(row["prediction"] == row["truth"])
        accuracies = {part: sum(right) / len(right) for part, right in parts.items()}
        found = {f"accuracy_{part}": share for part, share in accuracies.items() if part}
        found["accuracy"] = sum(accuracies.values()) / len(accuracies)
        chosen, truth = (torch.tensor([row[key] == self.classes[1] for row in rows]) for key in ("prediction", "truth"))
        if self.task == "cola":
            found["matthews"] = matthews(chosen, truth)
        elif self.task in ("mrpc", "qqp"):
            found["f1"] = binary_f1_score(chosen.int(), truth.int()).item()
        return found


def matthews(chosen: Tensor, truth: Tensor) -> float:
    """Matthews' correlation of two bool tensors, 0 where one of them is all the same, as in scikit-learn: torchmetrics'
    is some other small number there, or 1, and many a CoLA run begins with predictions that are all the same."""
    chosen, truth = chosen.double(), truth.double()
    spread = (chosen.mean() * (1 - chosen.mean()) * truth.mean() * (1 - truth.mean())).sqrt().item()
    return ((chosen * truth).mean() - chosen.mean() * truth.mean()).item() / spread if spread else 0.0
