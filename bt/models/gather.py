"""Rows of unique inputs, and positions of pairs, as late and as few as possible."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def gather(states: Tensor, rows: Tensor | None) -> Tensor:
    """states (U, ...) -> (P, ...): the row of every pair; `rows` None means that pair p uses row p.

    `index_select` and not `states[rows]`: its backward is several times as fast on a CPU.
    """
    return states if rows is None else states.index_select(0, rows)


def rows_or_none(rows: Tensor, unique: int) -> Tensor | None:
    """None where pair p uses row p of `unique` rows, so that nothing is copied; else the rows themselves."""
    # An exported graph is for any rows.
    if (
        not torch.compiler.is_exporting()
        and len(rows) == unique
        and torch.equal(rows, torch.arange(unique, device=rows.device))
    ):
        return None
    return rows


@dataclass(frozen=True)
class Reading:
    """Which positions of a cross-modal layer's output are read: all of them, the first, or those of a mask.

    positions, valid: (P, R), the read positions of every pair in ascending order, padded to the largest number R.
    Only a mask has them. An output read by a mask is packed: (M, D), row-major over the mask.
    """

    first: bool = False
    positions: Tensor | None = None
    valid: Tensor | None = None

    @property
    def everything(self) -> bool:
        return not self.first and self.positions is None

    @staticmethod
    def of(mask: Tensor) -> Reading:
        """mask: (P, S) bool."""
        most = max(int(mask.sum(1).max()), 1)
        positions = mask.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :most]
        return Reading(positions=positions, valid=mask.gather(1, positions))

    def select(self, states: Tensor) -> Tensor:
        """(P, S, D) -> (P, R, D): all, the first (R = 1) or the masked positions with their padding."""
        if self.first:
            return states[:, :1]
        if self.positions is None:
            return states
        # Not take_along_dim: torch.compile would make a program for each number of tokens of it.
        return states.gather(1, self.positions[:, :, None].expand(-1, -1, states.shape[-1]))

    def pack(self, states: Tensor) -> Tensor:
        """(P, R, D) -> (M, D) without the padding of a mask; anything else is left as it is."""
        return states if self.valid is None else states[self.valid]


ALL = Reading()


@dataclass(frozen=True)
class Wanted:
    """What is wanted of one modality's last layer: its [CLS], and all positions, a mask of them or none."""

    cls: bool
    positions: bool | Tensor

    @property
    def mask(self) -> Tensor | None:
        return self.positions if isinstance(self.positions, Tensor) else None

    def _read_mask(self) -> Tensor:
        mask = self.mask.clone()
        mask[:, 0] |= self.cls
        return mask

    def reading(self) -> Reading | None:
        """What the last layer has to compute; None: nothing, the layer is left out."""
        if self.mask is not None:
            return Reading.of(self._read_mask())
        if self.positions:
            return ALL
        return Reading(first=True) if self.cls else None

    def split(self, output: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """The last layer's output -> ([CLS] (P, D) or None, wanted positions (P, S, D) or (M, D) or None)."""
        if output is None:
            return None, None
        if self.mask is None:
            return (output[:, 0] if self.cls else None), (output if self.positions else None)
        if not self.cls:
            return None, output
        read = self._read_mask()
        is_first = read.nonzero()[:, 1] == 0
        return output[is_first], output[self.mask[read]]
