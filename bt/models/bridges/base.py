"""The interface of a bridge."""

from __future__ import annotations

from torch import Tensor, nn


class Bridge(nn.Module):
    """Makes the input of cross-modal layer l of one modality. Each modality has its own instance.

    Attribute `states`: how many top uni-modal states it reads; `uni` holds exactly these, bottom first.
    """

    states: int

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
