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
from bt.models.attention import AttentionMaps
from bt.models.bridges.base import Bridge
from bt.models.bridges.none import NoBridge
from bt.models.cross_modal import CrossEncoder
from bt.models.encoders.base import TextEncoder, VisionEncoder
from bt.models.gather import ALL, Wanted, gather, rows_or_none
from bt.models.heads import Pooler, init_new


@dataclass
class Encoded:
    """Unique images or texts after their encoder.

    states: the top uni-modal states (U, S, D) that the bridge reads, projected, with the type embedding.
    cls: (U, uni-modal width), the last layer's [CLS] before the projection (what ITC reads).
    mask: (U, S) bool, True at real tokens; None for images, which have no padding.
    entered: what the first cross-modal layer reads, and what it makes of that alone; kept for all passes over them.
    """

    states: list[Tensor]
    cls: Tensor
    mask: Tensor | None = None
    entered: tuple[Tensor, Tensor | None] | None = None

    def used(self, rows: Tensor) -> tuple[Encoded, Tensor]:
        """What `rows` (P,) name, each once, and the rows among that; the rest would still pass the part of the first
        cross-modal layer that is done per image and text."""
        used, rows = rows.unique(return_inverse=True)
        mask = None if self.mask is None else gather(self.mask, used)
        return Encoded([gather(state, used) for state in self.states], gather(self.cls, used), mask), rows

    def split(self, sizes: list[int]) -> list[Encoded]:
        """Parts of so many rows each."""
        states = [state.split(sizes) for state in self.states]
        masks = [None] * len(sizes) if self.mask is None else self.mask.split(sizes)
        classes = self.cls.split(sizes)
        return [Encoded([s[part] for s in states], classes[part], masks[part]) for part in range(len(sizes))]


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
    uni_layers: which uni-modal layers the bridges read, see choose_layers. stop_gradient: no gradient passes through
    the bridges into the encoders, but for the input of the first cross-modal layer.
    """

    def __init__(
        self,
        vision: VisionEncoder,
        text: TextEncoder,
        text_bridge: Bridge,
        image_bridge: Bridge,
        cross: CrossEncoder,
        token_types: int = 2,
        uni_layers: str | list[int] = "top",
        stop_gradient: bool = False,
    ):
        super().__init__()
        self.text_layers = choose_layers(uni_layers, text_bridge.states, "text", text.depth)
        self.image_layers = choose_layers(uni_layers, image_bridge.states, "vision", vision.depth)
        self.stop_gradient = stop_gradient
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

    def encode_images(self, images: Tensor, type_id: int | Tensor = 1, rows: Tensor | None = None) -> Encoded:
        """images (I, C, H, W), normalised (`vision.normalize`).

        rows: (R,), rows of `images` to give in this order, though each image is encoded once; None: all as they are.
        type_id: row of the type table, or (R,) of them.
        """
        uni = self.vision(images, -min(self.image_layers, default=-1))
        kind = self.type_embeddings.weight[type_id]
        kind = kind[:, None] if kind.dim() == 2 else kind
        read = self.image_bridge.merge([uni[layer] for layer in self.image_layers])
        return Encoded(_projected(read, self.image_projection, kind, rows), gather(uni[-1][:, 0], rows))

    def encode_texts(self, texts: Texts) -> Encoded:
        uni = self.text(texts.ids, texts.mask, -min(self.text_layers, default=-1))
        read = self.text_bridge.merge([uni[layer] for layer in self.text_layers])
        states = _projected(read, self.text_projection, self.type_embeddings.weight[0])
        return Encoded(states, uni[-1][:, 0], texts.mask)

    def fuse(self, images: Encoded, texts: Encoded, pairs: Tensor, need: Need) -> Fused:
        """pairs: (P, 2) int64, rows of `images` and of `texts`. What `need` does not name is not computed."""
        image_rows = rows_or_none(pairs[:, 0], len(images.cls))
        text_rows = rows_or_none(pairs[:, 1], len(texts.cls))
        pair_mask = gather(texts.mask, text_rows)
        wanted_text, wanted_image = Wanted(need.cls, need.text), Wanted(need.cls, need.image)
        text = image = None
        for layer in range(self.cross.layers):
            last = layer == self.cross.layers - 1
            reads = (wanted_text.reading(), wanted_image.reading()) if last else (ALL, ALL)
            if layer == 0:  # still per unique text and image
                text_in, text_alone = self._enter("text", texts, share=not last)
                image_in, image_alone = self._enter("image", images, share=not last)
                rows, text_mask, alone = (text_rows, image_rows), texts.mask, (text_alone, image_alone)
            else:
                text_in = self._bridged(self.text_bridge, layer, texts.states, text_rows, text, image, pair_mask, None)
                image_in = self._bridged(
                    self.image_bridge, layer, images.states, image_rows, image, text, None, pair_mask
                )
                rows, text_mask, alone = (None, None), pair_mask, (None, None)
            text, image = self.cross(layer, text_in, image_in, *rows, text_mask, pair_mask, *reads, alone=alone)
        text_cls, text = wanted_text.split(text)
        image_cls, image = wanted_image.split(image)
        cls = torch.cat([self.text_pooler(text_cls), self.image_pooler(image_cls)], dim=-1) if need.cls else None
        return Fused(cls, text, image)

    def attention_maps(self, images: Encoded, texts: Encoded, pairs: Tensor) -> list[AttentionMaps]:
        """The cross-attention probabilities of `fuse` on pairs (P, 2), one entry a cross-modal layer, bottom first.

        For looking at, without dropout: every layer runs whole, and its attention once more. Raises RuntimeError in
        training mode.
        """
        if self.training:
            raise RuntimeError("attention maps are of a model in evaluation mode: call eval() first")
        image_rows, text_rows = pairs.unbind(1)
        mask = gather(texts.mask, text_rows)
        maps, text, image = [], None, None
        for layer in range(self.cross.layers):
            text_in = self._bridged(self.text_bridge, layer, texts.states, text_rows, text, image, mask, None)
            image_in = self._bridged(self.image_bridge, layer, images.states, image_rows, image, text, None, mask)
            if layer == 0:
                text_in, image_in = gather(text_in, text_rows), gather(image_in, image_rows)
            maps.append(self.cross.attention(layer, text_in, image_in, mask))
            text, image = self.cross(layer, text_in, image_in, None, None, mask, mask, ALL, ALL)
        return maps

    def _enter(self, modality: str, encoded: Encoded, share: bool) -> tuple[Tensor, Tensor | None]:
        """The input of the first cross-modal layer (U, S, D) and, where the passes `share` it, what the layer makes of
        it alone. A pass that reads a few positions of that layer computes less by itself; one without gradients leaves
        nothing to a pass with them."""
        share = share and (torch.is_grad_enabled() or not encoded.cls.requires_grad)
        if not share or encoded.entered is None:
            bridge = getattr(self, f"{modality}_bridge")
            states = self._bridged(bridge, 0, encoded.states, None, None, None, encoded.mask, None)
            if not share:
                return states, None
            encoded.entered = states, self.cross.alone(modality, states, encoded.mask)
        return encoded.entered

    def _bridged(
        self,
        bridge: Bridge,
        layer: int,
        uni: list[Tensor],
        rows: Tensor | None,
        own: Tensor | None,
        other: Tensor | None,
        own_mask: Tensor | None,
        other_mask: Tensor | None,
    ) -> Tensor:
        """The bridge's output; see Bridge.forward."""
        if self.stop_gradient and layer > 0:
            uni = [state.detach() for state in uni]
        masks = {"own_mask": own_mask, "other_mask": other_mask} if bridge.needs_masks else {}
        return bridge(layer, uni, rows, own, other, **masks)

    def set_gradient_checkpointing(self, mode: str) -> None:
        """mode: "none", "cheap" or "full"; see bt.models.checkpointing."""
        self.vision.set_gradient_checkpointing(mode)
        self.text.set_gradient_checkpointing(mode)
        self.cross.checkpointing = mode

    def parameter_role(self, name: str) -> Literal["base", "cross"]:
        """Which learning rate a parameter of the tower takes: the encoders and the type table the base rate."""
        at_base = ["vision.", "text.", "type_embeddings."]
        for modality in ("text", "image"):
            own = getattr(self, f"{modality}_bridge").parameters_at_base
            at_base += [f"{modality}_bridge.{start}" for start in own]
        return "base" if name.startswith(tuple(at_base)) else "cross"

    def layers_above(self, name: str) -> int:
        """How many layers of its encoder lie above a parameter; 0 for those of no encoder."""
        for start, encoder in (("vision.", self.vision), ("text.", self.text)):
            if name.startswith(start):
                return encoder.depth + 1 - encoder.layer_of(name.removeprefix(start))
        return 0

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


def _projected(states: list[Tensor], projection: nn.Linear, kind: Tensor, rows: Tensor | None = None) -> list[Tensor]:
    """Projected, `rows` of them, with the type embedding; a state that is read by several layers once."""
    made = {id(state): gather(projection(state), rows) + kind for state in states}
    return [made[id(state)] for state in states]


def choose_layers(uni_layers: str | list[int], states: int, encoder: str, depth: int) -> list[int]:
    """Which outputs of the uni-modal layers a bridge reads, counted from the top: -1 is the last, -depth the first.

    states: how many the bridge reads. uni_layers: top, the last ones (the paper's); every_second, from the last one
    down; last, the last one each time; or a list, bottom first. Raises ConfigError.
    """
    if uni_layers == "top":
        chosen = [*range(-states, 0)]
    elif uni_layers == "every_second":
        chosen = [*range(1 - 2 * states, 0, 2)]
    elif uni_layers == "last":
        chosen = [-1] * states
    elif len(uni_layers) == states:
        chosen = list(uni_layers)
    else:
        raise ConfigError(
            f"bridge.uni_layers={uni_layers}: the bridge reads {states} layers of encoder.{encoder}, here are "
            f"{len(uni_layers)}"
        )
    if chosen and -min(chosen) > depth:
        raise ConfigError(
            f"the bridge reads the top {-min(chosen)} layers of each encoder, encoder.{encoder} has {depth}: see "
            "cross.layers, bridge.uni_layers and the bridge's own options"
        )
    return chosen


def build_tower(
    encoder: Mapping[str, Any],
    bridge: Mapping[str, Any],
    cross: Mapping[str, Any],
    *,
    vocab_size: int | None,
    pad_id: int | None = None,
    token_types: int = 2,
    sides: str = "both",
    uni_layers: str | list[int] = "top",
    stop_gradient: bool = False,
) -> BridgeTower:
    """The tower of the config nodes `encoder` (vision, text), `bridge` and `cross`: `_target_` and arguments each.

    encoder.text.tokenizer belongs to the data and is left out here; `freeze` of either encoder is Encoder.freeze.
    vocab_size, pad_id: the tokenizer's; without a
    pad_id the encoder keeps its own. sides: which modalities have the bridge, both, text or image; the other has none,
    as in METER. uni_layers, stop_gradient: see BridgeTower. Raises ConfigError.
    """
    vision_config, text_config = dict(encoder["vision"]), dict(encoder["text"])
    text_config.pop("tokenizer", None)
    frozen = {"vision": vision_config.pop("freeze", "none"), "text": text_config.pop("freeze", "none")}
    vision = build("encoder.vision", vision_config)
    tokens = {"vocab_size": vocab_size} | ({} if pad_id is None else {"pad_id": pad_id})
    text = build("encoder.text", {**text_config, **tokens})
    for name, made in (("vision", vision), ("text", text)):
        made.freeze(frozen[name], f"encoder.{name}")
    cross = build("cross", cross)

    def make(side: str, uni: VisionEncoder | TextEncoder) -> Bridge:
        if sides not in ("both", side):
            return NoBridge(cross.width, cross.layers)
        wanted = inspect.signature(get_class(str(bridge.get("_target_")))).parameters
        of_uni = {"uni_width": uni.width, "depth": uni.depth}
        extra = {key: value for key, value in of_uni.items() if key in wanted}
        return build("bridge", bridge, width=cross.width, layers=cross.layers, **extra)

    bridges = make("text", text), make("image", vision)
    return BridgeTower(vision, text, *bridges, cross, token_types, uni_layers, stop_gradient)


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
