"""BridgeTower and its family of vision-language models.

`bt.load(path)` gives a trained model that can be asked about pictures; training and evaluation are commands.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from bt.inference.predictor import Predictor


def load(
    path: str | Path,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "fp32",
    batch: int = 32,
    *,
    tokenizer: str | None = None,
    labels: Mapping[str, list[str]] | None = None,
) -> Predictor:
    """The trained model at `path`, ready to use; see bt.inference.predictor.Predictor.

    path: a run directory (its best checkpoint, else its last), a checkpoint directory or its model.safetensors, a
    folder that `python -m bt.checkpoint import` wrote, a folder of transformers or a name on its hub, a released file.
    device: cpu, cuda, cuda:N, or auto (a GPU where there is one). dtype: of the forward passes, fp32, bf16 or fp16 or
    torch's name of it; weights stay in fp32, as in training. batch: inputs in one forward pass.
    tokenizer: folder, name or tokenizer.json, where the path has none of its own. labels: label maps where it has none,
    such as {"answers": [...]}.
    Raises bt.errors.UserError: CheckpointError where the weights are missing, damaged or of another architecture.

    >>> bt.load("runs/vqa").answer("a.jpg", "what colour is it?")
    [Choice(name='red', probability=0.97), ...]
    """
    from bt.inference.predictor import Predictor  # torch, which takes seconds to import
    from bt.interop.load import load_model

    return Predictor(load_model(path, tokenizer=tokenizer, labels=labels), device, dtype, batch)
