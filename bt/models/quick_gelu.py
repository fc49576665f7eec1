"""CLIP's activation, x sigmoid(1.702 x), in fewer passes over memory than its formula takes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from open_clip.transformer import QuickGELU as PlainQuickGELU
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

FACTOR = 1.702


class _QuickGELU(torch.autograd.Function):
    """As silu(1.702 x) / 1.702, whose kernels compute value and derivative in one go. Autograd keeps x alone; of the
    formula it would keep two tensors of the same size beside it."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return F.silu(FACTOR * x, inplace=True).div_(FACTOR)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.ops.aten.silu_backward(gradient, FACTOR * x)


class QuickGELU(nn.Module):
    """(...) -> (...), as open_clip's class of this name."""

    def forward(self, x: Tensor) -> Tensor:
        return _QuickGELU.apply(x)


def use_formula(model: nn.Module, formula: bool = True) -> None:
    """Puts open_clip's class, which computes it by its formula, in place of this one, or the other way round."""
    for module in [*model.modules()]:
        for name, child in module.named_children():
            if isinstance(child, QuickGELU | PlainQuickGELU):
                setattr(module, name, PlainQuickGELU() if formula else QuickGELU())
