"""Batches and drafts made by hand, for the small tower of tests/models/towers.py."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

from bt.data import draws
from bt.data.batch import Batch, Texts
from bt.data.draft import Draft
from bt.tasks.base import Context
from tests.models.towers import TEXT, VISION, make_images

TOKENIZER = SimpleNamespace(vocab_size=TEXT["vocab_size"], mask_id=4, special_ids=[0, 1, 2, 3, 4])
ANSWERS = ["blue", "circle", "no", "yes"]
CONTEXT = Context(16, TEXT["hidden_size"], VISION["width"], TOKENIZER, {"answers": ANSWERS})


def make_draft(
    image_rows: list[int],
    texts: Texts | None = None,
    *,
    text_rows: list[int] | None = None,
    match: list[bool] | None = None,
    false_image_rows: list[int] | None = None,
    entries: list[dict] | None = None,
    word_starts: Tensor | None = None,
    seed: int = 0,
) -> Draft:
    """Pairs of the given rows; what is not given is all matches, nothing drawn, pair i with text i."""
    count = len(image_rows)
    pair_ids = np.arange(count)
    return Draft(
        texts=texts or Texts(torch.zeros(count, 1, dtype=torch.long), torch.ones(count, 1, dtype=torch.bool)),
        entries=entries or [{}] * count,
        pairs=np.stack([image_rows, pair_ids if text_rows is None else text_rows], axis=1),
        image_ids=100 + np.arange(max(image_rows + (false_image_rows or [])) + 1),
        pair_ids=pair_ids,
        match=np.ones(count, bool) if match is None else np.array(match),
        false_image_rows=np.full(count, -1) if false_image_rows is None else np.array(false_image_rows),
        max_text_len=50,
        word_starts=lambda: word_starts,
        false_text_rows=np.zeros((count, 0), np.int64),
        uniform=lambda purpose, n: draws.uniforms(seed, purpose, 0, pair_ids, n),
    )


def make_batch(
    texts: Texts,
    pairs: list[list[int]] | Tensor,
    targets: dict[str, dict[str, Tensor]],
    *,
    images: Tensor | None = None,
    image_ids: list[int] | None = None,
    entries: list[dict] | None = None,
) -> Batch:
    """Random float images, unless given; image ids 0, 1, ..."""
    pairs = torch.as_tensor(pairs)
    images = make_images(int(pairs[:, 0].max()) + 1) if images is None else images
    return Batch(
        images=images,
        texts=texts,
        pairs=pairs,
        image_ids=torch.arange(len(images)) if image_ids is None else torch.tensor(image_ids),
        pair_ids=torch.arange(len(pairs)),
        targets=targets,
        keys=[f"image-{row}" for row in range(len(images))],
        entries=entries or [{} for _ in pairs],
    )
