"""Attention probabilities of the cross-modal layers, which the fused attention of a forward pass never has at hand."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class AttentionMaps:
    """The cross-attention of one cross-modal layer; tokens of texts are L, of images S (the class token first).

    text_to_image: (pairs, heads, L, S), what each text token reads of the image. image_to_text: (pairs, heads, S, L).
    None where the layer has no such attention. Rows add up to 1, except in layers that attend to both modalities at
    once (merged attention), where the rest of a row is the token's look at its own modality. Padding gets 0.
    """

    text_to_image: Tensor | None
    image_to_text: Tensor | None

    def cpu(self) -> AttentionMaps:
        """In float32 on the CPU."""
        return AttentionMaps(*(None if maps is None else maps.float().cpu() for maps in vars(self).values()))


def probabilities(query: Tensor, keys: Tensor, mask: Tensor | None) -> Tensor:
    """(B, heads, Q, d) x (B, heads, K, d) -> (B, heads, Q, K): softmax of q k^T / sqrt(d), as attention weighs values.

    mask: (B, K) bool, True at keys that count.
    """
    scores = query @ keys.transpose(-1, -2) / math.sqrt(query.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None, :], -math.inf)
    return scores.float().softmax(-1)
