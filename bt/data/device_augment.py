"""The operations of bt.data.randaugment on tensors, on any device: pixels are (channels, height, width) uint8.

Run on the CPU they are equal to those but for saturation, contrast, AutoContrast (PilRandAugment) and shears
(BlipRandAugment), all within 1 grey level, and PilRandAugment's rotation, where fewer than 0.1 % of pixels are a
neighbour's.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from bt.data.randaugment import (
    GREY,
    SWAPPED_WEIGHTS,
    BlipRandAugment,
    PilRandAugment,
    Rng,
    TorchvisionRandAugment,
    contrast_table,
    pil_value,
    rotation,
    warp,
)


def augment(policy: PilRandAugment | BlipRandAugment | TorchvisionRandAugment, pixels: Tensor, rng: Rng) -> Tensor:
    """What the policy makes of the pixels; draws what it draws on the CPU."""
    if isinstance(policy, BlipRandAugment):
        return policy(pixels, rng, blip_operation)
    if isinstance(policy, PilRandAugment):
        return policy.image(pixels, rng, pil_operation)
    return policy.image(pixels, rng)


def _look_up(pixels: Tensor, *tables: np.ndarray | list[int]) -> Tensor:
    """A table of 256 values for each channel, or one for all; they are cut to whole bytes."""
    table = torch.from_numpy(np.array(tables).clip(0, 255).astype(np.uint8)).to(pixels.device)
    return table.expand(len(pixels), -1).gather(1, pixels.flatten(1).long()).view(pixels.shape)


# --- PilRandAugment ---


def _nearest(pixels: Tensor, a: float, b: float, c: float, d: float, e: float, f: float) -> Tensor:
    """The pixel at (x, y) is the nearest to (a x + b y + c, d x + e y + f), counted from the image's corner."""
    height, width = pixels.shape[1:]
    x = torch.arange(width, device=pixels.device, dtype=torch.float64) + 0.5
    y = torch.arange(height, device=pixels.device, dtype=torch.float64)[:, None] + 0.5
    u, v = (a * x + b * y + c).floor().long(), (d * x + e * y + f).floor().long()
    inside = (u >= 0) & (u < width) & (v >= 0) & (v < height)
    return pixels[:, v.clamp(0, height - 1), u.clamp(0, width - 1)] * inside


def _turn(pixels: Tensor, degrees: float) -> Tensor:
    height, width = pixels.shape[1:]
    cos, sin, x, y = math.cos(math.radians(degrees)), math.sin(math.radians(degrees)), width / 2, height / 2
    return _nearest(pixels, cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y)


def _solarize_add(pixels: Tensor, value: float) -> Tensor:
    added = np.clip(np.arange(256) + value, 0, 255).astype(np.uint8)
    return _look_up(pixels, np.where(added < 128, added, 255 - added))


_PIL_OPS = {
    "AutoContrast": lambda pixels, _: F.autocontrast(pixels),
    "Equalize": lambda pixels, _: F.equalize(pixels),
    "Rotate": lambda pixels, degrees: _turn(pixels, degrees),
    "Posterize": lambda pixels, bits: F.posterize(pixels, max(1, int(bits))),
    "Solarize": lambda pixels, threshold: F.solarize(pixels, threshold),
    "SolarizeAdd": _solarize_add,
    "Color": lambda pixels, factor: F.adjust_saturation(pixels, factor),
    "Contrast": lambda pixels, factor: F.adjust_contrast(pixels, factor),
    "Brightness": lambda pixels, factor: F.adjust_brightness(pixels, factor),
    "Sharpness": lambda pixels, factor: F.adjust_sharpness(pixels, factor),
    "ShearX": lambda pixels, v: _nearest(pixels, 1, v, 0, 0, 1, 0),
    "ShearY": lambda pixels, v: _nearest(pixels, 1, 0, 0, v, 1, 0),
    "TranslateX": lambda pixels, v: _nearest(pixels, 1, 0, v, 0, 1, 0),
    "TranslateY": lambda pixels, v: _nearest(pixels, 1, 0, 0, 0, 1, v),
}


def pil_operation(name: str, pixels: Tensor, level: int, negative: bool = False) -> Tensor:
    """bt.data.randaugment.pil_operation."""
    return _PIL_OPS[name](pixels, pil_value(name, level, negative))


# --- BlipRandAugment ---


def _color(pixels: Tensor, factor: float) -> Tensor:
    if len(pixels) == 1 or factor == 1:
        return pixels
    weights = torch.tensor(SWAPPED_WEIGHTS, dtype=torch.float32, device=pixels.device)[:, None, None]
    grey = (pixels * weights).sum(0)
    return (pixels * factor + grey * (1 - factor)).clamp(0, 255).to(torch.uint8)


def _contrast(pixels: Tensor, factor: float) -> Tensor:
    mean = (pixels.double().mean((1, 2)).cpu().numpy() * (SWAPPED_WEIGHTS if len(pixels) == 3 else 1)).sum()
    return _look_up(pixels, (np.arange(256) - mean) * factor + mean)


def _sharpness(pixels: Tensor, factor: float) -> Tensor:
    if factor == 1:
        return pixels
    p = pixels.int()
    rows = p[:, :-2] + p[:, 1:-1] + p[:, 2:]
    inner = p[:, 1:-1, 1:-1]
    smooth = (2 * (rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * inner) + 13) // 26
    out = pixels.clone()
    out[:, 1:-1, 1:-1] = ((smooth + np.float32(factor).item() * (inner - smooth)).int() & 255).to(torch.uint8)
    return out


def _translate(pixels: Tensor, x: int, y: int) -> Tensor:
    height, width = pixels.shape[1:]
    out = torch.full_like(pixels, GREY)
    out[:, max(-y, 0) : height - y, max(-x, 0) : width - x] = pixels[:, max(y, 0) : height + y, max(x, 0) : width + x]
    return out


def _warp(pixels: Tensor, *matrix: float) -> Tensor:
    return warp(pixels, *matrix).to(torch.uint8)


def blip_operation(name: str, pixels: Tensor, level: int, sign: int = 1) -> Tensor:
    """bt.data.randaugment.blip_operation."""
    share, values = level / 10, np.arange(256)
    factor, shear = share * 1.8 + 0.1, np.float32(-sign * share * 0.3).item()
    match name:
        case "AutoContrast":
            low, high = (found.tolist() for found in (pixels.amin((1, 2)), pixels.amax((1, 2))))
            return _look_up(pixels, *map(contrast_table, low, high))
        case "Equalize":
            return F.equalize(pixels)
        case "Brightness":
            return _look_up(pixels, values.astype(np.float32) * np.float32(factor))
        case "Sharpness":
            return _sharpness(pixels, factor)
        case "ShearX":
            return _warp(pixels, 1, shear, 0, 0, 1, 0)
        case "ShearY":
            return _warp(pixels, 1, 0, 0, shear, 1, 0)
        case "TranslateX":
            return _translate(pixels, sign * level, 0)
        case "TranslateY":
            return _translate(pixels, 0, sign * level)
        case "Rotate":
            return _warp(pixels, *rotation(*pixels.shape[1:], sign * share * 30))
        case "Solarize":
            return _look_up(pixels, np.where(values < int(share * 256), values, 255 - values))
        case "Color":
            return _color(pixels, factor)
        case "Contrast":
            return _contrast(pixels, factor)
        case "Posterize":
            return pixels & (255 << (8 - int(share * 4)) & 255)
    return pixels  # Identity
