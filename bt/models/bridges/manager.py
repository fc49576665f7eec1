"""ManagerTower's managers (arXiv 2306.00103, section 3; official heads.py): every cross-modal layer reads all managed
uni-modal layers, in proportions of its own."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bt.errors import ConfigError
from bt.models.bridges.base import Bridge
from bt.models.checks import check_range
from bt.models.gather import gather
from bt.models.heads import init_new


class _Manager(nn.Module):
    """What both kinds share: a norm for each expert, the softmax over them with its temperature, and the noise.

    Experts are the N managed uni-modal states with their layer embedding. In training, noise from N(0, 1/N) is added to
    the scores of every entry of the experts before the softmax.
    """

    def __init__(self, width: int, experts: int, norm_eps: float, temperature: float, noise: bool, first: bool):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width, eps=norm_eps) for _ in range(experts))
        self.own_norm = None if first else nn.LayerNorm(width, eps=norm_eps)
        self.temperature = nn.Parameter(torch.tensor(float(temperature)))
        self.noise = noise
        self.officially_decayed = (*(f"norms.{number}" for number in range(experts)), "own_norm")

    def experts(self, uni: list[Tensor]) -> Tensor:
        """N x (U, S, D) -> (U, N, S, D), normalised."""
        return torch.stack([norm(state) for norm, state in zip(self.norms, uni, strict=True)], dim=1)

    def aggregate(self, scores: Tensor, experts: Tensor) -> Tensor:
        """scores, broadcast to experts (B, N, S, D) -> their weighted sum (B, S, D)."""
        if self.training and self.noise:
            scores = scores + torch.randn_like(experts) / len(self.norms)
        return (self.proportions(scores) * experts).sum(dim=1)

    def proportions(self, scores: Tensor) -> Tensor:
        """scores (B, N, ...) -> the share of each expert, which add up to 1 over N."""
        return torch.softmax(scores / self.temperature, dim=1)


class _Static(_Manager):
    """sum_i softmax_i(w_i / t) * LN_i(h_i), and after the first layer + w_c * LN_c(c), c the previous output."""

    def __init__(self, width: int, experts: int, *, weights: int, first: bool, **shared):
        super().__init__(width, experts, first=first, **shared)
        self.scores = nn.Parameter(torch.full((experts, 1, weights), 1 / experts))
        self.own_weight = None if first else nn.Parameter(torch.ones(weights))

    def forward(self, uni: list[Tensor], rows: Tensor | None, own: Tensor | None) -> Tensor:
        # Independent of the pair: computed per unique input, so that the pairs of one share its noise.
        mixed = self.aggregate(self.scores[None], self.experts(uni))
        return mixed if own is None else gather(mixed, rows) + self.own_weight * self.own_norm(own)


class _Adaptive(_Manager):
    """As static, but scores s = W [A y'; c'] + b of each token: c' = LN_c(c), y' = LN_q(other modality's output),
    A = softmax((W_q c') (W_k y')^T / sqrt(D)) with a single head."""

    def __init__(self, width: int, experts: int, *, weights: int, attend_padding: bool, **shared):
        super().__init__(width, experts, first=False, **shared)
        self.own_weight = nn.Parameter(torch.ones(weights))
        self.other_norm = nn.LayerNorm(width, eps=shared["norm_eps"])
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width)
        self.controller = nn.Linear(2 * width, experts)
        self.attend_padding = attend_padding

    def forward(
        self, uni: list[Tensor], rows: Tensor | None, own: Tensor, other: Tensor, other_mask: Tensor | None
    ) -> Tensor:
        own, other = self.own_norm(own), self.other_norm(other)
        scores = self.score(own, other, other_mask)
        return self.aggregate(scores, gather(self.experts(uni), rows)) + self.own_weight * own

    def score(self, own: Tensor, other: Tensor, other_mask: Tensor | None) -> Tensor:
        """Of the normalised outputs of both modalities: (P, N, S, 1)."""
        mask = None if self.attend_padding or other_mask is None else other_mask[:, None, :]
        scale = 1 / math.sqrt(own.shape[-1])
        read = F.scaled_dot_product_attention(self.q(own), self.k(other), other, attn_mask=mask, scale=scale)
        return self.controller(torch.cat([read, own], dim=-1)).transpose(1, 2)[..., None]


class ManagerBridge(Bridge):
    """A manager for each cross-modal layer; the first is static in both kinds, since there is no query yet.

    kind: static (official SAUE) or adaptive (AAUE). managed: uni-modal layers that the managers read, the top ones.
    weights: "vector", a learned weight for each entry of the width, or "scalar"; adaptive scores are always one number
    for a token. temperature: of the softmax, learned, its starting value. noise: whether training adds noise to the
    scores. attend_padding: the official adaptive managers attend to the padding of texts too, so that their output
    depends on how long the others of a batch are; False leaves it out, True is for their checkpoints.
    The released code decays the managers' norms, whose names its rule misses (optimizer.groups=official).
    """

    needs_masks = True
    # Official groups: the layer embeddings train at the base rate, the managers at that of the cross-modal part.
    parameters_at_base = ("layer_embeddings.",)

    def __init__(
        self,
        width: int,
        layers: int,
        kind: str = "adaptive",
        managed: int = 6,
        weights: str = "vector",
        temperature: float = 1.0,
        noise: bool = True,
        attend_padding: bool = False,
        norm_eps: float = 1e-5,
        init_std: float = 0.02,
    ):
        super().__init__()
        if kind not in ("static", "adaptive"):
            raise ConfigError(f"bridge.kind={kind}: allowed are static, adaptive")
        if weights not in ("vector", "scalar"):
            raise ConfigError(f"bridge.weights={weights}: allowed are vector, scalar")
        if layers < 1:
            raise ConfigError(f"cross.layers={layers}: managers need at least one cross-modal layer")
        check_range("bridge.managed", managed, at_least=1)
        for key, value in (("temperature", temperature), ("norm_eps", norm_eps), ("init_std", init_std)):
            check_range(f"bridge.{key}", value, above=0)
        self.states = managed
        self.layer_embeddings = nn.Embedding(managed, width)
        shared = {"norm_eps": norm_eps, "temperature": temperature, "noise": noise}
        shared["weights"] = width if weights == "vector" else 1
        managers: list[_Manager] = [_Static(width, managed, first=True, **shared)]
        for _ in range(layers - 1):
            if kind == "static":
                managers.append(_Static(width, managed, first=False, **shared))
            else:
                managers.append(_Adaptive(width, managed, attend_padding=attend_padding, **shared))
        self.managers = nn.ModuleList(managers)
        init_new(self, init_std)

    def forward(
        self,
        layer: int,
        uni: list[Tensor],
        rows: Tensor | None,
        own: Tensor | None,
        other: Tensor | None,
        own_mask: Tensor | None = None,
        other_mask: Tensor | None = None,
    ) -> Tensor:
        placed = [state + place for state, place in zip(uni, self.layer_embeddings.weight, strict=True)]
        manager = self.managers[layer]
        if isinstance(manager, _Static):
            return manager(placed, rows, own)
        return manager(placed, rows, own, other, other_mask)

    def shares(self, layer: int, own: Tensor | None, other: Tensor | None, other_mask: Tensor | None = None) -> Tensor:
        """What the managed uni-modal layers, bottom first, have in the input of cross-modal layer `layer`, without
        training's noise: of a static manager (1, managed, 1, width or 1), of an adaptive one (P, managed, S, 1).

        own, other: as in forward.
        """
        manager = self.managers[layer]
        if isinstance(manager, _Static):
            return manager.proportions(manager.scores[None])
        return manager.proportions(manager.score(manager.own_norm(own), manager.other_norm(other), other_mask))
