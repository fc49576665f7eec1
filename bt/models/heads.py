"""Poolers and task heads (official heads.py), and the initialisation of everything that is not pre-trained."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bt.errors import ConfigError


@torch.no_grad()
def init_new(module: nn.Module, std: float = 0.02) -> None:
    """Weights of linear maps and embeddings from N(0, std), biases 0, norms 1 and 0 (official init_weights)."""
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Embedding):
            part.weight.normal_(0.0, std)
        elif isinstance(part, nn.LayerNorm):
            part.weight.fill_(1.0)
        if isinstance(part, nn.Linear | nn.LayerNorm) and part.bias is not None:
            part.bias.zero_()


class Pooler(nn.Module):
    """tanh of a linear map of the [CLS] state: (P, D) -> (P, D)."""

    def __init__(self, width: int, init_std: float = 0.02):
        super().__init__()
        self.dense = nn.Linear(width, width)
        init_new(self, init_std)

    def forward(self, cls: Tensor) -> Tensor:
        return torch.tanh(self.dense(cls))


class MLMHead(nn.Module):
    """(..., D) -> (..., vocabulary). The decoder is not tied to the word embeddings, as in the official code."""

    def __init__(self, width: int, vocab_size: int, norm_eps: float = 1e-12):
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=norm_eps)
        self.decoder = nn.Linear(width, vocab_size)
        init_new(self)

    def forward(self, states: Tensor) -> Tensor:
        return self.decoder(self.norm(F.gelu(self.dense(states))))


class ITMHead(nn.Module):
    """Fused [CLS] (P, 2 * width) -> logits (P, 2), class 1 = match. `width` is the cross-modal width."""

    def __init__(self, width: int):
        super().__init__()
        self.fc = nn.Linear(2 * width, 2)
        init_new(self)

    def forward(self, cls: Tensor) -> Tensor:
        return self.fc(cls)


class ITCHead(nn.Module):
    """Uni-modal [CLS] (U, in_features) -> L2-normalised features (U, size)."""

    def __init__(self, in_features: int, size: int):
        super().__init__()
        self.fc = nn.Linear(in_features, size)
        init_new(self)

    def forward(self, cls: Tensor) -> Tensor:
        return F.normalize(self.fc(cls), dim=-1)


class ClassifierHead(nn.Sequential):
    """(P, in_features) -> (P, classes): Linear, LayerNorm, GELU, Linear, or with `layers` = 1 a single Linear."""

    officially_decayed = ("1",)

    def __init__(self, in_features: int, hidden: int, classes: int, layers: int = 2):
        if layers == 1:
            parts = [nn.Linear(in_features, classes)]
        elif layers == 2:
            parts = [nn.Linear(in_features, hidden), nn.LayerNorm(hidden), nn.GELU(), nn.Linear(hidden, classes)]
        else:
            raise ConfigError(f"layers={layers} of a classifier head: allowed are 1, 2")
        super().__init__(*parts)
        init_new(self)


class SentenceHead(nn.Module):
    """First token's state (P, in_features) -> (P, outputs): dropout, Linear, tanh, dropout, Linear (transformers'
    RobertaClassificationHead, whose names it has)."""

    def __init__(self, in_features: int, outputs: int, dropout: float):
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.dense = nn.Linear(in_features, in_features)
        self.out_proj = nn.Linear(in_features, outputs)
        init_new(self)

    def forward(self, cls: Tensor) -> Tensor:
        return self.out_proj(self.dropout(torch.tanh(self.dense(self.dropout(cls)))))
