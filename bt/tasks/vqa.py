"""Visual question answering as classification over frequent answers (official compute_vqa)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bt.data.batch import Batch
from bt.data.draft import Draft
from bt.errors import DataError
from bt.models.bridgetower import Need
from bt.models.checks import check_range
from bt.models.heads import ClassifierHead
from bt.tasks.base import Context, Objective, Result, Shared


@dataclass
class VQATargets:
    """Soft targets: scores (questions, answers), the sample's score of every answer of the vocabulary, else 0.

    An answer outside the vocabulary counts for nothing, as in the official tables.
    """

    answers: list[str]
    rows: dict[str, int] = field(init=False)

    def __post_init__(self):
        self.rows = {answer: row for row, answer in enumerate(self.answers)}

    def __call__(self, draft: Draft) -> dict[str, Tensor]:
        scores = torch.zeros(len(draft.entries), len(self.answers))
        for row, entry in enumerate(draft.entries):
            for answer, score in entry["answers"].items():
                if answer in self.rows:
                    scores[row, self.rows[answer]] = score
        return {"scores": scores}


class VQA(Objective):
    """Binary cross-entropy against the soft scores: sum over answers, mean over questions (paper: BCE x 3,129).

    Metric `score`: the soft score of the best-rated answer (official VQAScore), and the same for every question type.
    """

    def __init__(self, context: Context, weight: float = 1.0, hidden_scale: float = 2, layers: int = 2):
        answers = context.labels.get("answers")
        if not answers:
            raise DataError("task vqa: the index of data.dir has no label map 'answers'; convert a VQA source")
        check_range("VQA.hidden_scale", hidden_scale, above=0)
        super().__init__(weight, VQATargets(list(answers)))
        self.answers = list(answers)
        in_width = 2 * context.width
        self.head = ClassifierHead(in_width, int(in_width * hidden_scale), len(answers), layers)

    def count(self, targets: dict[str, Tensor]) -> float:
        return len(targets["scores"])

    def forward(self, shared: Shared, targets: dict[str, Tensor]) -> Result:
        fused = shared.tower.fuse(shared.images, shared.texts, shared.batch.pairs, Need(cls=True))
        logits = self.head(fused.cls).float()
        loss = F.binary_cross_entropy_with_logits(logits, targets["scores"], reduction="sum")
        score = targets["scores"].gather(1, logits.argmax(1, keepdim=True)).squeeze(1)
        metrics = {"score": score}
        if not self.training:
            kinds = [entry.get("type") for entry in shared.batch.entries]
            for kind in sorted({kind for kind in kinds if kind}):
                metrics[f"score_{kind.replace('/', '_')}"] = score[torch.tensor([k == kind for k in kinds])]
        return Result(loss, metrics, {"logits": logits})

    def predictions(self, batch: Batch, result: Result) -> list[dict[str, Any]]:
        """Question id, image key, question, best answer with its probability, true answer and score."""
        probabilities, best = result.outputs["logits"].sigmoid().max(1)
        rows = zip(batch.entries, batch.pairs[:, 0].tolist(), best.tolist(), probabilities.tolist(), strict=True)
        return [
            {
                "question_id": entry["id"],
                "image": batch.keys[image],
                "question": entry["question"],
                "answer": self.answers[answer],
                "probability": round(probability, 4),
                "truth": max(entry["answers"], key=entry["answers"].get, default=None),
                "score": entry["answers"].get(self.answers[answer], 0.0),
            }
            for entry, image, answer, probability in rows
        ]
