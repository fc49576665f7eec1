"""Visual Genome: the phrases of an image's regions as its captions.

Raw files (https://homes.cs.washington.edu/~ranjay/visualgenome and, for coco_splits/, the repository
peteanderson80/bottom-up-attention, data/genome/coco_splits), as in the official tree; raw_dir is the folder
vg/ or the one above:

    vg/
        annotations/region_descriptions.json   [{"regions": [{"image_id", "phrase", ...}, ...]}, ...]
        images/VG_100K/<image_id>.jpg
        images/VG_100K_2/<image_id>.jpg
        image_data.json                        [{"image_id", "coco_id": a number or null, ...}, ...]
        coco_splits/karpathy_val_images.txt    one image a line: .../COCO_val2014_<12 digits>.jpg
        coco_splits/karpathy_test_images.txt

The last three are read only to leave out the images of COCO's Karpathy val and test (2,126 and 2,138 of 108,077),
which the official script (src/utils/write_vg.py) trains on. It also shuffles the images without a seed and stores the
regions' boxes, which nothing reads; here images come in the order of the annotations, without boxes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from bt.data.sources.base import RawSample, Source, read_json
from bt.data.sources.files import first_present, need_folder, stream_list
from bt.errors import DataError


@dataclass
class VisualGenome(Source):
    """raw_dir: the folder with annotations/ and images/. One split, `train`.

    keep_karpathy_eval: keep the images that are in Karpathy's val or test split of COCO, as the official script does.
    A region counts for the image that it names itself. Phrases are taken as they are written.
    """

    splits = ("train",)
    home = "vg"

    keep_karpathy_eval: bool = False
    name: str = field(init=False, default="visual_genome")
    text_fields: dict = field(init=False, default_factory=lambda: {"captions": None})

    def count(self) -> int | None:
        """From image_data.json, where that is there: reading all regions only to count would take long."""
        if not self.path("image_data.json").exists():
            return None
        held_out = {} if self.keep_karpathy_eval else self._held_out()
        return len(read_json(self.path("image_data.json"))) - len(held_out)

    def samples(self, skip: Callable[[str], None]) -> Iterator[RawSample]:
        folders = [self.path("images", folder) for folder in ("VG_100K", "VG_100K_2")]
        need_folder(*folders)
        held_out = {} if self.keep_karpathy_eval else self._held_out()
        for image, phrases in self._phrases(skip).items():
            if image in held_out:
                skip(f"in karpathy {held_out[image]} of coco")
            else:
                path = first_present(f"{image}.jpg", folders)
                yield RawSample("train", str(image), {"": path}, {"captions": phrases, "image_id": image})

    def _phrases(self, skip: Callable[[str], None]) -> dict[int, list[str]]:
        """By image id, in the order of the file. All 5.4 million fit in memory: their boxes are let go at once."""
        phrases: dict[int, list[str]] = {}
        for entry in stream_list(self.path("annotations", "region_descriptions.json")):
            regions = entry.get("regions") if isinstance(entry, dict) else None
            if not isinstance(regions, list):
                skip("malformed entry")
                continue
            if not regions:
                skip("no region")
            for region in regions:
                image, phrase = (region.get("image_id"), region.get("phrase")) if isinstance(region, dict) else (0, 0)
                if type(image) is int and isinstance(phrase, str):
                    phrases.setdefault(image, []).append(phrase)
                else:
                    skip("malformed region")
        return phrases

    def _held_out(self) -> dict[int, str]:
        """Visual Genome's id -> "val" or "test", for the images in those splits of COCO."""
        split_of = {number: split for split in ("val", "test") for number in self._karpathy(split)}
        path = self._needed("image_data.json")
        try:
            return {e["image_id"]: split_of[e["coco_id"]] for e in read_json(path) if e["coco_id"] in split_of}
        except (KeyError, TypeError):
            raise DataError(f'{path} is not a list of {{"image_id": number, "coco_id": number or null}}') from None

    def _karpathy(self, split: str) -> set[int]:
        """COCO's ids of the images of a split."""
        path = self._needed("coco_splits", f"karpathy_{split}_images.txt")
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        found = [re.search(r"(\d+)\.", line) for line in lines if line.strip()]
        if not found or None in found:
            raise DataError(f"{path}: each line must name an image such as COCO_val2014_000000391895.jpg")
        return {int(match[1]) for match in found}

    def _needed(self, *parts: str) -> Path:
        path = self.path(*parts)
        if not path.exists():
            raise DataError(
                f"missing raw file: {path}; it tells which images are in Karpathy's val and test splits of COCO: "
                "give it, or source.keep_karpathy_eval=true to keep them"
            )
        return path
