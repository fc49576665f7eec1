"""What the tower expects of a uni-modal encoder, and how pre-trained image weights are fitted to other inputs."""

from __future__ import annotations

import math
import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bt.errors import ConfigError
from bt.models import checkpointing
from bt.models.checks import check_range

# Statistics of CLIP's training images, which the official transforms use for every encoder.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def channel_statistics(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    """Mean or deviation per channel; other numbers of channels than three take the average of the three."""
    return values if channels == len(values) else (sum(values) / len(values),) * channels


def check_image_size(image_size: int, stride: int) -> None:
    if image_size < stride or image_size % stride:
        fits = max(image_size // stride, 1) * stride
        raise ConfigError(
            f"encoder.vision.image_size={image_size} is not divisible by the patch size {stride}; "
            f"{fits} and {fits + stride} are"
        )


def resize_positions(table: Tensor, grid: int) -> Tensor:
    """(1 + g * g, D) -> (1 + grid * grid, D): row 0 (class token) stays, the others are resized as a picture.

    Bicubic, corners not aligned, no antialiasing, as the official adapt_position_encoding does; a table of the right
    size comes back unchanged.
    """
    before = math.isqrt(len(table) - 1)
    if before == grid:
        return table
    picture = table[1:].float().reshape(before, before, -1).permute(2, 0, 1)[None]
    picture = F.interpolate(picture, size=(grid, grid), mode="bicubic", align_corners=False)
    return torch.cat([table[:1], picture[0].permute(1, 2, 0).reshape(grid * grid, -1).to(table.dtype)])


def adapt_channels(weight: Tensor, channels: int) -> Tensor:
    """First convolution (O, C, h, w) -> (O, channels, h, w), repeated and scaled so that sums over channels keep their
    size (timm's adapt_input_conv).
    """
    before = weight.shape[1]
    if before == channels:
        return weight
    return weight.repeat(1, math.ceil(channels / before), 1, 1)[:, :channels] * (before / channels)


def normalize_pixels(images: Tensor, offset: Tensor, scale: Tensor) -> Tensor:
    """(images - offset) * scale of (I, C, H, W) uint8 pixels, as contiguous float32; offset, scale: (C, 1, 1).

    Batches are channels last in memory, where arithmetic with a value for each channel is slow, as it is between types.
    """
    return images.to(torch.float32, memory_format=torch.contiguous_format).sub_(offset).mul_(scale)


# Libraries call the list of a transformer's blocks by one of these names.
_BLOCK = re.compile(r"\b(?:layers?|blocks|resblocks)\.(\d+)\.")
_FINAL = re.compile(r"(?:\w+\.)?(?:norm|ln_post|final_norm|final_layer_norm|head\.norm)\.\w+")


class Encoder(nn.Module):
    """What image and text encoders share.

    depth: layers that can be bridged. pre_norm: whether the blocks are as bt.models.checkpointing.run says of such.
    """

    depth: int
    checkpointing = "none"  # bt.models.checkpointing
    pre_norm = False

    def layer_of(self, name: str) -> int:
        """The layer of a parameter: 0 for what lies before the first block, 1 to depth, depth + 1 for what follows."""
        if match := _BLOCK.search(name):
            return int(match[1]) + 1
        return self.depth + 1 if _FINAL.fullmatch(name) else 0

    def freeze(self, what: str, key: str) -> None:
        """what: "none", "all", or "bottom:N", everything up to block N, so that "bottom:0" is the embeddings alone.

        Raises ConfigError that names `key`.
        """
        match = re.fullmatch(r"none|all|bottom:(\d+)", what)
        if match is None or (match[1] and int(match[1]) > self.depth):
            raise ConfigError(f"{key}.freeze={what}: allowed are none, all, bottom:N with N from 0 to {self.depth}")
        top = -1 if what == "none" else self.depth + 1 if what == "all" else int(match[1])
        for name, parameter in self.named_parameters():
            if self.layer_of(name) <= top:
                parameter.requires_grad_(False)

    def set_gradient_checkpointing(self, mode: str) -> None:
        """mode: "none", "cheap" or "full", of what a block keeps for the backward pass; see bt.models.checkpointing.

        An encoder that calls its blocks by `run_block` needs nothing more.
        """
        self.checkpointing = mode

    def run_block(self, block: nn.Module, states: Tensor) -> Tensor:
        return checkpointing.run(self.checkpointing if self.training else "none", block, states, pre_norm=self.pre_norm)

    def run_blocks(
        self, blocks: nn.ModuleList | nn.Sequential, x: Tensor, states: int, norm: nn.Module
    ) -> list[Tensor]:
        """The outputs of the top `states` blocks, each behind `norm`, bottom first."""
        outputs = []
        for index, block in enumerate(blocks):
            x = self.run_block(block, x)
            if index >= self.depth - states:
                outputs.append(norm(x))
        return outputs


class VisionEncoder(Encoder):
    """Images to the states of the top layers.

    width: of the states. image_size: pixels of a side. channels: of an image.
    input_channels: of the first convolution. It is that of `channels`, but three for grey images: they enter as their
    stacked copies, so that models of grey and of colour images have the same weights.
    tokens: per image, the class token first. mean, std: of the pixels in [0, 1], per input channel.
    position_key, patch_key: names of the position table and the first convolution's weight in the state dict.
    """

    width: int
    position_key: str
    patch_key: str

    def __init__(
        self,
        image_size: int,
        stride: int,
        channels: int,
        mean: tuple[float, ...] = CLIP_MEAN,
        std: tuple[float, ...] = CLIP_STD,
    ):
        super().__init__()
        check_range("encoder.vision.image_size", image_size, at_least=1)
        check_range("encoder.vision.channels", channels, at_least=1)
        check_range("encoder.vision.std", min(std), above=0)
        check_image_size(image_size, stride)
        self.image_size = image_size
        self.channels = channels
        self.grid = image_size // stride
        self.tokens = self.grid**2 + 1
        self.input_channels = 3 if channels == 1 else channels
        self.mean = channel_statistics(mean, self.input_channels)
        self.std = channel_statistics(std, self.input_channels)
        mean, std = torch.tensor(self.mean)[:, None, None], torch.tensor(self.std)[:, None, None]
        self.register_buffer("_offset", 255 * mean, persistent=False)
        self.register_buffer("_scale", 1 / (255 * std), persistent=False)

    def forward(self, images: Tensor, states: int) -> list[Tensor]:
        """(I, C, H, W) normalised -> the outputs (I, tokens, width) of the top `states` layers, bottom first, each
        after the shared final norm. C is input_channels, or 1 for grey images."""
        raise NotImplementedError

    def stack_grey(self, images: Tensor) -> Tensor:
        """Grey (I, 1, H, W) -> a view with three equal channels; other images as they are."""
        return images.expand(-1, self.input_channels, -1, -1) if self.channels == images.shape[1] == 1 else images

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 pixels -> float, as ToTensor and Normalize do; images that are float already are left alone.

        Grey (I, 1, H, W) uint8 -> (I, 3, H, W): each copy is normalised with the statistics of its channel.
        """
        if images.dtype != torch.uint8:
            return images
        return normalize_pixels(self.stack_grey(images), self._offset, self._scale)

    def adapt(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """A state dict of this architecture, fitted to this encoder's image size and number of input channels."""
        state = dict(state)
        if self.position_key in state:
            table = state[self.position_key]
            resized = resize_positions(table.reshape(-1, table.shape[-1]), self.grid)
            state[self.position_key] = resized.reshape(*table.shape[:-2], *resized.shape)
        if self.patch_key in state:
            state[self.patch_key] = adapt_channels(state[self.patch_key], self.input_channels)
        return state


class TextEncoder(Encoder):
    """Token ids to the states of the top layers.

    width: of the states. max_positions: longest text, in tokens.
    vocab_size, pad_id: arguments of the constructor too, which get those of the tokenizer.
    """

    width: int
    vocab_size: int
    max_positions: int
    pad_id: int

    def forward(self, ids: Tensor, mask: Tensor, states: int) -> list[Tensor]:
        """ids (T, L) int64, mask (T, L) bool -> the outputs (T, L, width) of the top `states` layers, bottom first."""
        raise NotImplementedError
