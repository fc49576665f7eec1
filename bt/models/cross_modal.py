"""The cross-modal encoder: for each modality a stack of self-attention, cross-attention and feed-forward layers.

GELU is the erf form; dropout acts on the attention probabilities and on each sub-layer's output. Source: official
bert_model.py, BertCrossLayer; transformers BridgeTowerBertCrossLayer.
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from bt.errors import ConfigError
from bt.models import checkpointing
from bt.models.attention import AttentionMaps, probabilities
from bt.models.checks import check_range
from bt.models.folding import cheapest, few_keys, few_queries
from bt.models.gather import ALL, Reading, gather
from bt.models.heads import init_new


def split_heads(states: Tensor, parts: int, heads: int) -> tuple[Tensor, ...]:
    """(B, S, parts * D) -> `parts` tensors (B, heads, S, D / heads), without a copy."""
    batch, tokens, width = states.shape
    return states.view(batch, tokens, parts, heads, width // parts // heads).permute(2, 0, 3, 1, 4).unbind(0)


def attend(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """(B, heads, Q, d) x (B, heads, K, d) -> (B, Q, heads * d). mask: (B, K) bool, True at keys that count."""
    mask = None if mask is None else mask[:, None, None, :]
    context = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, dropout_p=dropout)
    return context.transpose(1, 2).flatten(2)


class SubLayer(nn.Module):
    """Residual, dropout and norm around a sub-layer.

    norm="post" (the paper's): LayerNorm(dropout(f(x)) + x); "pre": dropout(f(LayerNorm(x))) + x.
    """

    def __init__(self, width: int, dropout: float, norm_eps: float, norm: str):
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(width, eps=norm_eps)
        self.pre = norm == "pre"

    def before(self, states: Tensor) -> Tensor:
        return self.norm(states) if self.pre else states

    def after(self, output: Tensor, states: Tensor) -> Tensor:
        joined = self.dropout(output) + states
        return joined if self.pre else self.norm(joined)


class Attention(SubLayer):
    """Sub-layer of attention. folding: whether products may be taken in another order (bt.models.folding); False
    projects everything first, as the released code does."""

    folding = True

    def __init__(self, width: int, heads: int, dropout: float, norm_eps: float, norm: str = "post"):
        super().__init__(width, dropout, norm_eps, norm)
        self.heads = heads
        self.attention_dropout = dropout

    def rate(self) -> float:
        return self.attention_dropout if self.training else 0.0

    def order(self, pairs: int, own: Tensor, other: Tensor) -> str:
        width = own.shape[-1]
        return cheapest(width, self.heads, pairs, own.shape[:2], other.shape[:2]) if self.folding else "plain"


def set_folding(model: nn.Module, folding: bool) -> None:
    """Whether the cross-modal attention of a model chooses the order of its products; see Attention."""
    for module in model.modules():
        if isinstance(module, Attention):
            module.folding = folding


class SelfAttention(Attention):
    def __init__(self, width: int, heads: int, dropout: float, norm_eps: float, norm: str = "post"):
        super().__init__(width, heads, dropout, norm_eps, norm)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, queries: Tensor, states: Tensor, mask: Tensor | None) -> Tensor:
        """states (B, S, D), mask (B, S) -> (B, R, D) for `queries`, which are `states` or rows (B, R, D) of it."""
        read = self.before(states)
        if queries is states:
            q, k, v = split_heads(self.qkv(read), 3, self.heads)
            context = attend(q, k, v, mask, self.rate())
        else:
            context = self._of_rows(self.before(queries), read, mask)
        return self.after(self.out(context), queries)

    def _of_rows(self, queries: Tensor, states: Tensor, mask: Tensor | None) -> Tensor:
        width = states.shape[-1]
        weight, bias = self.qkv.weight, self.qkv.bias
        q = F.linear(queries, weight[:width], bias[:width])
        if self.order(len(q), queries, states) == "few_queries":
            return few_queries(q, states, weight[width:], bias[2 * width :], self.heads, mask, self.rate())
        (q,) = split_heads(q, 1, self.heads)
        k, v = split_heads(F.linear(states, weight[width:], bias[width:]), 2, self.heads)
        return attend(q, k, v, mask, self.rate())


class CrossAttention(Attention):
    """Queries of one modality, keys and values of the other."""

    def __init__(self, width: int, heads: int, dropout: float, norm_eps: float, norm: str = "post"):
        super().__init__(width, heads, dropout, norm_eps, norm)
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)
        # What is read of the other modality went through no norm of this layer.
        self.other_norm = nn.LayerNorm(width, eps=norm_eps) if self.pre else nn.Identity()

    def queries(self, own: Tensor) -> Tensor:
        return self.q(self.before(own))

    def keys_values(self, other: Tensor) -> Tensor:
        return self.kv(self.other_norm(other))

    def forward(
        self,
        own: Tensor,
        other: Tensor,
        own_rows: Tensor | None,
        other_rows: Tensor | None,
        mask: Tensor | None,
        read: Reading,
    ) -> Tensor:
        """own (U, R, D), other (U', K, D), mask (P, K) -> (P, R, D), or (M, D) if `read` packs.

        own_rows, other_rows: (P,) the row of every pair, None where pair p uses row p. Projections are of unique rows.
        """
        pairs = len(own if own_rows is None else own_rows)
        residual = gather(own, own_rows)
        order = self.order(pairs, own, other)
        if order == "few_keys":
            kv, states = self.keys_values(other), self.before(residual)
            output = few_keys(states, kv, other_rows, self.q, self.out, self.heads, mask, self.rate())
            return self.after(read.pack(output), read.pack(residual))
        q = gather(self.queries(own), own_rows)
        if order == "few_queries":
            states, width = gather(self.other_norm(other), other_rows), own.shape[-1]
            context = few_queries(q, states, self.kv.weight, self.kv.bias[width:], self.heads, mask, self.rate())
        else:
            (q,) = split_heads(q, 1, self.heads)
            k, v = split_heads(gather(self.keys_values(other), other_rows), 2, self.heads)
            context = attend(q, k, v, mask, self.rate())
        return self.after(self.out(read.pack(context)), read.pack(residual))


class FeedForward(SubLayer):
    def __init__(self, width: int, hidden: int, dropout: float, norm_eps: float, norm: str = "post"):
        super().__init__(width, dropout, norm_eps, norm)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, states: Tensor) -> Tensor:
        return self.after(self.down(F.gelu(self.up(self.before(states)))), states)


class CrossModalLayer(nn.Module):
    """One layer of one modality: self-attention, which needs no other, cross-attention and feed-forward."""

    def __init__(self, width: int, heads: int, ffn_ratio: float, dropout: float, norm_eps: float, norm: str = "post"):
        super().__init__()
        self.self_attention = SelfAttention(width, heads, dropout, norm_eps, norm)
        self.cross_attention = CrossAttention(width, heads, dropout, norm_eps, norm)
        self.ffn = FeedForward(width, int(width * ffn_ratio), dropout, norm_eps, norm)

    def forward(
        self,
        own: Tensor,
        other: Tensor | None,
        own_rows: Tensor | None = None,
        other_rows: Tensor | None = None,
        own_mask: Tensor | None = None,
        other_mask: Tensor | None = None,
        read: Reading = ALL,
        attended: Tensor | None = None,
    ) -> Tensor:
        """own (U, S, D), other (U', S', D) -> (P, S, D), or what `read` asks for: (P, 1, D) or (M, D).

        own_rows, other_rows: (P,) the row of every pair, None where pair p uses row p (U = P). What depends on one
        input alone is computed on its U rows and gathered to pairs only then.
        own_mask: (U, S) bool or None; other_mask: (P, S') bool or None.
        other None: the self-attention alone, (U, S, D); given back as `attended`, a later call has it done.
        """
        if other is None:
            return self.self_attention(own, own, own_mask)
        # Positions that differ by pair can be selected only once the states are per pair.
        late = attended is not None or (own_rows is not None and read.positions is not None)
        if attended is None:
            attended = self.self_attention(own if late else read.select(own), own, own_mask)
        if late and not read.everything:
            attended, own_rows = read.select(gather(attended, own_rows)), None
        return self.ffn(self.cross_attention(attended, other, own_rows, other_rows, other_mask, read))

    def attention(self, own: Tensor, other: Tensor, own_mask: Tensor | None, other_mask: Tensor | None) -> Tensor:
        """(P, heads, S, S'), the cross-attention probabilities, of inputs that are per pair already."""
        cross = self.cross_attention
        (q,) = split_heads(cross.q(cross.before(self.self_attention(own, own, own_mask))), 1, cross.heads)
        k, _ = split_heads(cross.kv(cross.other_norm(other)), 2, cross.heads)
        return probabilities(q, k, other_mask)


class CrossEncoder(nn.Module):
    """The cross-modal encoder as the tower sees it: `layers` steps on the states of both modalities.

    width: of the states. norm_eps: the official code has 1e-12 here (and in the MLM head), transformers' port 1e-5.
    norm: see SubLayer; with "pre" what the last layer gives out has a norm of its own (final_norm). init_std: deviation
    of the tower's new weights, 0.02 in the official code. It suits the widths of base and large; narrow layers (128)
    hardly pass anything on with it and learn several times as slowly.
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
    ):
        super().__init__()
        for key, value in (("width", width), ("heads", heads)):
            check_range(f"cross.{key}", value, at_least=1)
        check_range("cross.layers", layers, at_least=0)
        check_range("cross.ffn_ratio", ffn_ratio, above=0)
        check_range("cross.dropout", dropout, at_least=0, below=1)
        check_range("cross.norm_eps", norm_eps, above=0)
        check_range("cross.init_std", init_std, above=0)
        if width % heads:
            raise ConfigError(f"cross.heads={heads} does not divide cross.width={width}")
        if norm not in ("post", "pre"):
            raise ConfigError(f"cross.norm={norm}: allowed are post, pre")
        self.width = width
        self.layers = layers
        self.init_std = init_std
        self.checkpointing = "none"
        self.build(width, heads, ffn_ratio, dropout, norm_eps, norm)
        init_new(self, init_std)

    def build(self, width: int, heads: int, ffn_ratio: float, dropout: float, norm_eps: float, norm: str) -> None:
        """Makes the layers, of this size each; their weights are drawn afterwards."""
        raise NotImplementedError

    def forward(
        self,
        layer: int,
        text: Tensor,
        image: Tensor,
        text_rows: Tensor | None,
        image_rows: Tensor | None,
        text_mask: Tensor,
        pair_mask: Tensor,
        read_text: Reading | None,
        read_image: Reading | None,
        alone: tuple[Tensor | None, Tensor | None] = (None, None),
    ) -> tuple[Tensor | None, Tensor | None]:
        """One layer: text (U, L, D), image (U', S, D) -> (P, L, D), (P, S, D), or what is read of them, None where
        nothing is.

        text_rows, image_rows: (P,) the row of every pair, None where pair p uses row p. text_mask: (U, L) bool, True at
        real tokens; pair_mask: the same for every pair. alone: what `alone` made of text and image, in the first layer.
        """
        raise NotImplementedError

    def attention(self, layer: int, text: Tensor, image: Tensor, mask: Tensor) -> AttentionMaps:
        """What one layer attends to: text (P, L, D), image (P, S, D), its inputs by pair; mask (P, L) bool."""
        raise NotImplementedError

    def alone(self, modality: str, states: Tensor, mask: Tensor | None) -> Tensor | None:
        """What the first layer makes of one modality ("text" or "image") before it reads the other one, from its
        states (U, S, D); it holds for all passes over them. None: nothing."""
        return None

    def run(self, layer: nn.Module, *args) -> Tensor:
        """The layer's output, with as much kept for the backward pass as `checkpointing` says."""
        return checkpointing.run(self.checkpointing if self.training else "none", layer, *args)


class CoAttention(CrossEncoder):
    """A stack of cross-modal layers for each modality (the paper's). Layer l of both reads the same pair of inputs."""

    def build(self, width, heads, ffn_ratio, dropout, norm_eps, norm):
        def stack() -> nn.ModuleList:
            sizes = (width, heads, ffn_ratio, dropout, norm_eps, norm)
            return nn.ModuleList(CrossModalLayer(*sizes) for _ in range(self.layers))

        self.text_layers = stack()
        self.image_layers = stack()
        self.text_norm, self.image_norm = final_norm(width, norm_eps, norm), final_norm(width, norm_eps, norm)

    def alone(self, modality, states, mask):
        layer = (self.text_layers if modality == "text" else self.image_layers)[0]
        return self.run(layer, states, None, None, None, mask)

    def forward(self, layer, text, image, text_rows, image_rows, text_mask, pair_mask, *reads, alone=(None, None)):
        read_text, read_image = reads
        to_text = (text, image, text_rows, image_rows, text_mask, None, read_text, alone[0])
        to_image = (image, text, image_rows, text_rows, None, pair_mask, read_image, alone[1])
        text = None if read_text is None else self.run(self.text_layers[layer], *to_text)
        image = None if read_image is None else self.run(self.image_layers[layer], *to_image)
        if layer < self.layers - 1:
            return text, image
        return text if text is None else self.text_norm(text), image if image is None else self.image_norm(image)

    def attention(self, layer, text, image, mask):
        return AttentionMaps(
            self.text_layers[layer].attention(text, image, mask, None),
            self.image_layers[layer].attention(image, text, None, mask),
        )


def final_norm(width: int, norm_eps: float, norm: str) -> nn.Module:
    """What the sums of pre-norm layers need behind the last of them."""
    return nn.LayerNorm(width, eps=norm_eps) if norm == "pre" else nn.Identity()
