"""Autocast by the names of the configuration."""

from __future__ import annotations

import contextlib

import torch

AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, precision: str):
    """The context in which a forward pass runs; precision: one of trainer.precision's choices."""
    dtype = AUTOCAST[precision]
    return torch.autocast(device.type, dtype) if dtype else contextlib.nullcontext()
