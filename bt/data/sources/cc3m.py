"""Conceptual Captions 3M: images of the web with captions made from their alt texts.

Raw files in one of three layouts, looked for in this order for each of the splits train and val. raw_dir is the folder
that holds them or the one above, if that calls it cc/, as the official tree does:

    utils/Train_GCC-training.tsv                      caption <tab> URL, one row an image, no header
    utils/Validation_GCC-1.1.0-Validation.tsv
    {train,val}_image_exist.txt                       one path a line of an image that was downloaded
    {train,val}_image/<row>.<ending>                  the images, by the number of their row from 0

    {train,val}_annot.json                            [[path or URL, caption], ...]: see bt/data/sources/web.py
    images_{train,val}/*/*

    00000.tar, ... or train/*.tar; val/*.tar          img2dataset's shards: see bt/data/sources/web.py

A row without an image is normal and counted as a dead link; an image that the list names but that is not there is
counted as missing. As in the official script (src/utils/write_conceptual_caption.py) quotes around a caption are
taken off and a caption in quotes may span lines (then it is one row); unlike there, the order is that of the rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from bt.data.sources.base import RawSample
from bt.data.sources.files import csv_rows, image_key, need_folder, valid_utf8
from bt.data.sources.web import DEAD, Skip, WebCaptions
from bt.errors import DataError

_TSV = {"train": "Train_GCC-training.tsv", "val": "Validation_GCC-1.1.0-Validation.tsv"}


@dataclass
class CC3M(WebCaptions):
    """raw_dir: the folder with one of the layouts. Splits `train` and `val`; one caption an image."""

    splits = ("train", "val")
    home = "cc"
    official: ClassVar[str] = "utils/{Train_GCC-training,Validation_GCC-1.1.0-Validation}.tsv"
    annotations: ClassVar[str] = "{}_annot.json"

    name: str = field(init=False, default="cc3m")

    def official_present(self, split: str) -> bool:
        return self.path("utils", _TSV[split]).exists()

    def official_count(self, split: str) -> int:
        return len(self._present(split, lambda reason: None))

    def official_samples(self, split: str, skip: Skip) -> Iterator[RawSample]:
        folder = self.path(f"{split}_image")
        need_folder(folder)
        present = self._present(split, skip)
        for number, row in enumerate(csv_rows(self.path("utils", _TSV[split]), "\t")):
            name = present.pop(number, None)
            if name is None:
                skip(DEAD)
            elif not valid_utf8(row[0]):
                skip("line is not utf-8")
            else:
                yield RawSample(split, image_key(name), {"": folder / name}, {"captions": [row[0]]})
        for _ in present:
            skip("line of the image list beyond the table")

    def _present(self, split: str, skip: Skip) -> dict[int, str]:
        """Row number -> file name of the images that were downloaded."""
        path = self.path(f"{split}_image_exist.txt")
        if not path.exists():
            raise DataError(f"missing raw file: {path}, which names the downloaded images, one a line (<row>.<ending>)")
        present: dict[int, str] = {}
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                name = Path(line.strip()).name
                row = name.partition(".")[0]
                if not row.isdecimal():
                    skip("line of the image list without a number")
                elif int(row) in present:
                    skip("row listed before")
                else:
                    present[int(row)] = name
        return present
