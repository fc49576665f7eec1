"""What a caller may give: pictures and texts, one or many, and which of them go together."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from PIL import Image
from torch import Tensor

from bt.data.transforms import UNDECODABLE, Transform
from bt.errors import DataError
from bt.models.bridgetower import Encoded

# A path, an encoded file's bytes, a decoded image, or what Predictor.preprocess made of one of them.
Picture = str | Path | bytes | Image.Image | Tensor
Pictures = Picture | Sequence[Picture] | Encoded
Strings = str | Sequence[str]
Item = TypeVar("Item")


def read_pixels(picture: Picture, transform: Transform) -> Tensor:
    """(channels, size, size) uint8, as an evaluation's transform makes them.

    Raises DataError for a picture that is missing or no whole image.
    """
    if isinstance(picture, Tensor):
        expected = (transform.channels, transform.size, transform.size)
        if picture.dtype != torch.uint8 or tuple(picture.shape) != expected:
            found = f"{str(picture.dtype).removeprefix('torch.')} {tuple(picture.shape)}"
            raise DataError(f"pixels are uint8 {expected}, as Predictor.preprocess makes them; these are {found}")
        return picture
    if not isinstance(picture, str | Path | bytes | Image.Image):
        raise DataError(f"a picture is a path, bytes, a PIL image or pixels, not {type(picture).__name__}")
    name = os.fspath(picture) if isinstance(picture, str | Path) else "the image"
    try:
        data = Path(picture).read_bytes() if isinstance(picture, str | Path) else picture
    except (OSError, ValueError) as error:  # ValueError: a name with a null byte
        raise DataError(f"{name} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    try:
        return transform(data)
    except UNDECODABLE as error:
        # Pillow's own words for bytes that are no image name a buffer in memory.
        reason = "not an image" if "cannot identify" in str(error) else error
        raise DataError(f"{name} cannot be decoded: {reason}") from error


def data_url(image: Image.Image) -> str:
    """A picture for a page, as PNG in the address itself."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def check_texts(texts: Sequence[str]) -> list[str]:
    """The texts; DataError for an empty one or something else than a string."""
    for text in texts:
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"a text must not be empty, got {text!r}")
    return list(texts)


def as_list(given: Item | Sequence[Item]) -> Sequence[Item]:
    """One or many, as many."""
    return given if isinstance(given, list | tuple) else [given]


def is_one(*given: object) -> bool:
    """Whether all of what was given is one thing and no list, so that one result is expected."""
    return not any(isinstance(item, list | tuple | Encoded) for item in given)


def count(given: object) -> int:
    return len(given.cls) if isinstance(given, Encoded) else len(as_list(given))


def pair_count(**given: object) -> int:
    """How many pairs what was given makes: lists are of one length, and a single thing goes with all of the others."""
    sizes = {name: count(value) for name, value in given.items()}
    most = max(sizes.values()) if 0 not in sizes.values() else 0
    if any(size not in (1, most) for size in sizes.values()):
        shown = " and ".join(f"{size} {name}" for name, size in sizes.items())
        raise DataError(f"{shown} do not make pairs: give as many of each, or one of them")
    return most


def chunks(pairs: int, batch: int) -> list[Tensor]:
    """The numbers of the pairs, at most `batch` at a time."""
    return [*torch.arange(pairs).split(batch)] if pairs else []


class Side:
    """Images or texts of many pairs, each encoded once where all that differ fit into one batch.

    at(rows): pairs -> what encodes them, and their rows in it.
    """

    def __init__(self, given: Pictures | Strings, pairs: int, batch: int, encode: Callable[[list], Encoded]):
        self.encode, self.whole = encode, given if isinstance(given, Encoded) else None
        if self.whole is not None:
            self.items, self.index = [], torch.arange(count(given))
        else:
            # Equal paths and texts are the same; of other things only one and the same object is.
            keys = [item if isinstance(item, str | Path) else id(item) for item in as_list(given)]
            self.items = list(dict(zip(keys, as_list(given), strict=True)).values())
            places = {key: place for place, key in enumerate(dict.fromkeys(keys))}
            self.index = torch.tensor([places[key] for key in keys], dtype=torch.long)
            if 0 < len(self.items) <= batch:
                self.whole = encode(self.items)
        if len(self.index) == 1:
            self.index = self.index.expand(pairs)

    def at(self, rows: Tensor) -> tuple[Encoded, Tensor]:
        chosen = self.index[rows]
        if self.whole is not None:
            return self.whole.used(chosen.to(self.whole.cls.device))
        used, local = chosen.unique(return_inverse=True)
        encoded = self.encode([self.items[item] for item in used.tolist()])
        return encoded, local.to(encoded.cls.device)
