"""From a decoded image to the uint8 tensor that a batch holds; normalisation follows on the device.

Bit-exact with the official transforms (PIL, bicubic), whatever Pillow is installed: old versions resized horizontally
and then vertically, with 8-bit rounding in between; new ones take the cheaper pass first. Two explicit passes settle
it.
"""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bt.errors import ConfigError

# What Pillow raises on a file that is not a whole image.
UNDECODABLE = (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError)


def decode(data: bytes) -> Image.Image:
    """The image in encoded bytes, fully read; raises one of UNDECODABLE if it is damaged."""
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def resize(image: Image.Image, width: int, height: int) -> Image.Image:
    """Bicubic, horizontally first."""
    image = image.resize((width, image.height), Image.Resampling.BICUBIC)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def has_alpha(image: Image.Image) -> bool:
    return image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info


def to_tensor(image: Image.Image) -> Tensor:
    """(channels, height, width) uint8 of an RGB or L image."""
    pixels = torch.from_numpy(np.array(image))
    return pixels.unsqueeze(0) if pixels.ndim == 2 else pixels.permute(2, 0, 1).contiguous()


class Transform:
    """image_size: side of the square output in pixels. channels: 3 (RGB) or 1 (grey)."""

    def __init__(self, image_size: int, channels: int = 3):
        if channels not in (1, 3):
            raise ConfigError(f"image channels: {channels}; images of shards are read with 1 (grey) or 3 (RGB)")
        self.size = image_size
        self.mode = "RGB" if channels == 3 else "L"

    def __call__(self, image: Image.Image) -> Tensor:
        """(channels, image_size, image_size) uint8."""
        raise NotImplementedError


class Clip(Transform):
    """Shorter side to the size, then the centre: official `clip` (transforms/transform.py, evaluation of pre-training).

    The longer side is rounded down, the corner of the crop to the nearest even number at halves.
    """

    def __call__(self, image: Image.Image) -> Tensor:
        if has_alpha(image) and self.mode == "RGB":
            # The official chain resizes RGBA, which Pillow does with colours multiplied by alpha, and drops alpha last.
            # For opaque images that is the same as RGB.
            return to_tensor(self._square(image.convert("RGBA").convert("RGBa")).convert("RGBA").convert("RGB"))
        return to_tensor(self._square(image.convert(self.mode)))

    def _square(self, image: Image.Image) -> Image.Image:
        short, size = min(image.size), self.size
        if short != size:
            width, height = (size if side == short else int(size * side / short) for side in image.size)
            image = resize(image, width, height)
        left, top = round((image.width - size) / 2), round((image.height - size) / 2)
        return image.crop((left, top, left + size, top + size))


class Blip(Transform):
    """Squashed to the square: official `blip` (evaluation of fine-tuning)."""

    def __call__(self, image: Image.Image) -> Tensor:
        return to_tensor(resize(image.convert(self.mode), self.size, self.size))


TRANSFORMS: dict[str, type[Transform]] = {"clip": Clip, "blip": Blip}


def make_transform(name: str, image_size: int, channels: int = 3) -> Transform:
    """The transform of that name; ConfigError names those there are."""
    if name not in TRANSFORMS:
        raise ConfigError(f"transform '{name}' is unknown: allowed are {', '.join(sorted(TRANSFORMS))}")
    return TRANSFORMS[name](image_size, channels)
