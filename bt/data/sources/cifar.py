"""CIFAR-10 and CIFAR-100: labelled images of 32 x 32 pixels (cs.toronto.edu/~kriz/cifar.html; official run_cifar.py).

Raw files, the unpacked "python version"; raw_dir is the folder that holds them or the one above:

    cifar-10-batches-py/data_batch_{1,2,3,4,5}, test_batch, batches.meta
    cifar-100-python/train, test, meta

They are pickles. A pickle may name any function to be called, so these are read by an unpickler that knows numpy's
arrays and nothing else.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from bt.data.sources.base import Blob, RawSample, Source
from bt.data.sources.raw import inside, need
from bt.errors import DataError

_SIDE = 32
_PIXELS = 3 * _SIDE * _SIDE


def _latin1(text: str, encoding: str) -> bytes:
    """How Python 3 writes bytes in old pickles: as text and its codec, of which this is the only one needed."""
    return text.encode("latin1")


_ARRAY = np.empty(0).__reduce__()[0]  # numpy's function that starts an array; its module has been renamed
_ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"): _ARRAY,
    ("numpy._core.multiarray", "_reconstruct"): _ARRAY,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): _latin1,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no file of CIFAR does; nothing was run")
        return _ALLOWED[module, name]


def read_batch(path: Path) -> dict[str, Any]:
    """The dictionary in a file of CIFAR, with keys as text; DataError if it is anything else."""
    need(path)
    try:
        with open(path, "rb") as file:
            batch = _Unpickler(file, encoding="latin1").load()
        return {_text(key): value for key, value in batch.items()}
    except Exception as error:  # a damaged pickle can raise anything
        raise DataError(f"cannot read the raw file {path}: {error}") from None


def _text(value: str | bytes) -> str:
    return value.decode("latin1") if isinstance(value, bytes) else str(value)


def _png(row: np.ndarray) -> bytes:
    """row: (3072,) uint8, the rows of the red plane, then green and blue."""
    buffer = io.BytesIO()
    Image.fromarray(row.reshape(3, _SIDE, _SIDE).transpose(1, 2, 0)).save(buffer, "png")
    return buffer.getvalue()


@dataclass
class CIFAR(Source):
    """Base of the two. A sample is an image, kept without loss as a PNG, with its `label`, in the order of the files.

    The official code validates on the test part: there is no other.
    """

    splits = ("train", "test")

    folder: ClassVar[str]
    files: ClassVar[dict[str, tuple[str, ...]]]  # by split
    meta: ClassVar[tuple[str, str]]  # the file of the class names and their key in it
    label: ClassVar[str]  # key of the class numbers in a batch

    def labels(self) -> dict[str, list[str]]:
        file, key = self.meta
        path = inside(self.path(), self.folder, file) / file
        names = read_batch(path).get(key)
        if not isinstance(names, list) or not names:
            raise DataError(f"{path} has no list {key!r} of class names")
        return {"classes": [_text(name) for name in names]}

    def count(self) -> int:
        return sum(len(pixels) for _, pixels, _ in self._batches())

    def samples(self, skip: Callable[[str], None]) -> Iterator[RawSample]:
        numbers = dict.fromkeys(self.splits, 0)
        for split, pixels, labels in list(self._batches()):
            for row, label in zip(pixels, labels, strict=True):
                yield RawSample(split, f"{split}-{numbers[split]:05d}", {"": Blob(_png(row), "png")}, {"label": label})
                numbers[split] += 1

    def _batches(self) -> Iterator[tuple[str, np.ndarray, list[int]]]:
        """Split, pixels (n, 3072) uint8 and class numbers of each file."""
        classes = len(self.labels()["classes"])
        for split, files in self.files.items():
            for file in files if self.wants(split) else ():
                path = inside(self.path(), self.folder, self.meta[0]) / file
                batch = read_batch(path)
                pixels, labels = batch.get("data"), batch.get(self.label)
                if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.shape[1:] != (_PIXELS,):
                    raise DataError(f"{path} has no array 'data' of images with {_PIXELS} bytes each")
                known = isinstance(labels, list) and all(type(n) is int and 0 <= n < classes for n in labels)
                if not known or len(labels) != len(pixels):
                    raise DataError(f"{path} has no list {self.label!r} with a class below {classes} for each image")
                yield split, pixels, labels


@dataclass
class CIFAR10(CIFAR):
    """50,000 and 10,000 images of ten classes."""

    folder = "cifar-10-batches-py"
    files = {"train": tuple(f"data_batch_{n}" for n in range(1, 6)), "test": ("test_batch",)}
    meta = ("batches.meta", "label_names")
    label = "labels"

    name: str = field(init=False, default="cifar10")


@dataclass
class CIFAR100(CIFAR):
    """50,000 and 10,000 images; the hundred fine classes, as in the official code."""

    folder = "cifar-100-python"
    files = {"train": ("train",), "test": ("test",)}
    meta = ("meta", "fine_label_names")
    label = "fine_labels"

    name: str = field(init=False, default="cifar100")
