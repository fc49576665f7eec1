"""Queries: the most similar pictures by ITC, put in order by ITM; and what that shortlist loses."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bt.errors import DataError
from bt.inference.predictor import Predictor
from bt.models.bridgetower import Encoded
from bt.search.index import ImageIndex, check_searchable
from bt.tasks.irtr import IRTR
from bt.tasks.itm import ITM
from bt.tasks.retrieval import fingerprint


@dataclass(frozen=True)
class Hit:
    """A picture that was found. score: the ITM head's probability of a match, or the rank head's score; None without
    both. similarity: the cosine of uni-modal features; None without ITC."""

    path: Path
    score: float | None
    similarity: float | None


class Searcher:
    """Searches an index with the model that made it. Raises DataError where it is another model's."""

    def __init__(self, model: Predictor, index: ImageIndex):
        if fingerprint(model.model) != index.weights:
            raise DataError(f"the index was not made with {model.source}: give that model, or index again")
        self.model, self.index = model, index
        check_searchable(model)
        self.ranker = model.find(ITM) or model.find(IRTR)

    def similarities(self, text: str) -> Tensor | None:
        """(pictures,) cosines, or None without ITC."""
        features = self.index.features
        return None if features is None else (features @ self.model.text_features(text).cpu()[0])

    def shortlist(self, similarities: Tensor | None, size: int | None) -> list[int]:
        """The pictures to re-rank: the most similar ones; all without ITC or without a size."""
        if similarities is None or size is None:
            return [*range(len(self.index))]
        return similarities.topk(min(size, len(self.index))).indices.tolist()

    def encoded(self, numbers: Sequence[int]) -> Encoded:
        if self.index.has_states:
            return self.index.states(numbers, self.model.device)
        return self.model.encode_images([self.index.paths[number] for number in numbers])

    def rank(self, images: Encoded, text: str) -> Tensor:
        """(images,) how well they match: the log-odds of a match, which do not saturate as probabilities do."""
        head = self.ranker

        def score(cls: Tensor) -> Tensor:
            if isinstance(head, IRTR):
                return head.score(cls)
            logits = head.head(cls).float()
            return logits[:, 1] - logits[:, 0]

        return self.model.fused_scores(images, text, score)

    def search(self, text: str, k: int = 10, shortlist: int | None = 128) -> list[Hit]:
        """The k best pictures for a text, of the `shortlist` most similar ones; None re-ranks all."""
        similarities = self.similarities(text)
        if self.ranker is None:
            order = similarities.topk(min(k, len(self.index))).indices.tolist()
            return [Hit(self.index.paths[number], None, similarities[number].item()) for number in order]
        numbers = self.shortlist(similarities, None if shortlist is None else max(shortlist, k))
        scores = torch.cat(
            [self.rank(self.encoded(numbers[at : at + 1024]), text) for at in range(0, len(numbers), 1024)]
        )
        best = scores.topk(min(k, len(numbers))).indices.tolist()
        shown = scores if isinstance(self.ranker, IRTR) else scores.sigmoid()
        return [
            Hit(
                self.index.paths[numbers[place]],
                shown[place].item(),
                None if similarities is None else similarities[numbers[place]].item(),
            )
            for place in best
        ]


def measure(searcher: Searcher, texts: Sequence[str], k: int, sizes: Sequence[int]) -> list[dict[str, Any]]:
    """What a shortlist loses and saves: for each size (the last row: all pictures) the share of the k best pictures by
    full re-ranking that it holds, mean over texts, and the median seconds of a query from its text on."""
    if searcher.ranker is None or searcher.index.features is None:
        raise DataError("a shortlist is measured on a model with both ITC and ITM")
    found: dict[int, tuple[list[float], list[float]]] = {size: ([], []) for size in (*sizes, len(searcher.index))}
    for text in texts:
        every: Tensor | None = None
        for size in reversed(found):  # all pictures first
            start = time.perf_counter()
            numbers = searcher.shortlist(searcher.similarities(text), size)
            scores = searcher.rank(searcher.encoded(numbers), text)
            best = torch.tensor(numbers)[scores.topk(min(k, len(numbers))).indices]
            seconds = time.perf_counter() - start
            every = best if every is None else every
            recalls, times = found[size]
            recalls.append(torch.isin(every, torch.tensor(numbers)).float().mean().item())
            times.append(seconds)
    return [
        {"shortlist": size, "recall": sum(recalls) / len(recalls), "seconds": torch.tensor(times).median().item()}
        for size, (recalls, times) in found.items()
    ]
