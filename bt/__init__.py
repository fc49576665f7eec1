"""BridgeTower and its family of vision-language models.

`bt.load(path)` gives a trained model that can be asked about pictures; training and evaluation are commands.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from bt.inference.predictor import Predictor


def load(
    path: str | Path, device: str | torch.device = "cpu", dtype: str | torch.dtype = "fp32", batch: int = 32
) -> Predictor:
    """The trained model at `path`, ready to use; see bt.inference.predictor.Predictor.

    path: a run directory (its best checkpoint, else its last), a checkpoint directory or its model.safetensors.
    device: cpu, cuda, cuda:N, or auto (a GPU where there is one). dtype: of the forward passes, fp32, bf16 or fp16 or
    torch's name of it; weights stay in fp32, as in training. batch: inputs in one forward pass.
    Raises bt.errors.UserError: CheckpointError where the weights are missing, damaged or of another architecture.

    >>> bt.load("runs/vqa").answer("a.jpg", "what colour is it?")
    [Choice(name='red', probability=0.97), ...]
    """
    from bt.inference.load import load_model  # torch, which takes seconds to import
    from bt.inference.predictor import Predictor

    return Predictor(load_model(path), device, dtype, batch)
