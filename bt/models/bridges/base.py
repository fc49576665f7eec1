"""The interface of a bridge, and what the bridges with one uni-modal layer for each cross-modal layer share."""

from __future__ import annotations

from torch import Tensor, nn

from bt.models.checks import check_range
from bt.models.gather import gather


class Bridge(nn.Module):
    """Makes the input of cross-modal layer l of one modality. Each modality has its own instance.

    Built with `width` and `layers` of the cross-modal encoder and, if its constructor asks for them, `uni_width` and
    `depth` of the uni-modal encoder.
    Attributes: `states`, how many uni-modal states it reads; `uni` holds exactly these, bottom first.
    `parameters_at_base`: starts of the names of own parameters that train at the base learning rate and not at that of
    the cross-modal part. `needs_masks`: True for a bridge that attends to tokens: its forward then gets `own_mask` and
    `other_mask`, (P, S) bool, True at real tokens, or None where there is no padding.
    """

    states: int
    parameters_at_base: tuple[str, ...] = ()
    needs_masks: bool = False

    def forward(
        self, layer: int, uni: list[Tensor], rows: Tensor | None, own: Tensor | None, other: Tensor | None
    ) -> Tensor:
        """The input of cross-modal layer `layer`: (U, S, D) at layer 0, where nothing depends on the pair yet,
        then (P, S, D).

        uni: `states` tensors (U, S, D) of the unique inputs, projected, with the type embedding.
        rows: (P,) the row of each pair; None where pair p uses row p (bt.models.gather).
        own, other: output of the previous cross-modal layer of this modality (P, S, D) and of the other one
        (P, S', D); None at layer 0.
        """
        raise NotImplementedError

    def merge(self, uni: list[Tensor]) -> list[Tensor]:
        """Uni-modal states (U, S, uni_width) before the projection, bottom first -> those that are projected."""
        return uni


class PairwiseBridge(Bridge):
    """LayerNorm(mix(uni-modal state l, previous cross-modal output)), one norm per layer; LayerNorm(uni-modal state 0)
    before the first layer (paper, section 3.2). A subclass says what `mix` is.
    """

    def __init__(self, width: int, layers: int, norm_eps: float = 1e-5):
        super().__init__()
        check_range("bridge.norm_eps", norm_eps, above=0)
        self.states = layers
        self.norms = nn.ModuleList(nn.LayerNorm(width, eps=norm_eps) for _ in range(layers))

    def forward(
        self,
        layer: int,
        uni: list[Tensor],
        rows: Tensor | None,
        own: Tensor | None,
        other: Tensor | None,
        **masks: Tensor | None,
    ) -> Tensor:
        if own is None:
            return self.norms[0](uni[0])
        return self.norms[layer](self.mix(layer, gather(uni[layer], rows), own, **masks))

    def mix(self, layer: int, uni: Tensor, own: Tensor, **masks: Tensor | None) -> Tensor:
        """uni, own: (P, S, D) -> (P, S, D); layer >= 1. masks: see Bridge.needs_masks."""
        raise NotImplementedError
