"""RandAugment as the released code has it, in its two forms, and torchvision's.

All take (height, width, channels) uint8 pixels and a generator, and return such pixels. `PilRandAugment` and
`BlipRandAugment` are the behaviour behind the paper's numbers, so their oddities are kept; each is said where it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageOps
from torchvision.transforms import v2

Rng = np.random.Generator

GREY = 128  # fill of BlipRandAugment and of TorchvisionRandAugment
_STRIP = 32  # rows at a time in long computations: they stay in the processor's cache


def to_image(pixels: np.ndarray) -> Image.Image:
    """RGB or L image of (height, width, channels) pixels."""
    return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)


def to_pixels(image: Image.Image) -> np.ndarray:
    """(height, width, channels) uint8, writable, of an RGB or L image."""
    pixels = np.array(image)
    return pixels[..., None] if pixels.ndim == 2 else pixels


# --- transforms/randaug.py: clip_randaug, imagenet_randaug, vit_randaug, and BridgeTower's blip_randaug_wc ---


def _affine(image: Image.Image, *matrix: float) -> Image.Image:
    """Nearest pixel, black outside."""
    return image.transform(image.size, Image.Transform.AFFINE, matrix)


def _solarize_add(image: Image.Image, value: float) -> Image.Image:
    """Adds, clips, and inverts what is 128 or more. (The released code fails here with NumPy 1.24 or newer.)"""
    added = np.clip(np.arange(256) + value, 0, 255).astype(np.uint8)
    return image.point(np.where(added < 128, added, 255 - added).tolist() * len(image.getbands()))


# Name: function of (image, value), value at level 0 and at level 30, whether its sign is drawn.
_PIL_OPS: dict[str, tuple[Callable[[Image.Image, float], Image.Image], float, float, bool]] = {
    "AutoContrast": (lambda image, _: ImageOps.autocontrast(image), 0, 1, False),
    "Equalize": (lambda image, _: ImageOps.equalize(image), 0, 1, False),
    "Rotate": (lambda image, degrees: image.rotate(degrees), 0, 30, True),
    "Posterize": (lambda image, bits: ImageOps.posterize(image, max(1, int(bits))), 0, 4, False),
    "Solarize": (lambda image, threshold: ImageOps.solarize(image, threshold), 0, 256, False),
    "SolarizeAdd": (_solarize_add, 0, 110, False),
    "Color": (lambda image, factor: ImageEnhance.Color(image).enhance(factor), 0.1, 1.9, False),
    "Contrast": (lambda image, factor: ImageEnhance.Contrast(image).enhance(factor), 0.1, 1.9, False),
    "Brightness": (lambda image, factor: ImageEnhance.Brightness(image).enhance(factor), 0.1, 1.9, False),
    "Sharpness": (lambda image, factor: ImageEnhance.Sharpness(image).enhance(factor), 0.1, 1.9, False),
    "ShearX": (lambda image, v: _affine(image, 1, v, 0, 0, 1, 0), 0, 0.3, True),
    "ShearY": (lambda image, v: _affine(image, 1, 0, 0, v, 1, 0), 0, 0.3, True),
    "TranslateX": (lambda image, v: _affine(image, 1, 0, v, 0, 1, 0), 0, 100, True),
    "TranslateY": (lambda image, v: _affine(image, 1, 0, 0, 0, 1, v), 0, 100, True),
}


def pil_value(name: str, level: int, negative: bool = False) -> float:
    """What an operation of PilRandAugment is done with at a level; `negative` where a drawn sign is minus."""
    _, low, high, _ = _PIL_OPS[name]
    value = level / 30 * (high - low) + low
    return -value if negative else value


def pil_operation(name: str, image: Image.Image, level: int, negative: bool = False) -> Image.Image:
    """One operation of PilRandAugment at a level; `negative` turns the sign of those whose sign is drawn."""
    return _PIL_OPS[name][0](image, pil_value(name, level, negative))


@dataclass(frozen=True)
class PilRandAugment:
    """Two operations of fourteen, drawn with replacement and always done: official `RandAugment(2, level)`.

    Level is of 30. What is odd in it, and kept:
    - Colour, contrast, brightness and sharpness are only ever reduced (factor 0.64 at level 9, 0.52 at 7), and a lower
      level makes them, and solarize, stronger.
    - Posterize leaves one bit per channel at levels 7 and 9.
    - Translations are a number of pixels (30 at level 9), whatever the size of the image.
    - Shears are about the upper left corner; shears, rotations and translations leave black and take nearest pixels.
    """

    level: int

    def __call__(self, pixels: np.ndarray, rng: Rng) -> np.ndarray:
        return to_pixels(self.image(to_image(pixels), rng))

    def image(self, image: Any, rng: Rng, operation: Callable[..., Any] = pil_operation) -> Any:
        """The same on an RGB or L image of any size, or on what else `operation` takes and gives."""
        names = list(_PIL_OPS)
        for number in rng.integers(len(names), size=2):
            signed = _PIL_OPS[names[number]][3]
            image = operation(names[number], image, self.level, signed and rng.random() > 0.5)
        return image


# --- transforms/randaugment.py: blip_randaug*, albef_randaug* ---


def _auto_contrast(pixels: np.ndarray) -> np.ndarray:
    """Stretches each channel whose minimum is 0; any other becomes 255 all over, unless it is of one value.

    The released code negates the minimum as an unsigned byte, which makes the offset too large. PIL's autocontrast,
    which was meant, stretches every channel.
    """
    tables = [contrast_table(*extrema) for extrema in np.reshape(to_image(pixels).getextrema(), (-1, 2)).tolist()]
    if all(table == list(range(256)) for table in tables):
        return pixels
    return to_pixels(to_image(pixels).point(sum(tables, [])))


def contrast_table(low: int, high: int) -> list[int]:
    """What AutoContrast makes of each value of a channel with that minimum and maximum."""
    if low == high:
        return list(range(256))
    return [255] * 256 if low > 0 else np.minimum(np.arange(256) * (255 / high), 255).astype(int).tolist()


def _equalize(pixels: np.ndarray) -> np.ndarray:
    return to_pixels(ImageOps.equalize(to_image(pixels)))


def _look_up(pixels: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Float table of 256 values, clipped and cut to whole numbers."""
    found = bytearray(pixels.tobytes()).translate(table.clip(0, 255).astype(np.uint8).tobytes())
    return np.frombuffer(found, np.uint8).reshape(pixels.shape)


# Of red, green, blue. The released code weighs RGB with the weights of BGR: grey levels have red and blue swapped.
SWAPPED_WEIGHTS = np.array([0.114, 0.587, 0.299])


def _color(pixels: np.ndarray, factor: float) -> np.ndarray:
    if pixels.shape[2] == 1 or factor == 1:
        return pixels
    grey = np.repeat(SWAPPED_WEIGHTS.astype(np.float32)[:, None], 3, 1)
    mix = (np.eye(3, dtype=np.float32) - grey) * np.float32(factor) + grey
    return np.matmul(pixels, mix).clip(0, 255).astype(np.uint8)


def _contrast(pixels: np.ndarray, factor: float) -> np.ndarray:
    height, width, channels = pixels.shape
    # Whole rows first, since numpy is slow along short axes; in whole numbers, so that no order of summing matters.
    means = pixels.reshape(height, -1).sum(0, dtype=np.int64).reshape(-1, channels).sum(0) / (height * width)
    mean = (means * (SWAPPED_WEIGHTS if channels == 3 else 1)).sum()
    return _look_up(pixels, (np.arange(256) - mean) * factor + mean)


def _brightness(pixels: np.ndarray, factor: float) -> np.ndarray:
    return pixels if factor == 1 else _look_up(pixels, np.arange(256, dtype=np.float32) * np.float32(factor))


def _sharpness(pixels: np.ndarray, factor: float) -> np.ndarray:
    """Away from the mean of the neighbours, except at the border.

    The released code casts to uint8 without clipping: what overshoots wraps, so 260 becomes 4.
    """
    if factor == 1:
        return pixels
    out = pixels.copy()
    for row in range(0, len(pixels) - 2, _STRIP):
        p = pixels[row : row + _STRIP + 2].astype(np.uint16)
        rows = p[:-2] + p[1:-1] + p[2:]
        smooth = rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:] + 4 * p[1:-1, 1:-1]
        smooth = ((2 * smooth + 13) // 26).astype(np.float32)  # of 13 weights in all, rounded
        sharp = smooth + np.float32(factor) * (p[1:-1, 1:-1] - smooth)
        out[row + 1 : row + 1 + len(sharp), 1:-1] = sharp.astype(np.int32).astype(np.uint8)
    return out


def _blend(first: np.ndarray, second: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """(first * (32 - weight) + second * weight) / 32, rounded; 2-D."""
    out = np.empty(first.shape, np.uint8)
    weight = np.broadcast_to(weight.astype(np.uint16), first.shape)
    for row in range(0, len(out), _STRIP):
        strip = slice(row, row + _STRIP)
        mixed = first[strip] * (32 - weight[strip])
        mixed += second[strip] * weight[strip]
        mixed += 16
        mixed >>= 5
        out[strip] = mixed
    return out


def _shear(pixels: np.ndarray, factor: float, axis: int) -> np.ndarray:
    """Line i of `axis` is taken from factor * i pixels further along the other axis.

    OpenCV interpolates at steps of 1/32 pixel, in whole numbers. Here that is a move by whole pixels of all lines with
    the same one, then a blend of neighbours.
    """
    height, width, channels = pixels.shape
    steps = (np.round(np.float64(np.float32(factor)) * np.arange(pixels.shape[axis]) * 1024).astype(int) + 16) >> 5
    whole, part = steps >> 5, steps & 31
    before, after = max(-int(whole.min()), 0), max(int(whole.max()) + 1, 0)
    margins = [(0, 0), (before, after), (0, 0)] if axis == 0 else [(before, after), (0, 0), (0, 0)]
    wide = np.pad(pixels, margins, constant_values=GREY)
    moved = np.empty((height, width + 1, channels) if axis == 0 else (height + 1, width, channels), np.uint8)
    edges = [0, *(np.flatnonzero(np.diff(whole)) + 1).tolist(), len(whole)]
    for begin, end in zip(edges, edges[1:], strict=False):
        start = int(whole[begin]) + before
        if axis == 0:
            moved[begin:end] = wide[begin:end, start : start + width + 1]
        else:
            moved[:, begin:end] = wide[start : start + height + 1, begin:end]
    if axis == 0:
        flat = moved.reshape(height, -1)
        mixed = _blend(flat[:, :-channels], flat[:, channels:], part[:, None])
    else:
        flat = moved.reshape(height + 1, -1)
        mixed = _blend(flat[:-1], flat[1:], part.repeat(channels)[None])
    return mixed.reshape(pixels.shape)


def _translate(pixels: np.ndarray, x: int, y: int) -> np.ndarray:
    """Pixel (i, j) is taken from (i + y, j + x)."""
    height, width, _ = pixels.shape
    out = np.full_like(pixels, GREY)
    out[max(-y, 0) : height - y, max(-x, 0) : width - x] = pixels[max(y, 0) : height + y, max(x, 0) : width + x]
    return out


@lru_cache(maxsize=4)
def _grid(height: int, width: int, a: float, b: float, c: float, d: float, e: float, f: float) -> torch.Tensor:
    """(1, height, width, 2) for grid_sample: where OpenCV's warpAffine reads, in 1/32 pixels.

    Pixel (x, y) is taken from (a x + b y + c, d x + e y + f).
    """
    x, y = np.arange(width), np.arange(height)[:, None]
    at_x = np.round(a * x * 1024) + np.round((b * y + c) * 1024) + 16
    at_y = np.round(d * x * 1024) + np.round((e * y + f) * 1024) + 16
    steps = np.stack([(at_x + 0 * y) // 32, (at_y + 0 * x) // 32], -1) / 32
    grid = (2 * steps + 1) / np.array([width, height]) - 1
    return torch.from_numpy(grid.astype(np.float32))[None]


def warp(pixels: torch.Tensor, *matrix: float) -> torch.Tensor:
    """(channels, height, width) uint8 -> float values, not yet cut; matrix: see _grid."""
    grid = _grid(*pixels.shape[1:], *matrix).to(pixels.device)
    planes = pixels[None].float().sub_(GREY)  # so that outside is grey
    return F.grid_sample(planes, grid, mode="bilinear", padding_mode="zeros", align_corners=False)[0].add_(GREY + 0.5)


def rotation(height: int, width: int, degrees: float) -> tuple[float, ...]:
    """The matrix for `warp`."""
    cos, sin = np.cos(np.radians(degrees)).item(), np.sin(np.radians(degrees)).item()
    # The centre is (width / 2, height / 2) counted between pixel centres, half a pixel off the middle.
    cx, cy = width / 2, height / 2
    return cos, -sin, cx - cos * cx + sin * cy, sin, cos, cy - sin * cx - cos * cy


def _rotate(pixels: np.ndarray, degrees: float) -> np.ndarray:
    turned = warp(torch.from_numpy(pixels).permute(2, 0, 1), *rotation(*pixels.shape[:2], degrees))
    return np.stack(turned.numpy().astype(np.uint8), axis=-1)


def blip_operation(name: str, pixels: np.ndarray, level: int, sign: int = 1) -> np.ndarray:
    """One operation of BlipRandAugment at a level, with a sign where one is drawn.

    Against the released code with OpenCV 4.5.5: equal, except Rotate, where at most 0.2 % of values differ, by 1
    (float32 instead of whole numbers). OpenCV 5 interpolates more finely: 0.6 levels away on noise, at most 7.
    """
    share = level / 10
    match name:
        case "Identity":
            return pixels
        case "AutoContrast":
            return _auto_contrast(pixels)
        case "Equalize":
            return _equalize(pixels)
        case "Brightness":
            return _brightness(pixels, share * 1.8 + 0.1)
        case "Sharpness":
            return _sharpness(pixels, share * 1.8 + 0.1)
        case "ShearX":
            return _shear(pixels, -sign * share * 0.3, axis=0)
        case "ShearY":
            return _shear(pixels, -sign * share * 0.3, axis=1)
        case "TranslateX":
            return _translate(pixels, sign * level, 0)
        case "TranslateY":
            return _translate(pixels, 0, sign * level)
        case "Rotate":
            return _rotate(pixels, sign * share * 30)
        case "Solarize":
            table = np.arange(256)
            return _look_up(pixels, np.where(table < int(share * 256), table, 255 - table))
        case "Color":
            return _color(pixels, share * 1.8 + 0.1)
        case "Contrast":
            return _contrast(pixels, share * 1.8 + 0.1)
        case "Posterize":
            # The released code fails here with NumPy 2, where the mask 255 << 6 does not fit a byte; older ones cut it.
            return pixels & np.uint8(255 << (8 - int(share * 4)) & 255)
    raise ValueError(name)


_GEOMETRY = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")
PLAIN_OPS = ("Identity", "AutoContrast", "Brightness", "Sharpness", "Equalize", *_GEOMETRY)
COLOUR_OPS = ("Solarize", "Color", "Contrast", "Posterize")


@dataclass(frozen=True)
class BlipRandAugment:
    """Two operations drawn with replacement, each skipped with probability 1/2: official `RandomAugment(2, level)`.

    Level is of 10: 5 in BridgeTower's transforms, 7 in ManagerTower's. colour: fourteen operations instead of ten.
    What is odd in it, and kept:
    - At level 5 the factors of brightness, sharpness, colour and contrast are 1: three of ten operations do nothing.
      At level 7 they are 1.36: these are only ever increased.
    - AutoContrast turns channels white, Sharpness wraps around, Color and Contrast take red for blue: see there.
    - Shears are about the upper left pixel, rotations half a pixel off the middle; what comes in is grey.
    """

    level: int
    colour: bool = False

    def __call__(self, pixels: Any, rng: Rng, operation: Callable[..., Any] = blip_operation) -> Any:
        names = PLAIN_OPS + COLOUR_OPS if self.colour else PLAIN_OPS
        for number in rng.integers(len(names), size=2):
            if rng.random() < 0.5:
                sign = 1 if names[number] not in _GEOMETRY or rng.random() < 0.5 else -1
                pixels = operation(names[number], pixels, self.level, sign)
        return pixels


# --- torchvision ---


class _Plain(v2.RandAugment):
    """Without the operations that change colours."""

    _AUGMENTATION_SPACE = {k: v for k, v in v2.RandAugment._AUGMENTATION_SPACE.items() if k not in COLOUR_OPS}


class TorchvisionRandAugment:
    """torchvision's v2.RandAugment: two operations, always done; enhancements go both ways, translations are relative.

    magnitude: of 30. colour: all fourteen operations, else the ten that leave colours alone. Nearest pixels, grey fill.
    """

    def __init__(self, magnitude: int, colour: bool):
        self.transform = (v2.RandAugment if colour else _Plain)(2, magnitude, 31, fill=GREY)

    def __call__(self, pixels: np.ndarray, rng: Rng) -> np.ndarray:
        return to_pixels(self.image(to_image(pixels), rng))

    def image(self, image: Any, rng: Rng) -> Any:
        """The same on an image or a tensor (channels, height, width)."""
        # It draws from torch's global generator, which is lent a state of its own.
        state = torch.get_rng_state()
        torch.default_generator.manual_seed(int(rng.integers(2**62)))
        try:
            return self.transform(image)
        finally:
            torch.set_rng_state(state)
