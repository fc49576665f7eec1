"""Other cross-modal encoders: one stack for both modalities, and one modality that reads the other."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from bt.models.attention import AttentionMaps, probabilities
from bt.models.cross_modal import (
    CrossEncoder,
    CrossModalLayer,
    FeedForward,
    SelfAttention,
    final_norm,
    split_heads,
)
from bt.models.gather import Reading, gather


class MergedLayer(nn.Module):
    """Self-attention and feed-forward on the tokens of both modalities."""

    def __init__(self, width: int, heads: int, ffn_ratio: float, dropout: float, norm_eps: float, norm: str):
        super().__init__()
        self.self_attention = SelfAttention(width, heads, dropout, norm_eps, norm)
        self.ffn = FeedForward(width, int(width * ffn_ratio), dropout, norm_eps, norm)

    def forward(self, queries: Tensor | None, states: Tensor, mask: Tensor) -> Tensor:
        """states (P, S, D), mask (P, S) -> (P, R, D) for `queries`, rows of `states`; None: all of them.

        Not the states themselves for that: a layer that is sharded (fully_shard) gets other objects than it is given.
        """
        return self.ffn(self.self_attention(states if queries is None else queries, states, mask))


class MergedAttention(CrossEncoder):
    """One stack of layers on the text's tokens with the image's behind them (METER's "merged attention").

    A layer has a self-attention and a feed-forward part, so it has three eighths of the parameters of a pair of
    co-attention layers, which METER balanced with twice as many layers. Bridges act on each modality's part.
    """

    def build(self, width, heads, ffn_ratio, dropout, norm_eps, norm):
        sizes = (width, heads, ffn_ratio, dropout, norm_eps, norm)
        self.stack = nn.ModuleList(MergedLayer(*sizes) for _ in range(self.layers))
        self.norm = final_norm(width, norm_eps, norm)

    def forward(self, layer, text, image, text_rows, image_rows, text_mask, pair_mask, *reads, alone=(None, None)):
        read_text, read_image = reads
        text, image = gather(text, text_rows), gather(image, image_rows)
        states = torch.cat([text, image], dim=1)
        mask = torch.cat([pair_mask, pair_mask.new_ones(image.shape[:2])], dim=1)
        if all(read is not None and read.everything for read in (read_text, read_image)):
            queries, texts = None, text.shape[1]
        else:
            parts = [
                states_of.narrow(1, 0, 0) if read is None else read.select(states_of)
                for states_of, read in ((text, read_text), (image, read_image))
            ]
            queries, texts = torch.cat(parts, dim=1), parts[0].shape[1]
        output = self.run(self.stack[layer], queries, states, mask)
        if layer == self.layers - 1:
            output = self.norm(output)
        return (
            None if read_text is None else read_text.pack(output[:, :texts]),
            None if read_image is None else read_image.pack(output[:, texts:]),
        )

    def attention(self, layer, text, image, mask):
        attention, tokens = self.stack[layer].self_attention, text.shape[1]
        states = torch.cat([text, image], dim=1)
        q, k, _ = split_heads(attention.qkv(attention.before(states)), 3, attention.heads)
        both = probabilities(q, k, torch.cat([mask, mask.new_ones(image.shape[:2])], dim=1))
        return AttentionMaps(both[:, :, :tokens, tokens:], both[:, :, tokens:, :tokens])


class AsymmetricAttention(CrossEncoder):
    """Cross-modal layers for one modality alone, which reads the other one as its bridges make it.

    reader: text (as in ALBEF, where text layers attend to the image) or image.
    """

    def __init__(
        self,
        width: int = 768,
        heads: int = 12,
        layers: int = 6,
        ffn_ratio: float = 4.0,
        dropout: float = 0.1,
        norm_eps: float = 1e-12,
        init_std: float = 0.02,
        norm: Literal["post", "pre"] = "post",
        reader: Literal["text", "image"] = "text",
    ):
        super().__init__(width, heads, layers, ffn_ratio, dropout, norm_eps, init_std, norm)
        if reader not in ("text", "image"):
            raise ValueError(f"reader={reader}: allowed are text, image")
        self.reader = reader

    def build(self, width, heads, ffn_ratio, dropout, norm_eps, norm):
        sizes = (width, heads, ffn_ratio, dropout, norm_eps, norm)
        self.stack = nn.ModuleList(CrossModalLayer(*sizes) for _ in range(self.layers))
        self.norm = final_norm(width, norm_eps, norm)

    def alone(self, modality, states, mask):
        return self.run(self.stack[0], states, None, None, None, mask) if modality == self.reader else None

    def forward(self, layer, text, image, text_rows, image_rows, text_mask, pair_mask, *reads, alone=(None, None)):
        read_text, read_image = reads
        if self.reader == "text":
            texts = self._read(layer, text, image, text_rows, image_rows, text_mask, None, read_text, alone[0])
            return texts, _passed(image, image_rows, read_image)
        images = self._read(layer, image, text, image_rows, text_rows, None, pair_mask, read_image, alone[1])
        return _passed(text, text_rows, read_text), images

    def attention(self, layer, text, image, mask):
        if self.reader == "text":
            return AttentionMaps(self.stack[layer].attention(text, image, mask, None), None)
        return AttentionMaps(None, self.stack[layer].attention(image, text, None, mask))

    def _read(self, layer: int, *args) -> Tensor | None:
        *_, read, _ = args
        if read is None:
            return None
        output = self.run(self.stack[layer], *args)
        return self.norm(output) if layer == self.layers - 1 else output


def _passed(states: Tensor, rows: Tensor | None, read: Reading | None) -> Tensor | None:
    """The states of the modality without layers: per pair, what is read of them."""
    return None if read is None else read.pack(read.select(gather(states, rows)))
