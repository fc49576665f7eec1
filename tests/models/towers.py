"""Small towers and inputs for the tests of the models."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bt.data.batch import Texts
from bt.models.bridges.add import AddBridge
from bt.models.bridges.none import NoBridge
from bt.models.bridgetower import BridgeTower
from bt.models.cross_modal import CoAttention
from bt.models.encoders.hf_text import HFText
from bt.models.encoders.open_clip_vit import OpenClipVision

VISION = {"width": 24, "layers": 3, "patch_size": 8, "head_width": 12, "mlp_ratio": 2.0, "quick_gelu": True}
TEXT = {
    "model_type": "roberta",
    "vocab_size": 50,
    "hidden_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 40,
    "max_position_embeddings": 34,
    "type_vocab_size": 1,
    "layer_norm_eps": 1e-5,
}


def make_tower(
    bridge: str = "add",
    cross_layers: int = 2,
    vision_layers: int = 3,
    text_layers: int = 3,
    dropout: float = 0.0,
    token_types: int = 2,
    channels: int = 3,
    **options,
) -> BridgeTower:
    """Widths of the three parts differ; all parameters are random, norms and biases too."""
    torch.manual_seed(0)
    make = AddBridge if bridge == "add" else NoBridge
    tower = BridgeTower(
        OpenClipVision(image_size=24, channels=channels, architecture={**VISION, "layers": vision_layers}),
        HFText(config={**TEXT, "num_hidden_layers": text_layers}, dropout=dropout),
        make(16, cross_layers),
        make(16, cross_layers),
        CoAttention(width=16, heads=2, layers=cross_layers, dropout=dropout),
        token_types,
        **options,
    )
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return tower


def make_images(number: int, channels: int = 3) -> Tensor:
    return torch.randn(number, channels, 24, 24, generator=torch.Generator().manual_seed(1))


def make_texts(number: int, tokens: int = 9) -> Texts:
    """Texts of different lengths, the first of the full length."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(5, 50, (number, tokens), generator=generator)
    lengths = tokens - torch.arange(number) % 5
    mask = torch.arange(tokens) < lengths[:, None]
    ids[:, 0] = 0
    return Texts(ids.masked_fill(~mask, 1), mask)


def gradients(module: nn.Module) -> dict[str, Tensor]:
    """Gradients of the parameters that have one."""
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
