"""What a model costs, part by part: parameters, and floating-point operations of a forward pass."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from bt.data.batch import Texts
from bt.models.bridgetower import BridgeTower, Need
from bt.tasks.base import Objective, TaskModel

PARTS = ("vision", "text", "bridges", "cross", "heads")


@contextlib.contextmanager
def counting_flops() -> Iterator[FlopCounterMode]:
    """Counts the floating-point operations within it, those of text encoders in evaluation mode too: torch's fused
    encoder layer is one operation, which the counter does not know."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with FlopCounterMode(display=False) as counter:
            yield counter
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


@dataclass(frozen=True)
class Cost:
    """Parameters and FLOPs of the parts.

    parts: the encoders; the bridges (managers, link towers, METER's fusion) with their norms; the cross-modal encoder
    with the projections into it, the type table and the poolers; the heads of the objectives.
    flops: of the forward pass of one image and one text of so many tokens to the pooled [CLS] of both, two for a
    multiplication with its addition. Matrix products, convolutions and attention are counted, elementwise operations
    are not: a bridge that has nothing else (add, static managers) counts 0. A part that no objective reads has none.
    heads: one row through each linear map.
    """

    parameters: dict[str, int]
    flops: dict[str, int]
    tokens: int

    def __str__(self) -> str:
        shown = (f"{part} {self.parameters[part] / 1e6:.3g} M, {self.flops[part] / 1e9:.3g}" for part in PARTS)
        return f"parameters, and GFLOP of an image with a text of {self.tokens} tokens: {'; '.join(shown)}"

    def tags(self) -> dict[str, str]:
        """Flat, for a tracking store: `cost.parameters.bridges`, `cost.flops.bridges` ..."""
        counts = {"parameters": self.parameters, "flops": self.flops}
        return {f"cost.{kind}.{part}": str(value) for kind, found in counts.items() for part, value in found.items()}


def part_of(name: str) -> str:
    """The part that a parameter of a TaskModel belongs to, by its name."""
    owner, _, rest = name.partition(".")
    module = rest.partition(".")[0]
    if owner != "tower":
        return "heads"
    if module in ("vision", "text"):
        return module
    return "bridges" if module.endswith("_bridge") else "cross"


def measure_cost(model: TaskModel, max_text_len: int) -> Cost:
    """Counts a model on its device; leaves its mode, its gradients and the random state as they are.

    max_text_len: tokens of the text. A forward pass of one pair is made, so this takes as long as one.
    """
    parameters = dict.fromkeys(PARTS, 0)
    for name, parameter in model.named_parameters():
        parameters[part_of(name)] += parameter.numel()
    maps = [module for module in model.objectives.modules() if isinstance(module, nn.Linear)]
    flops = tower_flops(model, max_text_len) | {"heads": sum(2 * linear.weight.numel() for linear in maps)}
    return Cost(parameters, flops, max_text_len)


class _Pass(nn.Module):
    """One pair through what the objectives read of the tower, as a module of its own: the counter goes by modules."""

    def __init__(self, tower: BridgeTower, objectives: Iterable[Objective]):
        super().__init__()
        self.tower = tower
        self.alone = {part for objective in objectives for part in objective.tower_parts or ()}
        self.encodes = any(objective.tower_parts is None for objective in objectives)
        self.fuses = self.encodes and tower.cross.layers > 0 and any(objective.fuses for objective in objectives)

    def forward(self, pixels: Tensor, texts: Texts, pairs: Tensor) -> None:
        if not self.encodes:
            if "vision" in self.alone:
                self.tower.vision(pixels, 1)
            if "text" in self.alone:
                self.tower.text(texts.ids, texts.mask, 1)
            return
        images, encoded = self.tower.encode_images(pixels), self.tower.encode_texts(texts)
        if self.fuses:
            self.tower.fuse(images, encoded, pairs, Need(cls=True))


def tower_flops(model: TaskModel, tokens: int) -> dict[str, int]:
    tower = model.tower
    device, side = tower.type_embeddings.weight.device, tower.vision.image_size
    pixels = torch.zeros(1, tower.vision.channels, side, side, device=device)
    ids = torch.zeros(1, tokens, dtype=torch.int64, device=device)
    texts, pairs = Texts(ids, torch.ones_like(ids, dtype=torch.bool)), ids.new_zeros(1, 2)
    modes = {module: module.training for module in tower.modules()}
    try:
        tower.eval()
        with torch.no_grad(), counting_flops() as counter:
            _Pass(tower, list(model.objectives.values()))(pixels, texts, pairs)
    finally:
        for module, mode in modes.items():
            module.training = mode
    counts = {name: sum(found.values()) for name, found in counter.get_flop_counts().items()}

    def of(*modules: str) -> int:
        return sum(counts.get(f"_Pass.tower.{name}", 0) for name in modules)

    vision, text = of("vision"), of("text")
    # By its outermost modules: the first layer's self-attention is called from outside the cross-modal encoder.
    below = [name for name in counts if name.startswith("_Pass.tower.cross.")]
    layers = [name for name in below if not any(name.startswith(f"{other}.") for other in below)]
    cross = sum(counts[name] for name in layers)
    cross += of("text_projection", "image_projection", "text_pooler", "image_pooler")
    # What is left: bridges are called before the projection too (Bridge.merge), which no module's call encloses.
    return {
        "vision": vision,
        "text": text,
        "bridges": counter.get_total_flops() - vision - text - cross,
        "cross": cross,
    }
