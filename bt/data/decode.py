"""Encoded bytes -> image: everything that Pillow reads, JPEG also at reduced scale or by torchvision.

EXIF rotation is ignored, as in the official code; animated images give their first frame.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

# What Pillow raises on a file that is not a whole image.
UNDECODABLE = (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError)

Box = tuple[int, int, int, int]  # left, top, right, bottom


@contextmanager
def _as_oserror() -> Iterator[None]:
    """For readers that report damage as RuntimeError: Pillow's of AVIF, torchvision's.

    It is not among UNDECODABLE, because torch raises it for everything, want of memory included.
    """
    try:
        yield
    except RuntimeError as error:
        raise OSError(str(error).split("\n")[0]) from None


def open_image(data: bytes) -> Image.Image:
    """The image in encoded bytes: its size and mode are known, its pixels not yet read."""
    with _as_oserror():
        return Image.open(io.BytesIO(data))


def decode(data: bytes) -> Image.Image:
    """The image in encoded bytes, fully read; raises one of UNDECODABLE if it is damaged."""
    image = open_image(data)
    with _as_oserror():
        image.load()
    return image


def has_alpha(image: Image.Image) -> bool:
    return image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info


def convert(image: Image.Image, mode: str) -> Image.Image:
    """The image in mode RGB, RGBA or L.

    Grey levels of 16 bits keep their upper eight; Pillow alone, and so the official code, makes all above 255 white.
    """
    with _as_oserror():
        image.load()
    if image.mode.startswith("I"):  # of 16 bits, also where Pillow gives them 32 (PGM)
        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    return image.convert(mode)


def read_jpeg(data: bytes, channels: int) -> Tensor:
    """(channels, height, width) uint8 of an RGB (3) or grey (1) JPEG, channels last in memory.

    The pixels are those of Pillow (both call libjpeg-turbo) in 0.65 to 0.85 of its time. With other modes, or where RGB
    has to become grey, they would not be. torchvision 0.29, the pinned version, hands this function over to TorchCodec.
    """
    return read_jpegs([data], channels, torch.device("cpu"))[0]


def read_jpegs(files: list[bytes], channels: int, device: torch.device) -> list[Tensor]:
    """The same for several, on a device; there the decoder is nvJPEG, which may give other pixels."""
    mode = ImageReadMode.RGB if channels == 3 else ImageReadMode.GRAY
    encoded = [torch.frombuffer(bytearray(data), dtype=torch.uint8) for data in files]
    with _as_oserror():
        return decode_jpeg(encoded, mode=mode, device=device) if encoded else []


def reduce(image: Image.Image, box: Box, width: int, height: int) -> Box:
    """Has a JPEG that is not read yet decoded at 1/2, 1/4 or 1/8, where its box is then still width x height at least.

    Returns the box in the image as it will be. On three photos of 640 pixels, decoding and resizing to 100-208 pixels
    took 0.25-0.6 of the time with Pillow's resizing, 0.6-0.9 with torchvision's; the pixels differed by 1 to 5 grey
    levels on average, at most by 104: libjpeg's reduction keeps finer edges than the bicubic kernel does.
    """
    full = image.size
    scale = min((box[2] - box[0]) / width, (box[3] - box[1]) / height)
    image.draft(None, (math.ceil(full[0] / scale), math.ceil(full[1] / scale)))
    if image.size == full:
        return box
    x, y = image.size[0] / full[0], image.size[1] / full[1]
    right, bottom = min(math.ceil(box[2] * x), image.size[0]), min(math.ceil(box[3] * y), image.size[1])
    return math.floor(box[0] * x), math.floor(box[1] * y), right, bottom
