"""Gradient checkpointing: the backward pass computes again what a layer did not keep.

"full" keeps a layer's input alone and runs the layer twice. "cheap" keeps the results of matrix products and attention
beside it and computes again what lies between them (norms, activations, residual sums, dropout): about a third less
memory for a few per cent more time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch._ops import OpOverload
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

MODES = ("none", "cheap", "full")
# A product with so many multiplications for each number of its result is worth its memory; scores of attention, with
# as many as a head is wide, are not.
INNER = 128

_aten = torch.ops.aten
_PRODUCTS = {_aten.mm.default: 0, _aten.addmm.default: 1, _aten.bmm.default: 0, _aten.baddbmm.default: 1}
_ATTENTION = {
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
}


def options(mode: str, pre_norm: bool = False) -> dict[str, Any]:
    """Arguments of torch.utils.checkpoint.checkpoint for a mode other than "none"."""
    chosen: dict[str, Any] = {"use_reentrant": False}
    if mode == "cheap":
        contexts = partial(create_selective_checkpoint_contexts, _is_kept_in_pre_norm if pre_norm else _is_kept)
        chosen |= {"context_fn": contexts, "respect_saved_tensors_hooks": True}
    return chosen


def run(mode: str, layer: Callable[..., Any], *args: Any, pre_norm: bool = False) -> Any:
    """layer(*args), with as much of it kept for the backward pass as the mode says.

    pre_norm: the layer ends with the sum of its input and its FFN's second product, whose result no gradient needs.
    """
    if mode == "none":
        return layer(*args)
    return checkpoint(layer, *args, **options(mode, pre_norm))


def wrap_blocks(blocks: Iterable[nn.Module], mode: str) -> None:
    """For libraries that call their (pre-norm) blocks themselves: these follow the mode while they are in training."""
    for block in blocks:
        block.__dict__.pop("forward", None)
        if mode != "none":
            block.forward = partial(_forward, block, block.forward, mode)


def _forward(block: nn.Module, forward: Callable[..., Any], mode: str, *args: Any, **kwargs: Any) -> Any:
    return run(mode if block.training else "none", partial(forward, **kwargs), *args, pre_norm=True)


def _is_kept_in_pre_norm(_context: Any, op: OpOverload, *args: Any, **kwargs: Any) -> bool:
    if op in _PRODUCTS and args[_PRODUCTS[op]].shape[-1] > args[_PRODUCTS[op] + 1].shape[-1]:
        return False  # the FFN's second one narrows
    return _is_kept(_context, op, *args, **kwargs)


def _is_kept(_context: Any, op: OpOverload, *args: Any, **kwargs: Any) -> bool:
    if op in _PRODUCTS:
        return args[_PRODUCTS[op]].shape[-1] >= INNER
    # With dropout it runs again: if it did not draw its numbers anew, what is drawn behind it would differ.
    return op in _ATTENTION and _dropout(op, args, kwargs) == 0


def _dropout(op: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    place = [argument.name for argument in op._schema.arguments].index("dropout_p")
    return args[place] if place < len(args) else kwargs.get("dropout_p", 0.0)
