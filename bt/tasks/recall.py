"""Which pairs retrieval scores, and the recalls that follow from the scores."""

from __future__ import annotations

import torch
from torch import Tensor

from bt.engine.distributed import all_sum
from bt.tasks.gallery import Chunk, Gallery

_ROWS = 1024  # rows of a similarity matrix at a time
CUTS = (1, 5, 10)


class TopK:
    """The pairs that similarity proposes: of each image its k nearest captions, of each caption its k nearest images.

    Captions of equal words count one by one, as in the official code, and are scored together.
    """

    def __init__(self, gallery: Gallery, k: int):
        device = gallery.world.device
        images, texts = gallery.image_features.to(device), gallery.text_features.to(device)
        k_images, k_texts = min(k, len(images)), min(k, len(texts))
        self.captions = torch.cat([(rows @ texts.T).topk(k_texts).indices.cpu() for rows in images.split(_ROWS)])
        here = texts[gallery.slot_captions.to(device)]
        nearest = [(rows @ images.T).topk(k_images).indices.cpu() for rows in here.split(_ROWS)]
        self.images = torch.cat([torch.empty(0, k_images, dtype=torch.long), *nearest])
        self.slots, self.caption_slot = gallery.slots, torch.from_numpy(gallery.caption_slot)

    def of(self, chunk: Chunk) -> Tensor:
        """(images of the chunk, slots) bool."""
        chosen = torch.zeros(len(chunk.rows), self.slots, dtype=torch.bool)
        slots = self.caption_slot[self.captions[chunk.images]]
        rows, columns = (slots >= 0).nonzero().T
        chosen[rows, slots[rows, columns]] = True
        near = (self.images >= chunk.images.start) & (self.images < chunk.images.stop)
        slot, place = near.nonzero().T
        chosen[self.images[slot, place] - chunk.first, slot] = True
        return chosen


class Ranks:
    """How many wrong captions are at least as good as the best right one of each image, and how many wrong images at
    least as good as the right one of each caption. A right one that was not scored is behind everything.

    own: (captions,) score of each caption with its image, -inf where that was not scored.
    """

    def __init__(self, gallery: Gallery, own: Tensor):
        self.gallery, self.own = gallery, own
        self.captions = torch.zeros(gallery.images, dtype=torch.long)
        self.images = torch.zeros(gallery.captions, dtype=torch.long)
        best = torch.full((gallery.images,), -torch.inf)
        self.best = best.scatter_reduce(0, torch.from_numpy(gallery.caption_image), own, "amax")
        self.slot = torch.from_numpy(gallery.caption_slot)
        self.local = (self.slot >= 0).nonzero()[:, 0]
        self.copies = torch.bincount(self.slot[self.local], minlength=gallery.slots)

    def add(self, chunk: Chunk, scores: Tensor) -> None:
        """Counts the scores (images of the chunk, slots of this rank) of all ranks, -inf where there is none."""
        captions, rows, slots = self.gallery.own_pairs(chunk)
        scores[rows, slots] = self.own[captions]
        right = torch.zeros(scores.shape, dtype=torch.long).index_put_((rows, slots), torch.tensor(1), accumulate=True)
        as_good = scores >= self.best[chunk.images, None]
        better_captions = torch.zeros_like(self.captions)
        better_captions[chunk.images] = (as_good * (self.copies - right)).sum(1)
        better_images = torch.zeros_like(self.images)
        better_images[self.local] = (scores[:, self.slot[self.local]] >= self.own[self.local]).sum(0)
        better_images[captions] -= 1  # the right image itself
        counts = all_sum(torch.cat([better_captions, better_images]))
        self.captions += counts[: len(self.captions)]
        self.images += counts[len(self.captions) :]

    def recalls(self) -> dict[str, float]:
        """tr_*: texts are looked for, a hit if any of the image's captions is among the first k. ir_*: images are."""
        found = {}
        for name, ranks in (("tr", self.captions), ("ir", self.images)):
            found |= {f"{name}_r{k}": (ranks < k).double().mean().item() for k in CUTS}
        for name in ("tr", "ir"):
            found[f"{name}_mean"] = sum(found[f"{name}_r{k}"] for k in CUTS) / len(CUTS)
        found["r_mean"] = (found["tr_mean"] + found["ir_mean"]) / 2
        found["rsum"] = sum(found[f"{name}_r{k}"] for name in ("tr", "ir") for k in CUTS)
        return found
