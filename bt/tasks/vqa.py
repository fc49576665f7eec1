"""Visual question answering as classification over frequent answers (official compute_vqa)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bt.data.answers import official_accuracy
from bt.data.batch import Batch
from bt.data.draft import Draft
from bt.errors import DataError
from bt.models.bridgetower import Need
from bt.models.checks import check_range
from bt.models.heads import ClassifierHead
from bt.tasks.base import Context, Objective, Result, Shared


@dataclass
class VQATargets:
    """Soft targets: scores (questions, answers), the sample's score of every answer of the vocabulary, else 0; answered
    (questions,) bool, False where the sample has no answer.

    An answer outside the vocabulary counts for nothing, as in the official tables: alone, it makes a question that
    nothing answers rightly.
    """

    answers: list[str]
    rows: dict[str, int] = field(init=False)

    def __post_init__(self):
        self.rows = {answer: row for row, answer in enumerate(self.answers)}

    def __call__(self, draft: Draft) -> dict[str, Tensor]:
        scores = torch.zeros(len(draft.entries), len(self.answers))
        for row, entry in enumerate(draft.entries):
            for answer, score in entry["answers"].items():
                if not 0 <= score <= 1:
                    where = f"question {entry['id']}, answer {answer!r}"
                    raise DataError(f"task vqa: {where}: the score {score} is out of range: 0 to 1")
                if answer in self.rows:
                    scores[row, self.rows[answer]] = score
        return {"scores": scores, "answered": torch.tensor([bool(entry["answers"]) for entry in draft.entries])}


class VQA(Objective):
    """Binary cross-entropy against the soft scores: sum over answers, mean over questions (paper: BCE x 3,129).

    A question without an answer (all of a test split whose answers are not public) has a prediction, but no loss and no
    score. Metrics of an evaluation, each over all questions and by question type (`score_yes_no`):
    `score`: the soft score of the best-rated answer (official VQAScore), where a question has an answer;
    `accuracy`: that of the official VQA evaluation, where it has `raw_answers`, those of the annotators.
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
        return int(targets["answered"].sum())

    def forward(self, shared: Shared, targets: dict[str, Tensor]) -> Result:
        fused = shared.tower.fuse(shared.images, shared.texts, shared.batch.pairs, Need(cls=True))
        logits = self.head(fused.cls).float()
        losses = F.binary_cross_entropy_with_logits(logits, targets["scores"], reduction="none").sum(1)
        metrics = {} if self.training else self._metrics(logits, targets, shared.batch.entries)
        return Result((losses * targets["answered"]).sum(), metrics, {"logits": logits})

    def _metrics(self, logits: Tensor, targets: dict[str, Tensor], entries: list[dict[str, Any]]) -> dict[str, Tensor]:
        best = logits.argmax(1)
        score = targets["scores"].gather(1, best[:, None]).squeeze(1)
        accuracy = [_accuracy(entry, self.answers[row]) for entry, row in zip(entries, best.tolist(), strict=True)]
        judged = torch.tensor([value is not None for value in accuracy], device=logits.device)
        accuracy = torch.tensor([value or 0.0 for value in accuracy], device=logits.device)
        types = [entry.get("type") for entry in entries]
        metrics = {}
        for kind in [None, *sorted(set(filter(None, types)))]:
            of_kind = torch.tensor([kind in (None, own) for own in types], device=logits.device)
            suffix = f"_{kind.replace('/', '_')}" if kind else ""
            metrics[f"score{suffix}"] = score[targets["answered"] & of_kind]
            metrics[f"accuracy{suffix}"] = accuracy[judged & of_kind]
        return {name: values for name, values in metrics.items() if len(values)}

    def predictions(self, batch: Batch, result: Result) -> list[dict[str, Any]]:
        """Question id, image key, question, best answer with its probability; true answer and score, None where there
        is no answer; and the official accuracy, where it can be told."""
        probabilities, best = result.outputs["logits"].sigmoid().max(1)
        rows = zip(batch.entries, batch.pairs[:, 0].tolist(), best.tolist(), probabilities.tolist(), strict=True)
        return [self._row(entry, batch.keys[image], self.answers[row], chance) for entry, image, row, chance in rows]

    def _row(self, entry: dict[str, Any], image: str, answer: str, probability: float) -> dict[str, Any]:
        given = entry["answers"]
        accuracy = _accuracy(entry, answer)
        return {
            "question_id": entry["id"],
            "image": image,
            "question": entry["question"],
            "answer": answer,
            "probability": round(probability, 4),
            "truth": max(given, key=given.get, default=None),
            "score": given.get(answer, 0.0) if given else None,
            **({} if accuracy is None else {"accuracy": accuracy}),
        }

    def files(self, rows: list[dict[str, Any]], split: str) -> dict[str, Any]:
        """The submission to the evaluation server: every question once (the official script repeats those with which
        its sampler fills up the ranks)."""
        answers: dict[int, str] = {}
        for row in rows:
            answers.setdefault(row["question_id"], row["answer"])
        listed = [{"question_id": number, "answer": answer} for number, answer in answers.items()]
        return {f"vqa-submission-{split}.json": listed}


def _accuracy(entry: dict[str, Any], answer: str) -> float | None:
    """By the official evaluation; None without the annotators' answers."""
    return official_accuracy(answer, entry["raw_answers"]) if entry.get("raw_answers") else None
