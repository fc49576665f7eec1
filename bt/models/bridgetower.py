"""BridgeTower: encode unique images and texts once, then fuse pairs of them.

Paper: BridgeTower (AAAI 2023), section 3; official bt_module.py. With the bridge "none" the same tower is METER.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from hydra.utils import get_class
from torch import Tensor, nn

from bt.data.batch import Texts
from bt.errors import ConfigError
from bt.models.bridges.base import Bridge
from bt.models.cross_modal import CoAttention
from bt.models.encoders.base import TextEncoder, VisionEncoder
from bt.models.gather import ALL, Wanted, gather, rows_or_none
from bt.models.heads import Pooler, init_new


@dataclass
class Encoded:
    """Unique images or texts after their encoder.

    states: the top uni-modal states (U, S, D) that the bridge reads, projected, with the type embedding.
    cls: (U, uni-modal width), the last layer's [CLS] before the projection (what ITC reads).
    mask: (U, S) bool, True at real tokens; None for images, which have no padding.
    """

    states: list[Tensor]
    cls: Tensor
    mask: Tensor | None = None


@dataclass
class Need:
    """What is wanted of a pass. text, image: all positions, or a bool mask (P, S) of them."""

    cls: bool = False
    text: bool | Tensor = False
    image: bool | Tensor = False


@dataclass
class Fused:
    """cls: (P, 2 * width), pooled text and image [CLS]. text, image: (P, S, width), or (M, width) for a mask, in
    row-major order. None for what was not wanted.
    """

    cls: Tensor | None = None
    text: Tensor | None = None
    image: Tensor | None = None


class BridgeTower(nn.Module):
    """The tower. type_embeddings: row 0 texts, row 1 images, row 2 (if any) the second image of a pair.

    The projection of each modality is shared by all bridged layers.
    """

    def __init__(
        self,
        vision: VisionEncoder,
        text: TextEncoder,
        text_bridge: Bridge,
        image_bridge: Bridge,
        cross: CoAttention,
        token_types: int = 2,
    ):
        super().__init__()
        for key, encoder, bridge in (("vision", vision, image_bridge), ("text", text, text_bridge)):
            if bridge.states > encoder.depth:
                raise ConfigError(
                    f"cross.layers={cross.layers}: the bridge reads the top {bridge.states} layers of each encoder, "
                    f"encoder.{key} has {encoder.depth}"
                )
        self.width = cross.width
        self.vision = vision
        self.text = text
        self.text_projection = nn.Linear(text.width, self.width)
        self.image_projection = nn.Linear(vision.width, self.width)
        self.type_embeddings = nn.Embedding(token_types, self.width)
        self.text_bridge = text_bridge
        self.image_bridge = image_bridge
        self.cross = cross
        self.text_pooler = Pooler(self.width, cross.init_std)
        self.image_pooler = Pooler(self.width, cross.init_std)
        for part in (self.text_projection, self.image_projection, self.type_embeddings):
            init_new(part, cross.init_std)

    def encode_images(self, images: Tensor, type_id: int | Tensor = 1) -> Encoded:
        """images (I, C, H, W), normalised (`vision.normalize`). type_id: row of the type table, or (I,) of them."""
        uni = self.vision(images, self.image_bridge.states)
        kind = self.type_embeddings.weight[type_id]
        kind = kind[:, None] if kind.dim() == 2 else kind
        return Encoded([self.image_projection(state) + kind for state in uni], uni[-1][:, 0])

    def encode_texts(self, texts: Texts) -> Encoded:
        uni = self.text(texts.ids, texts.mask, self.text_bridge.states)
        kind = self.type_embeddings.weight[0]
        return Encoded([self.text_projection(state) + kind for state in uni], uni[-1][:, 0], texts.mask)

    def fuse(self, images: Encoded, texts: Encoded, pairs: Tensor, need: Need) -> Fused:
        """pairs: (P, 2) int64, rows of `images` and of `texts`. What `need` does not name is not computed."""
        image_rows = rows_or_none(pairs[:, 0], len(images.cls))
        text_rows = rows_or_none(pairs[:, 1], len(texts.cls))
        pair_mask = gather(texts.mask, text_rows)
        wanted_text, wanted_image = Wanted(need.cls, need.text), Wanted(need.cls, need.image)
        text = image = None
        for layer in range(self.cross.layers):
            last = layer == self.cross.layers - 1
            text_in = self.text_bridge(layer, texts.states, text_rows, text, image)
            image_in = self.image_bridge(layer, images.states, image_rows, image, text)
            # The inputs of the first layer are still per unique text and image.
            rows = (text_rows, image_rows) if layer == 0 else (None, None)
            own_mask = texts.mask if layer == 0 else pair_mask
            read = wanted_text.reading() if last else ALL
            text_args = (text_in, image_in, *rows, own_mask, None, read)
            text = None if read is None else self.cross.run(self.cross.text_layers[layer], *text_args)
            read = wanted_image.reading() if last else ALL
            image_args = (image_in, text_in, *reversed(rows), None, pair_mask, read)
            image = None if read is None else self.cross.run(self.cross.image_layers[layer], *image_args)
        text_cls, text = wanted_text.split(text)
        image_cls, image = wanted_image.split(image)
        cls = torch.cat([self.text_pooler(text_cls), self.image_pooler(image_cls)], dim=-1) if need.cls else None
        return Fused(cls, text, image)

    def set_gradient_checkpointing(self, enabled: bool) -> None:
        self.vision.set_gradient_checkpointing(enabled)
        self.text.set_gradient_checkpointing(enabled)
        self.cross.checkpointing = enabled

    def parameter_role(self, name: str) -> Literal["base", "cross"]:
        """Which learning rate a parameter of the tower takes: the encoders and the type table the base rate."""
        return "base" if name.startswith(("vision.", "text.", "type_embeddings.")) else "cross"

    def adapt_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A state dict of this architecture, fitted to this tower's image size, channels and token types.

        A type row that the state lacks is a copy of row 1 (official: NLVR2's second image starts as the first); a
        table with more rows than this tower's is left as it is, and does not load.
        """
        prefix = "vision."
        vision = {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}
        fitted = {prefix + key: tensor for key, tensor in self.vision.adapt(vision).items()}
        adapted = {**state, **fitted}
        types = adapted.get("type_embeddings.weight")
        missing = 0 if types is None else len(self.type_embeddings.weight) - len(types)
        if missing > 0:
            adapted["type_embeddings.weight"] = torch.cat([types, types[1:2].expand(missing, -1)])
        return adapted


def build_tower(
    encoder: Mapping[str, Any],
    bridge: Mapping[str, Any],
    cross: Mapping[str, Any],
    *,
    vocab_size: int | None,
    pad_id: int | None = None,
    token_types: int = 2,
) -> BridgeTower:
    """The tower of the config nodes `encoder` (vision, text), `bridge` and `cross`: `_target_` and arguments each.

    encoder.text.tokenizer belongs to the data and is left out here. vocab_size, pad_id: the tokenizer's; without a
    pad_id the encoder keeps its own. Raises ConfigError.
    """
    vision = build("encoder.vision", encoder["vision"])
    text_config = {key: value for key, value in encoder["text"].items() if key != "tokenizer"}
    tokens = {"vocab_size": vocab_size} | ({} if pad_id is None else {"pad_id": pad_id})
    text = build("encoder.text", {**text_config, **tokens})
    cross = build("cross", cross)
    text_bridge, image_bridge = (build("bridge", bridge, width=cross.width, layers=cross.layers) for _ in range(2))
    return BridgeTower(vision, text, text_bridge, image_bridge, cross, token_types)


def build(key: str, config: Mapping[str, Any], **extra: Any) -> Any:
    """The object of a `_target_` node, with the arguments `extra` beside its own.

    Raises ConfigError that names the key where target or arguments do not fit, or the constructor refuses a value.
    """
    arguments = {**config, **extra}
    target = arguments.pop("_target_", None)
    try:
        cls = get_class(str(target))
    except Exception as error:
        raise ConfigError(f"{key}._target_={target} is no class that can be imported") from error
    signature = inspect.signature(cls)
    try:
        signature.bind(**arguments)
    except TypeError as error:
        allowed = ", ".join(name for name in signature.parameters if name not in extra)
        raise ConfigError(f"{key}: {error} of {target}; its options are {allowed}") from error
    try:
        return cls(**arguments)
    except (ValueError, ZeroDivisionError, TypeError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"{key}: {reason}") from error
