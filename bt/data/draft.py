"""A batch before it is tensors: what the objectives see in the loader worker when they make their targets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from bt.data.batch import Texts


@dataclass(frozen=True)
class Needs:
    """What an objective wants beside the matching pairs.

    false_images: draw one false image for each pair whose ITM label is "no match" (official: draw_false_image).
    false_texts: draw so many false texts for every pair (official: draw_false_text): never a text of the pair's image,
    nor one of the same words. any_texts: draw them from all pairs of the split, the pair's own image included, as the
    official code does.
    """

    false_images: bool = False
    false_texts: int = 0
    any_texts: bool = False


@dataclass
class Draft:
    """Rows and draws of one micro-batch.

    texts: unique tokenised texts (texts, tokens). entries: per pair, the text's JSON entry.
    pairs: (pairs, 2) rows of images and texts. image_ids: (images,) sample numbers, false images included.
    pair_ids: (pairs,). match: (pairs,) bool, the ITM draw: half of the pairs of the *global* step are True.
    false_image_rows: (pairs,) image row of the drawn false image, -1 where none was asked for.
    false_text_rows: (pairs, n) text rows of the drawn false texts.
    max_text_len: tokens at which texts are cut. word_starts(): (texts, tokens) int64, see Tokenizer.word_starts; made
    when it is asked for.
    uniform(purpose, n): (pairs, n) float64 in [0, 1), a function of (seed, purpose, epoch, pair) alone, so that
    ranks, workers and resuming do not change what is drawn.
    """

    texts: Texts
    entries: list[dict[str, Any]]
    pairs: np.ndarray
    image_ids: np.ndarray
    pair_ids: np.ndarray
    match: np.ndarray
    false_image_rows: np.ndarray
    false_text_rows: np.ndarray
    max_text_len: int
    word_starts: Callable[[], Tensor]
    uniform: Callable[[str, int], np.ndarray]
