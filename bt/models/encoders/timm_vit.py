"""A small ViT with a convolutional stem, from timm's parts, for images of a few dozen pixels."""

from __future__ import annotations

import math
from functools import partial

import torch
from timm.layers import HybridEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from bt.errors import ConfigError
from bt.models.checks import check_range
from bt.models.encoders.base import CLIP_MEAN, CLIP_STD, VisionEncoder


class HalfInstanceNorm(nn.Module):
    """Instance norm of the first half of the channels; the others pass as they are (IBN-Net, arXiv 1807.09441).

    Normalised channels make shapes easy to learn, but lose how dark a thing is against its ground; the others keep it.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.half = channels // 2
        self.norm = nn.InstanceNorm2d(self.half, affine=True)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.norm(x[:, : self.half]), x[:, self.half :]], dim=1)


class TimmVision(VisionEncoder):
    """timm's VisionTransformer on a stem of strided 3x3 convolutions, with random weights; no dropout.

    width, layers, heads, mlp_ratio: of the transformer. stem_channels: channels of each convolution.
    stem_strides: stride of each; their product is the patch size, image_size / product the side of the token grid.
    init_std: deviation of the transformer's linear weights. mean, std: of the pixels in [0, 1].
    There are no batch statistics: they would depend on how a batch is cut into micro-batches and ranks.
    """

    position_key = "visual.pos_embed"
    patch_key = "visual.patch_embed.backbone.0.weight"
    pre_norm = True

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
        for key, value in (("width", width), ("layers", layers), ("heads", heads)):
            check_range(f"encoder.vision.{key}", value, at_least=1)
        check_range("encoder.vision.mlp_ratio", mlp_ratio, above=0)
        check_range("encoder.vision.init_std", init_std, above=0)
        # Half of a convolution's channels are normalised.
        check_range("encoder.vision.stem_channels", min(stem_channels), at_least=2)
        check_range("encoder.vision.stem_strides", min(stem_strides), at_least=1)
        if width % heads:
            raise ConfigError(f"encoder.vision.heads={heads} does not divide encoder.vision.width={width}")
        super().__init__(image_size, math.prod(stem_strides), channels, tuple(mean), tuple(std))
        self.width = width
        self.depth = layers
        sides = (self.input_channels, *stem_channels)
        convolutions: list[nn.Module] = []
        for before, after, stride in zip(sides[:-1], sides[1:], stem_strides, strict=True):
            convolutions += [nn.Conv2d(before, after, 3, stride, padding=1), HalfInstanceNorm(after), nn.ReLU()]
        stem = nn.Sequential(*convolutions[:-2])
        self.visual = VisionTransformer(
            img_size=image_size,
            patch_size=1,
            in_chans=self.input_channels,
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
        x = self.visual._pos_embed(self.visual.patch_embed(self.stack_grey(images)))
        return self.run_blocks(self.visual.blocks, x, states, self.visual.norm)
