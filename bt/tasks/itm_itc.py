"""Image-text matching with hard negatives that ITC's similarities choose (official compute_itm_itc; ALBEF)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from bt.data.draft import Draft
from bt.engine.distributed import gather_rows, this_rank
from bt.errors import ConfigError
from bt.models.bridgetower import Encoded, Need
from bt.models.heads import ITMHead
from bt.tasks.base import Context, Objective, Result, Shared


def hard_targets(draft: Draft) -> dict[str, Tensor]:
    """image_draw, text_draw: (pairs,) float64 in [0, 1), what the negative image and text of each pair are drawn from.
    text_key: (pairs,) int64, equal where the texts have the same tokens."""
    keys = [
        int.from_bytes(hashlib.blake2b(ids[mask].numpy().tobytes(), digest_size=8).digest(), "big", signed=True)
        for ids, mask in zip(draft.texts.ids, draft.texts.mask, strict=True)
    ]
    draws = {f"{side}_draw": draft.uniform(f"itm.hard_{side}", 1)[:, 0] for side in ("image", "text")}
    return {name: torch.from_numpy(draw) for name, draw in draws.items()} | {
        "text_key": torch.tensor(keys)[torch.from_numpy(draft.pairs[:, 1])]
    }


@dataclass
class Pool:
    """The pairs that negatives come from: this rank's, or those of all ranks.

    image_rows, text_rows: (columns,) into `images` and `texts`; image_ids, text_keys: (columns,), equal where image or
    text are. own: (pairs,) the column of each pair of this rank.
    """

    images: Encoded
    texts: Encoded
    image_rows: Tensor
    text_rows: Tensor
    image_ids: Tensor
    text_keys: Tensor
    own: Tensor

    def of_all_ranks(self) -> Pool:
        """Gathered with gradients. All ranks take the same collectives, whatever they hold."""
        images, image_ranks = _gather(self.images)
        texts, text_ranks = _gather(self.texts)
        columns = self.image_rows, self.text_rows, self.image_ids, self.text_keys
        *columns, ranks = gather_rows(*columns, torch.full_like(self.own, this_rank()))
        # Where the rows of each rank begin.
        columns[0] = columns[0] + torch.searchsorted(image_ranks, ranks)
        columns[1] = columns[1] + torch.searchsorted(text_ranks, ranks)
        return Pool(images, texts, *columns, own=(ranks == this_rank()).nonzero()[:, 0])

    def excluded(self) -> tuple[Tensor, Tensor]:
        """(pairs, columns) bool, twice: the columns whose image is no negative of the pair's text, and whose text is
        none of its image, since they belong together in some pair of the pool (equal texts count as one)."""
        same_image = (self.image_ids[:, None] == self.image_ids).float()
        same_text = (self.text_keys[:, None] == self.text_keys).float()
        return (same_text[self.own] @ same_image) > 0, (same_image[self.own] @ same_text) > 0


def _gather(encoded: Encoded) -> tuple[Encoded, Tensor]:
    """The encodings of all ranks, and (rows,) which rank each is of. Padded to the longest."""
    device = encoded.cls.device
    tokens = encoded.states[0].shape[1]
    (lengths,) = gather_rows(torch.tensor([tokens], device=device))
    padding = int(lengths.max()) - tokens
    distinct = {id(state): state for state in encoded.states}  # a bridge can read one state several times
    padded = [F.pad(state, (0, 0, 0, padding)) for state in distinct.values()]
    masks = [] if encoded.mask is None else [F.pad(encoded.mask, (0, padding)).to(torch.uint8)]
    ranks = torch.full((len(encoded.cls),), this_rank(), device=device)
    *gathered, ranks = gather_rows(*padded, *masks, ranks)
    mask = gathered.pop().bool() if masks else None
    of = dict(zip(distinct, gathered, strict=True))
    states = [of[id(state)] for state in encoded.states]
    return Encoded(states, states[-1][:, 0], mask), ranks  # fuse reads no cls


def negative_weights(logits: Tensor, excluded: Tensor) -> Tensor:
    """Shares (pairs, columns) float64 with which negatives are drawn: softmax over what is not excluded; all 0 in a row
    without any.

    The official code sets the excluded ones to 0 after the softmax: the same shares, but for rows in which a confident
    positive leaves nothing to the others. Such rows get equal shares there, positives included.
    """
    return logits.double().masked_fill(excluded, -torch.inf).softmax(1).nan_to_num(0.0)


def draw_columns(weights: Tensor, uniform: Tensor) -> Tensor:
    """(pairs,) one column for each row of weights (pairs, columns) by the inverse of its distribution function."""
    columns = weights.shape[1]
    # A product, since cumsum is refused on GPUs where results must repeat.
    up_to = weights @ torch.ones(columns, columns, dtype=weights.dtype, device=weights.device).triu()
    reached = (up_to > uniform[:, None] * up_to[:, -1:]) & (weights > 0)
    # Nothing is reached if rounding puts the draw at the very end.
    return torch.where(reached.any(1), reached.int().argmax(1), weights.argmax(1))


class HardITM(Objective):
    """Matching with three terms a pair: the pair, its text with a negative image, its image with a negative text.

    Two-class cross-entropy, mean over the terms; class 1 = match.

    A negative is drawn in proportion to exp(similarity / temperature) of the objective `contrast` (bt.tasks.itc.ITC)
    among the pairs of this rank's micro-batch (negatives="local") or of all ranks (negatives="global", whose encodings
    are gathered with their gradients). It is never of the same image, nor a text of the same words. Where there is no
    other image, a pair has its first term alone, at its usual weight of a third; the official code draws a positive
    then and calls it a negative. Each draw is a function of (seed, epoch, pair), so that global negatives do not depend
    on the number of ranks. In evaluation they are of the evaluation batch.
    outputs: logits (3 * pairs, 2), labels, and the columns of the negatives with the weights that they were drawn with.
    """

    def __init__(
        self,
        context: Context,
        weight: float = 1.0,
        negatives: Literal["local", "global"] = "local",
        contrast: str = "itc",
    ):
        if negatives not in ("local", "global"):
            raise ConfigError(f"HardITM.negatives={negatives}: allowed are local, global")
        super().__init__(weight, hard_targets)
        self.negatives, self.contrast = negatives, contrast
        self.head = ITMHead(context.width)

    def check(self, objectives: Mapping[str, Objective]) -> None:
        if self.contrast not in objectives:
            raise ConfigError(
                f"HardITM.contrast={self.contrast}: the task has no such objective, it has {', '.join(objectives)}"
            )

    def note(self, pairs: int, ranks: int, accumulation: int) -> str:
        reach = pairs * (ranks if self.negatives == "global" else 1)
        return f"itm: hard negatives among {reach} pairs (negatives={self.negatives}; official: those of one GPU)"

    def score(self, cls: Tensor) -> Tensor:
        """How well pairs match, for retrieval: fused [CLS] (pairs, 2 * width) -> the match logit (pairs,)."""
        return self.head(cls)[:, 1].float()

    def count(self, targets: dict[str, Tensor]) -> float:
        return 3 * len(targets["text_key"])

    def forward(self, shared: Shared, targets: dict[str, Tensor]) -> Result:
        everywhere = self.negatives == "global" and self.training
        contrast = shared.result(self.contrast).outputs
        pool = self.pool(shared, targets, everywhere)
        with torch.no_grad():
            columns = slice(None) if everywhere else contrast["own"]
            image_excluded, text_excluded = pool.excluded()
            image_weights = negative_weights(contrast["text_to_image"][:, columns], image_excluded)
            text_weights = negative_weights(contrast["image_to_text"][:, columns], text_excluded)
            images = draw_columns(image_weights, targets["image_draw"])
            texts = draw_columns(text_weights, targets["text_draw"])
        pairs = torch.stack(
            [
                pool.image_rows[torch.cat([pool.own, images, pool.own])],
                pool.text_rows[torch.cat([pool.own, pool.own, texts])],
            ],
            dim=1,
        )
        if everywhere:
            pool.images, image_rows = pool.images.used(pairs[:, 0])
            pool.texts, text_rows = pool.texts.used(pairs[:, 1])
            pairs = torch.stack([image_rows, text_rows], dim=1)
        logits = self.head(shared.tower.fuse(pool.images, pool.texts, pairs, Need(cls=True)).cls).float()
        own, there = torch.ones_like(pool.own), torch.cat([image_weights.any(1), text_weights.any(1)])
        labels = torch.cat([own, torch.zeros_like(own), torch.zeros_like(own)])
        counts = torch.cat([own.bool(), there]).float()
        loss = (F.cross_entropy(logits, labels, reduction="none") * counts).sum()
        outputs = {"logits": logits, "labels": labels, "images": images, "texts": texts}
        outputs |= {"image_weights": image_weights, "text_weights": text_weights}
        return Result(loss, {"accuracy": ((logits.argmax(-1) == labels).float(), counts)}, outputs)

    def pool(self, shared: Shared, targets: dict[str, Tensor], everywhere: bool) -> Pool:
        batch = shared.batch
        image_rows, text_rows = batch.pairs.unbind(1)
        ids, own = batch.image_ids[image_rows], torch.arange(len(image_rows), device=image_rows.device)
        pool = Pool(shared.images, shared.texts, image_rows, text_rows, ids, targets["text_key"], own)
        return pool.of_all_ranks() if everywhere else pool
