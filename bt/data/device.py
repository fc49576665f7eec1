"""Decoding and transforming on the device: loader workers read bytes and draw, the main process does the rest.

Images other than plain JPEG are decoded and transformed by the workers all the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bt.data.decode import open_image, read_jpegs
from bt.data.device_augment import augment
from bt.data.transforms import Transform, random_box, stack_images


@dataclass(frozen=True)
class Encoded:
    """A JPEG that a worker has read, and what its transform draws from."""

    data: bytes
    rng: np.random.Generator | None


@dataclass(frozen=True)
class Pending:
    """Stands for the images of a batch on the way from the worker to `DeviceTransform.finish`."""

    images: list[Encoded | Tensor]

    def pin_memory(self) -> Pending:
        return self


class DeviceTransform:
    """`cpu`, with data.resize=fast, in two parts: the call in a worker, `finish` in the main process.

    On a GPU nvJPEG decodes, and torchvision resizes in float32, both with other pixels: see data.decode_on.
    """

    def __init__(self, cpu: Transform, device: torch.device):
        self.cpu, self.device, self.random = cpu, device, cpu.random

    def __call__(self, data: bytes, rng: np.random.Generator | None = None) -> Encoded | Tensor:
        """The file itself if it is a JPEG with the right channels, else its pixels; raises one of UNDECODABLE."""
        image = open_image(data)
        return Encoded(data, rng) if image.format == "JPEG" and image.mode == self.cpu.mode else self.cpu(data, rng)

    def plain(self) -> DeviceTransform:
        return DeviceTransform(self.cpu.plain(), self.device)

    def stack(self, images: list[Encoded | Tensor]) -> Pending:
        return Pending(images)

    def finish(self, pending: Pending) -> Tensor:
        """(images, channels, height, width) uint8 on the device; raises one of UNDECODABLE if a JPEG is damaged."""
        files = [image.data for image in pending.images if isinstance(image, Encoded)]
        decoded = iter(read_jpegs(files, self.cpu.channels, self.device))
        done = [
            self._square(next(decoded), image.rng) if isinstance(image, Encoded) else image.to(self.device)
            for image in pending.images
        ]
        return stack_images(done) if done else self.cpu.stack([]).to(self.device)

    def _square(self, pixels: Tensor, rng: np.random.Generator | None) -> Tensor:
        """Transform.__call__ on pixels, with its draws in its order."""
        cpu, (height, width) = self.cpu, pixels.shape[1:]
        box = random_box((width, height), cpu.chain.area, rng) if cpu.chain.fit == "crop" else (0, 0, width, height)
        if cpu.first is not None:
            pixels = augment(cpu.first, pixels, rng)
        pixels = cpu.resized(pixels, box)
        if cpu.chain.flip and rng.random() < 0.5:
            pixels = pixels.flip(-1)
        return pixels if cpu.last is None else augment(cpu.last, pixels, rng)


def distance(transform: Transform | DeviceTransform, data: bytes) -> tuple[float, int]:
    """Mean and largest difference of the transform's pixels from the official ones, in grey levels, without chance."""
    plain = transform.plain()
    images = plain.stack([plain(data)])
    if isinstance(images, Pending):
        images = plain.finish(images).cpu()
        plain = plain.cpu
    exact = Transform(plain.chain, plain.size, plain.channels)(data)
    difference = (images[0].int() - exact.int()).abs()
    return difference.float().mean().item(), int(difference.max())
