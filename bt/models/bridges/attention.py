"""Bridges that attend from the cross-modal state x to the uni-modal state y of the same modality.

At base size (five bridges for each modality) 23.6 M parameters, 70.8 M with the feed-forward part, as the paper's
ablation lists them.
"""

from __future__ import annotations

from torch import Tensor, nn

from bt.errors import ConfigError
from bt.models.bridges.base import PairwiseBridge
from bt.models.checks import check_range
from bt.models.cross_modal import attend, split_heads
from bt.models.heads import init_new


class _Attention(nn.Module):
    """Multi-head attention without norm and residual."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(self, queries: Tensor, states: Tensor, mask: Tensor | None) -> Tensor:
        """queries (P, S, D), states (P, S', D), mask (P, S') -> (P, S, D)."""
        (q,) = split_heads(self.q(queries), 1, self.heads)
        k, v = split_heads(self.kv(states), 2, self.heads)
        return self.out(attend(q, k, v, mask, 0.0))


class CrossAttentionBridge(PairwiseBridge):
    """MCA(x, y), queries from x, keys and values from y (paper, definition (g)). Padding is no key."""

    needs_masks = True

    def __init__(self, width: int, layers: int, heads: int = 12, norm_eps: float = 1e-5, init_std: float = 0.02):
        super().__init__(width, layers, norm_eps)
        check_range("bridge.heads", heads, at_least=1)
        check_range("bridge.init_std", init_std, above=0)
        if width % heads:
            raise ConfigError(f"bridge.heads={heads} does not divide cross.width={width}")
        self.attention = nn.ModuleList(_Attention(width, heads) for _ in range(layers - 1))
        init_new(self.attention, init_std)

    def mix(
        self, layer: int, uni: Tensor, own: Tensor, own_mask: Tensor | None = None, other_mask: Tensor | None = None
    ) -> Tensor:
        return self.attention[layer - 1](own, uni, own_mask)


class CrossAttentionFFNBridge(CrossAttentionBridge):
    """FFN(MCA(x, y)), the feed-forward part four times as wide (paper, definition (h))."""

    def __init__(self, width: int, layers: int, heads: int = 12, norm_eps: float = 1e-5, init_std: float = 0.02):
        super().__init__(width, layers, heads, norm_eps, init_std)
        self.ffn = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
            for _ in range(layers - 1)
        )
        init_new(self.ffn, init_std)

    def mix(
        self, layer: int, uni: Tensor, own: Tensor, own_mask: Tensor | None = None, other_mask: Tensor | None = None
    ) -> Tensor:
        return self.ffn[layer - 1](super().mix(layer, uni, own, own_mask))
