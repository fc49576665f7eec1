"""Raw images on their way into shards: read, checked and, where that is asked for, written anew."""

from __future__ import annotations

import io
import os
import signal
import threading
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from itertools import islice
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Protocol, TypeVar

from PIL import Image

from bt.data.rules import ImageRules
from bt.data.sources.base import Blob, Slice
from bt.errors import DataError

# File name endings by Pillow's name of the format, the usual one first. MPO is a JPEG that more pictures follow.
_ENDINGS = {
    "JPEG": ("jpg", "jpeg", "jpe", "jfif"),
    "MPO": ("jpg", "jpeg", "mpo"),
    "TIFF": ("tif", "tiff"),
    "PPM": ("ppm", "pgm", "pbm", "pnm"),
    "JPEG2000": ("jp2", "j2k", "jpx"),
}
_ORIENTATION = 0x0112  # EXIF tag; 1 is upright
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_QUALITY = 95  # of JPEG images written anew, unless `reencode` says another
_CHUNK = 8  # samples that go to a worker at a time

RawImage = Path | Blob | Slice


@dataclass(frozen=True)
class BadImage:
    """An image that cannot be used. reason: what it is counted under. where: the file, and what is wrong."""

    reason: str
    where: str


def read_image(image: RawImage) -> tuple[bytes, str]:
    """The encoded bytes and the ending of the file name; OSError if they cannot be read, ValueError for a name that no
    file can have."""
    if isinstance(image, Blob):
        return image.data, image.ending
    if isinstance(image, Slice):
        with open(image.path, "rb") as file:
            file.seek(image.offset)
            data = file.read(image.size)
        if len(data) < image.size:
            raise OSError(f"{image.path} ends before the image does")
        return data, image.ending
    return image.read_bytes(), image.suffix.lower().lstrip(".")


def load_images(
    images: Mapping[str, RawImage], rules: ImageRules, keep: bool = True
) -> dict[str, bytes | None] | BadImage:
    """The bytes to write by the ending of the member's name ("jpg", "left.png"), or the first bad image.

    keep: False gives None for original bytes, which the file has at hand, too.
    """
    loaded: dict[str, bytes | None] = {}
    for name, image in images.items():
        try:
            raw, ending = read_image(image)
        except (OSError, ValueError) as error:
            return _unread(image, error)
        try:
            data, ending = prepare(raw, ending, rules)
        except Image.DecompressionBombError as error:
            return BadImage("image too large", f"{_where(image)}: {error}")
        except Exception as error:  # on damaged data Pillow's readers raise nearly anything
            return BadImage("image cannot be decoded", f"{_where(image)}: {error}")
        loaded[f"{name}.{ending}" if name else ending] = data if keep or data is not raw else None
    return loaded


def _with_originals(
    images: Mapping[str, RawImage], loaded: dict[str, bytes | None] | BadImage
) -> dict[str, bytes] | BadImage:
    """What `load_images` gives with `keep`, from what it gives without."""
    if isinstance(loaded, BadImage):
        return loaded
    whole = {}
    for image, (member, data) in zip(images.values(), loaded.items(), strict=True):
        try:
            whole[member] = read_image(image)[0] if data is None else data
        except OSError as error:
            return _unread(image, error)
    return whole


def _unread(image: RawImage, error: OSError | ValueError) -> BadImage:
    # ValueError: a name that no file can have, with a null byte or half of a surrogate pair.
    if isinstance(error, FileNotFoundError | NotADirectoryError | ValueError):
        return BadImage("missing image", ascii(str(image)) if isinstance(error, ValueError) else _where(image))
    return BadImage("image cannot be read", f"{_where(image)}: {error.strerror or error}")


def _where(image: RawImage) -> str:
    return str(image if isinstance(image, Path) else getattr(image, "path", "image in memory"))


def prepare(data: bytes, ending: str, rules: ImageRules) -> tuple[bytes, str]:
    """An image's bytes as they are written, and the ending that says their real format; checks what `rules` asks for.

    Raises what Pillow does on a damaged image or one of more than 179 million pixels (DecompressionBombError).
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what Pillow finds strange but reads, such as a large image
        image = Image.open(io.BytesIO(data))
        turn = _TURNS.get(image.getexif().get(_ORIENTATION)) if rules.exif == "apply" else None
        too_large = rules.max_side is not None and max(image.size) > rules.max_side
        if turn is not None or too_large or rules.reencode is not None:
            to_jpeg = rules.reencode is not None or image.format in ("JPEG", "MPO")
            return _written_anew(data, turn, rules.max_side, to_jpeg, rules.reencode or _QUALITY)
        if rules.check == "full":
            # All of the data is read at any scale; at an eighth, in grey, that takes two thirds of the time.
            image.draft("L", (1, 1))
            image.load()
    endings = _ENDINGS.get(image.format, (image.format.lower(),))
    return data, ending if ending in endings else endings[0]


def _written_anew(
    data: bytes, turn: Image.Transpose | None, max_side: int | None, to_jpeg: bool, quality: int
) -> tuple[bytes, str]:
    from bt.data.decode import convert, decode, has_alpha  # torch, which takes seconds to import

    image = decode(data)
    grey = image.mode in ("1", "L") or image.mode.startswith("I")
    image = convert(image, "RGBA" if has_alpha(image) else "L" if grey else "RGB")
    if turn is not None:
        image = image.transpose(turn)
    if max_side is not None:
        image.thumbnail((max_side, max_side), Image.Resampling.BICUBIC, reducing_gap=None)
    image.info.clear()  # the EXIF data and colour profile speak of the image as it was
    buffer = io.BytesIO()
    if to_jpeg and image.mode != "RGBA":
        image.save(buffer, "JPEG", quality=quality)
        return buffer.getvalue(), "jpg"
    image.save(buffer, "PNG")
    return buffer.getvalue(), "png"


class HasImages(Protocol):
    @property
    def images(self) -> Mapping[str, RawImage]: ...


Item = TypeVar("Item", bound=HasImages)


def load_images_in_order(
    items: Iterable[Item], rules: ImageRules, workers: int
) -> Iterator[tuple[Item, dict[str, bytes] | BadImage]]:
    """Every item with its loaded images, in the order of the items; read by `workers` processes, 0: by this one.

    The processes are no more than a few chunks ahead, so that memory stays bounded. Pillow decodes on one thread. Close
    the generator to end them. DataError if one is killed.
    """
    if workers == 0:
        for item in items:
            yield item, load_images(item.images, rules)
        return
    # Original bytes stay where they are until they are written: from the disk's cache they come faster than by a pipe.
    load = partial(_load_chunk, rules=rules)
    # Forked processes need not import anything again, and nothing of them depends on the program's own module.
    pool = ProcessPoolExecutor(workers, get_context("fork"), _begin_worker)
    items = iter(items)
    ahead: deque = deque()
    try:
        pool.submit(os.getpid).result()  # forks now, before a source holds its annotations and a bar has its thread
        while True:
            chunk = list(islice(items, _CHUNK))
            if chunk:
                ahead.append((chunk, pool.submit(load, [item.images for item in chunk])))
            if not ahead:
                return
            if not chunk or len(ahead) > 2 * workers + 1:
                done, loaded = ahead.popleft()
                for item, images in zip(done, loaded.result(), strict=True):
                    yield item, _with_originals(item.images, images)
    except BrokenProcessPool:
        raise DataError(
            "a process that reads images was killed, perhaps for want of memory: give the command again, it goes on "
            "behind the last finished shard; workers=0 needs the least memory"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _load_chunk(chunk: list[Mapping[str, RawImage]], rules: ImageRules) -> list[dict[str, bytes | None] | BadImage]:
    return [load_images(images, rules, keep=False) for images in chunk]


def _begin_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all processes; the converting one ends the others
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for work for ever."""
    parent_process().join()
    os._exit(1)
