"""What a loader hands to the model: unique images, unique texts and the pairs between them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass
class Texts:
    """Tokenised texts, padded to the longest of the batch.

    ids: (texts, tokens) int64; mask: (texts, tokens) bool, True at real tokens.
    """

    ids: Tensor
    mask: Tensor


@dataclass
class Batch:
    """One micro-batch of one rank.

    images: (images, channels, height, width) uint8, channels last in memory, normalised on the device by the vision
    encoder. A sample has a row for each way in which a random transform drew it. With data.decode_on=device they are
    Pending (bt.data.device) until they leave the Loader.
    texts: the unique texts. pairs: (pairs, 2) int64, rows of `images` and of `texts` that belong together; -1 where a
    data set has texts or images alone. second_images: (pairs,) int64, rows of the second images where samples have two.
    image_ids: (images,) int64, the sample's number in the split, equal on all ranks, so that "the same
    image" can be told across ranks. pair_ids: (pairs,) int64, the pair's number in the split.
    targets: per objective, what its `targets` callable made in the loader worker.
    keys: sample key per image row. entries: per pair, the text's JSON entry (question id, answers ...).
    skipped: samples left out of this batch because they were bad, by "shard: reason".
    """

    images: Tensor
    texts: Texts
    pairs: Tensor
    image_ids: Tensor
    pair_ids: Tensor
    targets: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    keys: list[str] = field(default_factory=list)
    entries: list[dict[str, Any]] = field(default_factory=list)
    skipped: dict[str, int] = field(default_factory=dict)
    second_images: Tensor | None = None

    def map(self, fn) -> Batch:
        """A copy with `fn` applied to every tensor."""
        return dataclasses.replace(
            self,
            images=fn(self.images),
            texts=Texts(fn(self.texts.ids), fn(self.texts.mask)),
            pairs=fn(self.pairs),
            image_ids=fn(self.image_ids),
            pair_ids=fn(self.pair_ids),
            second_images=None if self.second_images is None else fn(self.second_images),
            targets={name: {k: fn(v) for k, v in group.items()} for name, group in self.targets.items()},
        )

    def to(self, device) -> Batch:
        return self.map(lambda t: t.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        return self.map(lambda t: t.pin_memory())
