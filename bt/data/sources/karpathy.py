"""COCO and Flickr30K captions with Karpathy's splits.

Raw files (https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip and the images), as in the
official tree; raw_dir is the folder that holds them or the one above:

    mscoco_flickr30k_vqav2_snli_ve/
        karpathy/dataset_coco.json         {"images": [{"filename", "split", "sentences": [{"raw"}, ...]}, ...]}
        train2014/COCO_train2014_<12 digits>.jpg
        val2014/COCO_val2014_<12 digits>.jpg

        karpathy/dataset_flickr30k.json    the same
        flickr30k-images/<id>.jpg

The shards keep the file's splits apart. The official recipes train COCO on train + restval (113,287 images) and
Flickr30K on train + val (30,014), and both validate and test on test: that is `data.train_split` and its like.
The official scripts (src/utils/write_coco_karpathy.py, write_f30k_karpathy.py) shuffle the images without a seed and
pass over missing ones; here they come in the order of the file, and missing ones are counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from bt.data.sources.base import RawSample, Source
from bt.data.sources.files import first_present, image_key, need_folder, stream_list
from bt.data.sources.raw import COCO_HOME


@dataclass
class Karpathy(Source):
    """Base of the two. An image's captions are its sentences as they are written; `image_id` is `_image_id`'s."""

    home = COCO_HOME
    annotations: ClassVar[str]  # file under raw_dir/karpathy
    folders: ClassVar[tuple[str, ...]]  # an image is in one of them, by its file name

    text_fields: dict = field(init=False, default_factory=lambda: {"captions": None})

    def count(self) -> int:
        return sum(self.wants(entry.get("split")) for entry in self._entries() if isinstance(entry, dict))

    def samples(self, skip: Callable[[str], None]) -> Iterator[RawSample]:
        folders = [self.path(folder) for folder in self.folders]
        need_folder(*folders)
        wanted: dict[str, list[tuple[str, dict[str, Any]]]] = {split: [] for split in self.splits if self.wants(split)}
        for entry in self._entries():
            try:
                name, split, captions = entry["filename"], entry["split"], [s["raw"] for s in entry["sentences"]]
                broken = not all(isinstance(text, str) for text in [name, split, *captions])
            except (KeyError, TypeError):
                broken = True
            if broken:
                skip("malformed entry")
            elif split not in self.splits:
                skip("unknown split")
            elif split in wanted:
                wanted[split].append((name, {"captions": captions, "image_id": self._image_id(entry)}))
        for split, images in wanted.items():
            for name, info in images:
                yield RawSample(split, image_key(name), {"": first_present(name, folders)}, info)

    def _entries(self) -> Iterator[Any]:
        return stream_list(self.path("karpathy", self.annotations), "images")

    def _image_id(self, entry: dict[str, Any]) -> Any:
        raise NotImplementedError


@dataclass
class CocoKarpathy(Karpathy):
    """raw_dir: the folder with karpathy/, train2014/ and val2014/. `image_id`: COCO's number, None if not given.

    Official sizes: train 82,783 images, restval 30,504, val 5,000, test 5,000; most have five captions.
    """

    splits = ("train", "restval", "val", "test")
    annotations = "dataset_coco.json"
    folders = ("train2014", "val2014")

    name: str = field(init=False, default="coco_karpathy")

    def _image_id(self, entry: dict[str, Any]) -> int | None:
        return entry.get("cocoid")


@dataclass
class Flickr30kKarpathy(Karpathy):
    """raw_dir: the folder with karpathy/ and flickr30k-images/. `image_id`: the file name without its ending.

    Official sizes: train 29,000 images, val 1,014, test 1,000, five captions each.
    """

    splits = ("train", "val", "test")
    annotations = "dataset_flickr30k.json"
    folders = ("flickr30k-images",)

    name: str = field(init=False, default="flickr30k_karpathy")

    def _image_id(self, entry: dict[str, Any]) -> str:
        return Path(entry["filename"]).stem
