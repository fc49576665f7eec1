"""torch.compile of a model's layers (trainer.compile)."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable

import torch
from torch import nn

from bt.engine.parallel import layers
from bt.errors import ConfigError

CPU_COMPILERS = ("g++", "clang++", "c++")
VARIANTS = 64


def compile_layers(model: nn.Module, device: torch.device, backend: str | Callable = "inductor") -> None:
    """Compiles each layer of the encoders in place; names of weights stay as they are.

    Layers of a kind share their code, so that it is compiled once for all of them; what differs from batch to batch
    (texts and their lengths, pairs, masked positions) becomes a symbol when it is seen to differ, and is not compiled
    again afterwards. Raises ConfigError where there is no compiler.
    """
    if backend == "inductor" and device.type == "cpu":
        names = [os.environ["CXX"]] if os.environ.get("CXX") else CPU_COMPILERS
        if not any(shutil.which(name) for name in names):
            raise ConfigError(f"trainer.compile=true needs a C++ compiler on a CPU ({', '.join(names)}); none is there")
    # Code is compiled for each way in which a layer is called: first, in the middle or last, by what is read of it, in
    # training and in evaluation. Behind its own limit of 8 dynamo would go on without compiling.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, VARIANTS)
    for layer in layers(model):
        layer.compile(backend=backend)
