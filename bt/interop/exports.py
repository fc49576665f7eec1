"""Writing models in other programs' formats, or saying why they cannot hold them.

A target format fixes what is an option here. Where that changes the outputs beyond rounding, or where there is no place
for a tensor, the export is refused with the reason; what differs within rounding (an epsilon) or in training alone
(dropout) is written as the target has it, said, and kept in a record beside the tensors, from which an import restores
it; see bt.interop.record.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from bt.errors import CheckpointError
from bt.interop.folder import Bundle
from bt.interop.imports import Row, check, grouped, part_of
from bt.interop.record import RECORDED
from bt.models.cross_modal import CoAttention
from bt.models.encoders.hf_text import HFText
from bt.models.encoders.open_clip_vit import OpenClipVision
from bt.models.quick_gelu import QuickGELU
from bt.tasks.base import TaskModel

# Of heads that a format has no place for, why.
WHY_NOT = {
    "contrastive": "the released code has no contrastive head on the fused pair",
    "itc": "transformers' contrastive image head reads the projected image, this one reads it before the projection",
}


@dataclass
class Sizes:
    """What a model is built of, read off the module itself, so that every default is resolved."""

    model: TaskModel
    bridge: str
    text: Any = None  # the configuration of transformers
    refused: list[str] = field(default_factory=list)
    # Dotted key: (value here, value of the target).
    differs: dict[str, tuple[Any, Any]] = field(default_factory=dict)

    def need(self, holds: bool, reason: str) -> None:
        if not holds:
            self.refused.append(reason)

    def say(self, key: str, own: Any, target: Any) -> None:
        """key: one of RECORDED, which are all that an import restores."""
        if key not in RECORDED:
            raise KeyError(key)
        if own != target:
            self.differs[key] = (own, target)

    @property
    def cross_layer(self) -> Any:
        return self.model.tower.cross.text_layers[0]


def measure(bundle: Bundle) -> Sizes:
    """The model's sizes, and what neither of the formats can hold."""
    model = check(bundle)
    tower, bridge = model.tower, bundle.nodes["bridge"]
    sizes = Sizes(model, str(bridge["_target_"]))
    sizes.need(isinstance(tower.vision, OpenClipVision), "its image encoder is no CLIP ViT")
    sizes.need(isinstance(tower.text, HFText), "its text encoder is none of transformers")
    sizes.need(
        type(tower.cross) is CoAttention and tower.cross.layers > 0, "its cross-modal layers are no co-attention"
    )
    if sizes.refused:
        return sizes
    sizes.text = tower.text.model.config
    block, conv = tower.vision.visual.transformer.resblocks[0], tower.vision.visual.conv1
    sizes.need(isinstance(block.mlp.gelu, QuickGELU), "its image encoder has GELU, the target QuickGELU")
    sizes.need(block.attn.head_dim == 64, f"its image encoder's heads are {block.attn.head_dim} wide, the target's 64")
    hidden = block.mlp.c_fc.out_features / tower.vision.width
    sizes.need(hidden == 4, f"its image encoder's feed-forward layers are {hidden:g} times as wide, the target's 4")
    sizes.need(conv.in_channels == 3, f"its images have {conv.in_channels} channels, the target's 3")
    sizes.need(not sizes.cross_layer.ffn.pre, "its cross-modal layers have their norms before the sub-layers")
    sizes.need(bridge.get("sides", "both") == "both", f"bridge.sides={bridge.get('sides')}")
    sizes.need(bridge.get("uni_layers", "top") == "top", f"bridge.uni_layers={bridge.get('uni_layers')}")
    sizes.need(tower.text.cls == "first", "its text encoder's last token stands for the text")
    return sizes


def need_heads(sizes: Sizes, bundle: Bundle, heads: tuple[str, ...]) -> None:
    """Refuses the heads of `bundle` that are not among `heads`."""
    for name in dict.fromkeys(key.split(".")[1] for key in bundle.state if key.startswith("objectives.")):
        reason = WHY_NOT.get(name, "the format has no place for it")
        sizes.need(name in heads, f"the head {name}: {reason}; leave it out by --leave-out {name}")


def refuse(sizes: Sizes, target: str) -> None:
    """Raises CheckpointError with every reason that was found."""
    if sizes.refused:
        raise CheckpointError(f"{target} cannot hold this model: {'; '.join(sizes.refused)}")


def record_of(bundle: Bundle, sizes: Sizes) -> dict[str, Any]:
    """What the target has no place for, as JSON values; see bt.interop.record."""
    record: dict[str, Any] = {"labels": bundle.labels, "settings": {k: list(v) for k, v in sizes.differs.items()}}
    temperature = bundle.state.get("objectives.itc.temperature")
    return record | ({} if temperature is None else {"temperature": temperature.item()})


def rows_of(bundle: Bundle, kept: dict[str, Tensor], sizes: Sizes, others: dict[str, str]) -> list[Row]:
    """The report: what was written, left out, written otherwise, and what else is to be said, by part."""
    rows = grouped("written", bundle.state, part_of)
    rows += grouped("written", kept, str, "unused by the model, as it was read")
    left = {key: tensor for key, tensor in bundle.unused.items() if key not in kept}
    rows += grouped("left out", left, str, "the model never uses it, and the target has no such tensor")
    for key, (own, target) in sizes.differs.items():
        rows.append(Row("differs", key, 0, 0, f"{own} here, {target} there; an import of bt restores it"))
    return rows + [Row("said", part, 0, 0, note) for part, note in others.items()]
