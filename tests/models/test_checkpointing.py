"""What gradient checkpointing keeps and computes again. (test_fuse, test_encoder_families: gradients stay the same.)"""

from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from bt.bench.case import kept_by_autograd
from bt.config import compose_run
from bt.errors import ConfigError
from bt.models import checkpointing
from bt.models.cross_modal import CrossModalLayer

WIDTH = 128


class Block(nn.Module):
    """Pre-norm, as those of image encoders."""

    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x):
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts[str(function.overloadpacket)] += 1
        return function(*args, **(kwargs or {}))


def work(mode: str, layer: nn.Module, *more, **how) -> tuple[Counter, int]:
    """Operations of the backward pass, and bytes that are kept for it."""
    torch.manual_seed(0)
    x = torch.randn(2, 9, WIDTH, requires_grad=True)
    with kept_by_autograd(layer.parameters()) as kept:
        output = checkpointing.run(mode, layer, x, *more, **how)
    with Operations() as operations:
        output.sum().backward()
    return operations.counts, sum(kept.values())


def test_cheap_computes_norms_and_activations_again_but_no_product():
    plain, most = work("none", Block())
    cheap, less = work("cheap", Block(), pre_norm=True)
    full, least = work("full", Block())
    assert cheap["aten.addmm"] == plain["aten.addmm"] == 0 and full["aten.addmm"] == 1
    again = {name: cheap[name] - plain[name] for name in ("aten.native_layer_norm", "aten.gelu")}
    assert again == {"aten.native_layer_norm": 1, "aten.gelu": 1}
    rows = 2 * 9 * WIDTH * 4
    # The block's input alone; and the first product beside it, four times as wide.
    assert least == rows and less == 5 * rows and most >= 10 * rows


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_a_cross_modal_layer(norm):
    """Its products and its attention are kept, whichever norm it has: none of them runs again."""
    states, mask = torch.randn(2, 5, WIDTH), torch.ones(2, 5, dtype=torch.bool)
    found = []
    for mode in checkpointing.MODES:
        layer = CrossModalLayer(WIDTH, 4, 4.0, 0.0, 1e-5, norm)
        counts, _ = work(mode, layer, states, None, None, None, mask)
        found.append(
            {name: counts[f"aten.{name}"] for name in ("addmm", "_scaled_dot_product_flash_attention_for_cpu")}
        )
    none, cheap, full = found
    assert cheap == none and full["addmm"] > none["addmm"]
    assert full["_scaled_dot_product_flash_attention_for_cpu"] > 0


def test_cheap_does_not_go_with_compiled_layers():
    with pytest.raises(ConfigError, match="trainer.gradient_checkpointing=cheap does not go with trainer.compile=true"):
        compose_run("trainer.gradient_checkpointing=cheap", "trainer.compile=true", "data.dir=shards")
