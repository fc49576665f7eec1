"""From an image to the uint8 pixels that a batch holds: decoding, cropping, resizing, augmentation.

A name (data.train_transform, data.eval_transform) stands for the geometry and the augmentation of the official
transform of that name. Normalisation is no part of it: batches hold uint8, and the vision encoder normalises on the
device with its own `mean` and `std`. `imagenet` and `vit` are for encoders with ImageNet's statistics resp. 0.5.

A horizontal flip changes nothing in the texts: "left" stays "left", as in the official code. The `_wohf` transforms do
not flip; take them where texts speak of sides.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resize as resize_tensor

from bt.data.decode import UNDECODABLE, Box, convert, decode, has_alpha, open_image, read_jpeg, reduce
from bt.data.randaugment import BlipRandAugment, PilRandAugment, TorchvisionRandAugment, to_pixels
from bt.errors import ConfigError

__all__ = ["TRANSFORMS", "UNDECODABLE", "Transform", "decode", "make_transform", "stack_images"]


@dataclass(frozen=True)
class Chain:
    """What a named transform does.

    fit: "centre": shorter side to the size, then the centre; "squash": both sides to the size; "crop": a random part
    of the image with at least `area` of it and sides of 3:4 to 4:3, then squashed.
    flip: horizontally, every second image. augment: at last, or, if `native`, first, on the image as it comes.
    alpha: transparent areas become black instead of showing their hidden colours.
    """

    fit: str
    area: float = 1.0
    flip: bool = False
    augment: PilRandAugment | BlipRandAugment | None = None
    native: bool = False
    alpha: bool = False


# Official names: BridgeTower's transforms/__init__.py, and ManagerTower's where "albef" stands in them. The resizing is
# bicubic in all. `clip` resizes RGBA, the others RGB, which differs for images with transparency alone.
TRANSFORMS: dict[str, Chain] = {
    "clip": Chain("centre", alpha=True),
    "clip_randaug": Chain("centre", augment=PilRandAugment(9), native=True),
    "imagenet": Chain("centre"),
    "imagenet_randaug": Chain("centre", augment=PilRandAugment(9), native=True),
    "vit": Chain("centre"),
    "vit_randaug": Chain("centre", augment=PilRandAugment(9), native=True),
    "blip": Chain("squash"),
    "blip_randaug": Chain("crop", 0.5, True, BlipRandAugment(5)),
    "blip_randaug_pretrain": Chain("crop", 0.2, True, BlipRandAugment(5)),
    "blip_randaug_wohf": Chain("crop", 0.5, False, BlipRandAugment(5)),
    # The two projects mean different things by this name: BridgeTower's is the PIL policy, ManagerTower's ("_mt" here)
    # has BLIP's with colours.
    "blip_randaug_wc": Chain("crop", 0.5, True, PilRandAugment(7)),
    "blip_randaug_wc_mt": Chain("crop", 0.5, True, BlipRandAugment(5, colour=True)),
    "albef": Chain("squash"),
    "albef_randaug": Chain("crop", 0.5, True, BlipRandAugment(7)),
    "albef_randaug_pretrain": Chain("crop", 0.2, True, BlipRandAugment(7)),
    "albef_randaug_wohf": Chain("crop", 0.5, False, BlipRandAugment(7)),
    "albef_randaug_wc": Chain("crop", 0.5, True, BlipRandAugment(7, colour=True)),
}


def resize(image: Image.Image, width: int, height: int) -> Image.Image:
    """Bicubic, horizontally first.

    Old versions of Pillow resize so, with 8-bit rounding in between; new ones take the cheaper pass first. Two calls
    give the official pixels with any version.
    """
    image = image.resize((width, image.height), Image.Resampling.BICUBIC)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def random_box(size: tuple[int, int], least_area: float, rng: np.random.Generator) -> Box:
    """torchvision's RandomResizedCrop.get_params: ten tries, then the largest centre with a ratio of 3:4 to 4:3."""
    width, height = size
    for _ in range(10):
        area = width * height * rng.uniform(least_area, 1)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
            return left, top, left + w, top + h
    w, h = min(width, round(height * 4 / 3)), min(height, round(width / (3 / 4)))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


class Transform:
    """image_size: side of the square output in pixels. channels: 3 (RGB) or 1 (grey). random: whether it draws.

    randaug: "official" augments as the released code does; "torchvision" puts v2.RandAugment in its place, with the
    same share of its greatest magnitude, always on the square output.
    resize: "pil" has the official pixels; "fast" is torchvision's uint8 kernel, which takes a fifth of the time on one
    core (1.4 against 7 ms from 640 x 480 to 576 px). It is at most 2 grey levels away; on photos, 1 level in 0.1 to
    0.5 % of the values.
    decode_draft: JPEG at reduced scale: see bt.data.decode.reduce.
    """

    def __init__(
        self,
        chain: Chain,
        image_size: int,
        channels: int = 3,
        *,
        randaug: str = "official",
        resize: str = "pil",
        decode_draft: bool = False,
    ):
        if channels not in (1, 3):
            raise ConfigError(f"encoder.vision.channels={channels}: images of shards are read with 1 (grey) or 3 (RGB)")
        if randaug not in ("official", "torchvision"):
            raise ConfigError(f"data.randaug={randaug} is not one of: official, torchvision")
        if resize not in ("pil", "fast"):
            raise ConfigError(f"data.resize={resize} is not one of: pil, fast")
        self.chain, self.size, self.channels, self.draft = chain, image_size, channels, decode_draft
        self.mode = "RGB" if channels == 3 else "L"
        self.fast = resize == "fast"
        self.random = chain.fit == "crop" or chain.augment is not None
        self.first = chain.augment if chain.native and randaug == "official" else None
        self.last = None if chain.native and randaug == "official" else chain.augment
        if randaug == "torchvision" and chain.augment is not None:
            self.last = _torchvision(chain.augment)

    def __call__(self, image: bytes | Image.Image, rng: np.random.Generator | None = None) -> Tensor:
        """(channels, image_size, image_size) uint8, channels last in memory.

        image: encoded, or decoded already. rng: what a random transform draws from, in the order crop, flip,
        augmentation; others do not need it. Raises one of UNDECODABLE if the bytes are no whole image.
        """
        data = image if isinstance(image, bytes) else None
        if data is not None:
            image = open_image(data)
        box = (0, 0, *image.size)
        if self.chain.fit == "crop":
            box = random_box(image.size, self.chain.area, rng)
        if self.draft and data is not None and image.format == "JPEG":
            whole = image.size
            box = reduce(image, box, self.size, self.size)
            data = data if image.size == whole else None  # now only Pillow gives the size that was counted on
        pixels = self._square(image, data, box, rng)
        if self.chain.flip and rng.random() < 0.5:
            pixels = pixels.flip(-1)
        if self.last is None:
            return pixels
        return torch.from_numpy(self.last(pixels.permute(1, 2, 0).numpy(), rng)).permute(2, 0, 1)

    def plain(self) -> Transform:
        """The same without chance: the whole image in place of a random crop, no flip, no augmentation."""
        other = copy.copy(self)
        fit = "squash" if self.chain.fit == "crop" else self.chain.fit
        other.chain = replace(self.chain, fit=fit, flip=False, augment=None, native=False)
        other.first, other.last, other.random = None, None, False
        return other

    def stack(self, images: list[Tensor]) -> Tensor:
        """The images of a batch, (images, channels, image_size, image_size); none for batches of texts alone."""
        if not images:
            return torch.empty(0, self.channels, self.size, self.size, dtype=torch.uint8)
        return stack_images(images)

    def _square(self, image: Image.Image, data: bytes | None, box: Box, rng: np.random.Generator | None) -> Tensor:
        """The box, resized; data: the encoded bytes if the image may be read from them."""
        alpha = self.chain.alpha and self.mode == "RGB" and has_alpha(image)
        if self.fast and data and image.format == "JPEG" and image.mode == self.mode and self.first is None:
            return self.resized(read_jpeg(data, self.channels), box)
        if alpha:
            # The official chain resizes RGBA, which Pillow does with colours multiplied by alpha, and drops alpha last.
            # For opaque images that is the same as RGB.
            image = self._exact(convert(image, "RGBA").convert("RGBa"), box).convert("RGBA").convert("RGB")
            return _tensor(image)
        image = convert(image, self.mode)
        if self.first is not None:
            image = self.first.image(image, rng)
        return self.resized(_tensor(image), box) if self.fast else _tensor(self._exact(image, box))

    def _exact(self, image: Image.Image, box: Box) -> Image.Image:
        if box != (0, 0, *image.size):
            image = image.crop(box)
        width, height = self._target(image.size)
        if (width, height) != image.size:
            image = resize(image, width, height)
        return image.crop(self._centre(width, height)) if width != height else image

    def resized(self, pixels: Tensor, box: Box) -> Tensor:
        """The square of the box of (channels, height, width) uint8, by torchvision's kernel."""
        pixels = _crop(pixels, box)
        height, width = pixels.shape[1:]
        target = self._target((width, height))
        if target != (width, height):
            pixels = resize_tensor(pixels, target[::-1], InterpolationMode.BICUBIC, antialias=True)
        return _crop(pixels, self._centre(*target))

    def _target(self, size: tuple[int, int]) -> tuple[int, int]:
        """Width and height to resize to. With "centre" the longer side is rounded down."""
        if self.chain.fit != "centre":
            return self.size, self.size
        short = min(size)
        width, height = (self.size if side == short else int(self.size * side / short) for side in size)
        return width, height

    def _centre(self, width: int, height: int) -> Box:
        """The corner is rounded to the nearest even number at halves."""
        left, top = round((width - self.size) / 2), round((height - self.size) / 2)
        return left, top, left + self.size, top + self.size


def _crop(pixels: Tensor, box: Box) -> Tensor:
    """Part of (channels, height, width) that are channels last in memory, as the result is: rows are copied whole."""
    left, top, right, bottom = box
    return pixels.permute(1, 2, 0)[top:bottom, left:right].contiguous().permute(2, 0, 1)


def _tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(to_pixels(image)).permute(2, 0, 1)


def _torchvision(official: PilRandAugment | BlipRandAugment) -> TorchvisionRandAugment:
    if isinstance(official, PilRandAugment):
        return TorchvisionRandAugment(official.level, colour=True)  # both count to 30
    return TorchvisionRandAugment(3 * official.level, official.colour)


def make_transform(
    name: str,
    image_size: int,
    channels: int = 3,
    *,
    randaug: str = "official",
    resize: str = "pil",
    decode_draft: bool = False,
) -> Transform:
    """The transform of that name; ConfigError names those there are."""
    if name not in TRANSFORMS:
        allowed = ", ".join(sorted(TRANSFORMS))
        raise ConfigError(f"data.train_transform, data.eval_transform: '{name}' is unknown: allowed are {allowed}")
    options = {"randaug": randaug, "resize": resize, "decode_draft": decode_draft}
    return Transform(TRANSFORMS[name], image_size, channels, **options)


def stack_images(images: list[Tensor]) -> Tensor:
    """(images, channels, height, width), channels last in memory like its parts: a plain copy of each."""
    return torch.stack([image.permute(1, 2, 0) for image in images]).permute(0, 3, 1, 2)
