"""SBU Captioned Photos: a million photos of Flickr, each with its owner's caption; about 860,000 can still be had.

Raw files in one of three layouts; the first that is found is read. raw_dir is the folder that holds them or the one
above, if that calls it sbu/, as the official tree does:

    sbu-captions-all.json    {"captions": [...], "image_urls": [...], ...} (https://www.cs.rice.edu/~vo9/sbucaptions)
    SBU/*                    the images by the last part of their URL

    annot.json               [[path or URL, caption], ...]: see bt/data/sources/web.py
    images_train/*/*

    00000.tar, ...           img2dataset's shards, or in train/: see bt/data/sources/web.py

An image that is not there is normal and counted as a dead link. Of two URLs with the same last part the later caption
holds, as in the official script (src/utils/write_sbu.py); unlike that one, the order is the file's.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field

from bt.data.sources.base import RawSample, read_json
from bt.data.sources.web import Skip, WebCaptions, captions_by_name, listed_samples
from bt.errors import DataError


@dataclass
class SBU(WebCaptions):
    """raw_dir: the folder with one of the layouts. One split, `train`; one caption an image."""

    splits = ("train",)
    home = "sbu"
    official = "sbu-captions-all.json with images in SBU/"
    annotations = "annot.json"

    name: str = field(init=False, default="sbu")

    def official_present(self, split: str) -> bool:
        return self.path("sbu-captions-all.json").exists() and self.path("SBU").is_dir()

    def official_count(self, split: str) -> int:
        return sum(1 for _ in os.scandir(self.path("SBU")))

    def official_samples(self, split: str, skip: Skip) -> Iterator[RawSample]:
        path = self.path("sbu-captions-all.json")
        try:
            data = read_json(path)
            pairs = zip(data["image_urls"], data["captions"], strict=True)
            captions = captions_by_name(pairs, skip)
        except (KeyError, TypeError, ValueError):
            raise DataError(f"{path} must hold the lists 'captions' and 'image_urls' of one length") from None
        yield from listed_samples(split, captions, [self.path("SBU")], skip)
