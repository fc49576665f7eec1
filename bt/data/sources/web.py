"""Captions of images from the web, in the two layouts that data sets share whose images each user downloads.

img2dataset's tar shards, at raw_dir (then they are `train`) or in raw_dir/<split>:

    00000.tar            <key>.jpg (or .png, .webp), <key>.txt with the caption, <key>.json; images that could not be
                         had are not in it
    00000_stats.json     optional: how many could not be had; 00000.parquet is not read

ViLT's and METER's lists, where a caption belongs to the image whose base name its path or URL ends in:

    annot.json           [[path or URL, caption], ...]
    images_train/*/*     the images, with or without an ending
"""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, ClassVar

from bt.data.sources.base import RawSample, Slice, Source
from bt.data.sources.files import image_key, need_folder, sample_key, stream_list
from bt.errors import DataError

Skip = Callable[[str], None]
DEAD = "dead link"  # counted under this: an image that its web site no longer gave when the data set was downloaded
_IMAGES = ("jpg", "jpeg", "png", "webp")


@dataclass
class WebCaptions(Source):
    """Base of such data sets. raw_dir: the folder with one of the layouts; the first that is found is read.

    The order of looking is official, ViLT and METER, img2dataset, for each split. Splits that were not asked for by
    name may be absent as long as one is there.
    """

    official: ClassVar[str]  # the files of the official layout in words
    annotations: ClassVar[str]  # ViLT's and METER's list; {} stands for the split
    text_fields: dict = field(init=False, default_factory=lambda: {"captions": None})

    def official_present(self, split: str) -> bool:
        """Whether the split's raw files seem to be in the official layout."""
        raise NotImplementedError

    def official_samples(self, split: str, skip: Skip) -> Iterator[RawSample]:
        """The split's samples from the official layout."""
        raise NotImplementedError

    def official_count(self, split: str) -> int | None:
        """About how many samples the official layout gives."""
        raise NotImplementedError

    def count(self) -> int | None:
        numbers = [self._count(split) for split in self._found()]
        return None if None in numbers else sum(numbers)

    def samples(self, skip: Skip) -> Iterator[RawSample]:
        for split in self._found():
            if self.official_present(split):
                yield from self.official_samples(split, skip)
            elif self._annotations(split).exists():
                yield from self._annotated_samples(split, skip)
            else:
                yield from tar_samples(split, tar_shards(self.path(), split), skip)

    def _found(self) -> list[str]:
        """The wanted splits that have raw files."""
        if not self.path().is_dir():
            raise DataError(f"missing raw folder: {self.path()}")
        wanted = [split for split in self.splits if self.wants(split)]
        found = [
            split
            for split in wanted
            if self.official_present(split) or self._annotations(split).exists() or tar_shards(self.path(), split)
        ]
        if not found or (self.split is not None and found != wanted):
            missing = next(split for split in wanted if split not in found)
            raise DataError(
                f"{self.name}: {self.path()} has nothing of split {missing}: neither {self.official}, nor "
                f"{self._annotations(missing).name} with images in images_{missing}/*/, nor img2dataset's shards "
                f"({'00000.tar, ... or ' if missing == 'train' else ''}{missing}/*.tar)"
            )
        return found

    def _annotations(self, split: str) -> Path:
        return self.path(self.annotations.format(split))

    def _annotated_samples(self, split: str, skip: Skip) -> Iterator[RawSample]:
        images = self.path(f"images_{split}")
        need_folder(images)
        captions = captions_by_name(stream_list(self._annotations(split)), skip)
        yield from listed_samples(split, captions, sorted(path for path in images.iterdir() if path.is_dir()), skip)

    def _count(self, split: str) -> int | None:
        if self.official_present(split):
            return self.official_count(split)
        return None if self._annotations(split).exists() else tar_count(tar_shards(self.path(), split))


def listed_samples(split: str, captions: dict[str, str], folders: Iterable[Path], skip: Skip) -> Iterator[RawSample]:
    """A sample for each caption whose image, by base name, is in one of the folders; others are dead links."""
    place = {entry.name: folder for folder in folders for entry in os.scandir(folder)}
    for name, caption in captions.items():
        if name in place:
            yield RawSample(split, image_key(name), {"": place[name] / name}, {"captions": [caption]})
        else:
            skip(DEAD)


def captions_by_name(pairs: Iterable[tuple[Any, Any]], skip: Skip) -> dict[str, str]:
    """Base name of the path or URL -> caption; of equal names the last caption holds, as in the official scripts."""
    captions: dict[str, str] = {}
    for pair in pairs:
        place, caption = pair if isinstance(pair, (list, tuple)) and len(pair) == 2 else (None, None)
        if not (isinstance(place, str) and isinstance(caption, str)):
            skip("malformed entry")
            continue
        name = place.rpartition("/")[2]
        if name in captions:
            skip("file name listed before")
        captions[name] = caption
    return captions


def tar_shards(raw_dir: Path, split: str) -> list[Path]:
    """img2dataset's shards of a split, in order. At raw_dir itself only names that begin with a digit count.

    Other names say something, such as "cc3m-validation-0000.tar", and might be of another split.
    """
    return sorted((raw_dir / split).glob("*.tar")) or (sorted(raw_dir.glob("[0-9]*.tar")) if split == "train" else [])


def tar_count(shards: Iterable[Path]) -> int | None:
    """How many samples the shards have by their statistics; None if any has none."""
    numbers = [_statistics(shard).get("successes") for shard in shards]
    return None if None in numbers else sum(numbers)


def tar_samples(split: str, shards: Iterable[Path], skip: Skip) -> Iterator[RawSample]:
    """The samples in img2dataset's shards: captions are read, images only located.

    A shard that ends early gives what it has and is counted. Keys begin with the name of the shard.
    """
    for shard in shards:
        for reason, name in ((DEAD, "failed_to_download"), ("refused by img2dataset", "failed_to_resize")):
            for _ in range(_statistics(shard).get(name, 0)):
                skip(reason)
        try:
            with tarfile.open(shard, "r:") as tar:
                files = (member for member in tar if member.isfile())
                for key, members in groupby(files, lambda member: member.name.rpartition("/")[2].partition(".")[0]):
                    yield from _tar_sample(split, shard, key, tar, list(members), skip)
        except (tarfile.TarError, OSError):
            skip(f"malformed shard {shard.name}")


def _tar_sample(split, shard: Path, key: str, tar: tarfile.TarFile, members: list, skip: Skip) -> Iterator[RawSample]:
    by_ending = {member.name.rpartition(".")[2].lower(): member for member in members}
    image = next((by_ending[ending] for ending in _IMAGES if ending in by_ending), None)
    if image is None:
        skip("malformed sample: no image in the shard")
    elif "txt" not in by_ending:
        skip("malformed sample: no caption in the shard")
    else:
        caption = tar.extractfile(by_ending["txt"]).read().decode("utf-8", "surrogateescape")
        ending = image.name.rpartition(".")[2].lower()
        place = Slice(shard, image.offset_data, image.size, ending)
        yield RawSample(split, sample_key(f"{shard.stem}-{key}"), {"": place}, {"captions": [caption]})


def _statistics(shard: Path) -> dict[str, int]:
    """What img2dataset wrote of a shard's download; empty if it is not there."""
    try:
        known = json.loads(shard.with_name(f"{shard.stem}_stats.json").read_text(encoding="utf-8"))
        return {name: value for name, value in known.items() if isinstance(value, int)}
    except (OSError, ValueError, AttributeError):
        return {}
