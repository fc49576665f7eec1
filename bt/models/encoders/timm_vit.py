"""A small ViT with a convolutional stem, from timm's parts, for images of a few dozen pixels."""

from __future__ import annotations

import math
from functools import partial

from timm.layers import GroupNormAct, HybridEmbed
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_hybrid import ConvStem
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bt.errors import ConfigError
from bt.models.encoders.base import CLIP_MEAN, CLIP_STD, VisionEncoder


class TimmVision(VisionEncoder):
    """timm's VisionTransformer on a stem of strided 3x3 convolutions, with random weights; no dropout.

    width, layers, heads, mlp_ratio: of the transformer. stem_channels: channels of each convolution.
    stem_strides: stride of each; their product is the patch size, image_size / product the side of the token grid.
    init_std: deviation of the transformer's linear weights. mean, std: of the pixels in [0, 1].
    The stem is normalised per image and channel: batch statistics would depend on how a batch is cut into micro-batches
    and ranks, and one norm over all channels learns shapes only half as fast.
    """

    position_key = "visual.pos_embed"
    patch_key = "visual.patch_embed.backbone.0.conv.weight"

    def __init__(
        self,
        image_size: int = 64,
        channels: int = 3,
        width: int = 128,
        layers: int = 2,
        heads: int = 4,
        mlp_ratio: float = 4.0,
        stem_channels: tuple[int, ...] = (16, 32, 64, 128),
        stem_strides: tuple[int, ...] = (2, 2, 2, 2),
        init_std: float = 0.02,
        mean: tuple[float, ...] = CLIP_MEAN,
        std: tuple[float, ...] = CLIP_STD,
    ):
        if len(stem_channels) != len(stem_strides) or not stem_strides:
            raise ConfigError(
                f"encoder.vision.stem_channels and stem_strides need one entry per convolution each, "
                f"not {len(stem_channels)} and {len(stem_strides)}"
            )
        if width % heads:
            raise ConfigError(f"encoder.vision.heads={heads} does not divide encoder.vision.width={width}")
        super().__init__(image_size, math.prod(stem_strides), channels, tuple(mean), tuple(std))
        self.width = width
        self.depth = layers
        self.checkpointing = False
        stem = ConvStem(
            in_chans=channels,
            depth=len(stem_strides),
            channels=tuple(stem_channels),
            stride=tuple(stem_strides),
            norm_layer=partial(GroupNormAct, group_size=1),
        )
        self.visual = VisionTransformer(
            img_size=image_size,
            patch_size=1,
            in_chans=channels,
            num_classes=0,
            embed_dim=width,
            depth=layers,
            num_heads=heads,
            mlp_ratio=mlp_ratio,
            embed_layer=partial(HybridEmbed, backbone=stem),
        )
        for module in self.visual.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=init_std)

    def forward(self, images: Tensor, states: int) -> list[Tensor]:
        # The steps of VisionTransformer.forward_features, which returns the last state alone.
        x = self.visual._pos_embed(self.visual.patch_embed(images))
        outputs = []
        for index, block in enumerate(self.visual.blocks):
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointing and self.training else block(x)
            if index >= self.depth - states:
                outputs.append(self.visual.norm(x))
        return outputs

    def set_gradient_checkpointing(self, enabled: bool) -> None:
        self.checkpointing = enabled
