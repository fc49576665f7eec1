"""Statements on two images, true or false (NLVR2; official compute_nlvr2)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bt.errors import DataError
from bt.models.bridgetower import Encoded, Need
from bt.models.checks import check_range
from bt.models.heads import ClassifierHead
from bt.tasks.base import Context, Shared
from bt.tasks.classifier import Classifier, class_names


class NLVR2(Classifier):
    """Cross-entropy on the fused [CLS] of the statement with its first image beside that with its second one,
    (pairs, 4 * width); mean over statements. The second image takes row 2 of the type table.

    The official code runs its whole model twice, once for each image. Here every image and statement is encoded once,
    which is the same without dropout; with it, the official code draws two masks for the text encoder and this one.

    hidden_scale: hidden width of the head over 2 * width. dropout: before the head; 0: none (ManagerTower).
    Metric `consistency`, beside the accuracy: the share of unique sentences of which all statements are judged right
    (NLVR2's eval/metrics.py).
    """

    token_types = 3
    summarises = True

    def __init__(
        self,
        context: Context,
        weight: float = 1.0,
        hidden_scale: float = 1.5,
        layers: int = 2,
        dropout: float = 0.1,
    ):
        check_range("NLVR2.hidden_scale", hidden_scale, above=0)
        check_range("NLVR2.dropout", dropout, at_least=0, below=1)
        super().__init__("nlvr2", class_names(context, "nlvr2"), weight)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        hidden = int(2 * context.width * hidden_scale)
        self.head = ClassifierHead(4 * context.width, hidden, len(self.classes), layers)

    def logits(self, shared: Shared) -> Tensor:
        batch = shared.batch
        if batch.second_images is None:
            raise DataError("task nlvr2: the samples of data.dir have no second image; convert an NLVR2 source")
        first, text_rows = batch.pairs.unbind(1)
        images, second = encode_both(shared, first, batch.second_images)
        pairs = torch.stack([torch.cat([first, second]), text_rows.repeat(2)], dim=1)
        cls = shared.tower.fuse(images, shared.texts, pairs, Need(cls=True)).cls
        return self.head(self.dropout(torch.cat(cls.chunk(2), dim=1)))

    def summary(self, rows: list[dict[str, Any]]) -> dict[str, float]:
        return consistency([(row["id"], row["prediction"] == row["truth"]) for row in rows if row["truth"] is not None])


def encode_both(shared: Shared, first: Tensor, second: Tensor) -> tuple[Encoded, Tensor]:
    """The images with the types of their places, and the rows (pairs,) of the second ones among them.

    first, second: (pairs,) rows of the batch's images. An image that is the first of one pair and the second of another
    passes the encoder once, and gets a row more.
    """
    count = len(shared.batch.images)
    is_first, is_second = (torch.zeros(count, dtype=torch.bool, device=first.device) for _ in range(2))
    is_first[first], is_second[second] = True, True
    types = torch.where(is_first, 1, 2)
    both = (is_first & is_second).nonzero().squeeze(1)
    if not len(both):
        return shared.tower.encode_images(shared.pixels, types), second
    own = torch.arange(count, device=first.device)
    moved = own.index_copy(0, both, torch.arange(count, count + len(both), device=first.device))
    types = torch.cat([types, torch.full_like(both, 2)])
    return shared.tower.encode_images(shared.pixels, types, torch.cat([own, both])), moved[second]


def consistency(judged: list[tuple[str, bool]]) -> dict[str, float]:
    """{"consistency": share of sentences that are right on all of their pairs of images}.

    judged: identifier `split-set-pair-sentence` of a statement, and whether it was judged right: the sentence is what
    the identifier says without its pair. Empty without statements, or where identifiers are not of that form.
    """
    right: dict[tuple[str, ...], bool] = {}
    for identifier, correct in judged:
        parts = str(identifier).split("-")
        if len(parts) < 4:
            return {}
        sentence = (*parts[:2], *parts[3:])
        right[sentence] = right.get(sentence, True) and correct
    return {"consistency": sum(right.values()) / len(right)} if right else {}
