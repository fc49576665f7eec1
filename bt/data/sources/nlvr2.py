"""NLVR2: statements on pairs of photographs, true or false (lil.nlp.cornell.edu/nlvr; official write_nlvr2.py).

Raw files, a clone of the NLVR repository with the images unpacked; raw_dir is the folder nlvr/ or the one above:

    nlvr/
        nlvr2/data/{train,dev,test1}.json                 one json object a line
        nlvr2/data/{balanced,unbalanced}/{balanced,unbalanced}_{dev,test1}.json
        images/train/<directory>/<pair>-img{0,1}.png
        dev/<pair>-img{0,1}.png, test1/<pair>-img{0,1}.png
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bt.data.sources.base import RawSample, Source
from bt.data.sources.files import need_folder, sample_key
from bt.data.sources.raw import ignore, json_lines, need

_CLASSES = ["False", "True"]


@dataclass
class NLVR2(Source):
    """split=null means train, dev and test1; the balanced and unbalanced parts of dev and test1 must be asked for.

    A sample is a pair of images, `left` (img0) and `right` (img1), with all its statements, in the order in which the
    pairs first occur. A pair's name is the statement's identifier without its last part. Unlike the official script,
    broken lines and missing images are counted.
    """

    splits = ("train", "dev", "test1", "balanced_dev", "balanced_test1", "unbalanced_dev", "unbalanced_test1")
    home = "nlvr"

    name: str = field(init=False, default="nlvr2")
    text_fields: dict = field(init=False, default_factory=lambda: {"statements": "text"})

    def wants(self, split: str) -> bool:
        return split in (self.split or ("train", "dev", "test1"))

    def labels(self) -> dict[str, list[str]]:
        return {"classes": _CLASSES}

    def count(self) -> int:
        return sum(len(self._pairs(split, ignore)) for split in self.splits if self.wants(split))

    def samples(self, skip: Callable[[str], None]) -> Iterator[RawSample]:
        wanted = [split for split in self.splits if self.wants(split)]
        need(*map(self._file, wanted))
        for split in wanted:
            need_folder(self._images(split))
        for split in wanted:
            folder = self._images(split)
            for pair, (directory, statements) in self._pairs(split, skip).items():
                start = folder / directory
                images = {side: start / f"{pair}-img{n}.png" for n, side in enumerate(("left", "right"))}
                yield RawSample(split, sample_key(pair), images, {"statements": statements})

    def _file(self, split: str) -> Path:
        part = split.rpartition("_")[0]  # "balanced" of balanced_dev
        return self.path("nlvr2", "data", part, f"{split}.json")

    def _images(self, split: str) -> Path:
        return self.path("images", "train") if split == "train" else self.path(split.rpartition("_")[2])

    def _pairs(self, split: str, skip: Callable[[str], None]) -> dict[str, tuple[str, list[dict[str, Any]]]]:
        """By pair: the directory of its images, which train has, and its statements."""
        pairs: dict[str, tuple[str, list[dict[str, Any]]]] = {}
        for _, line in json_lines(self._file(split), skip):
            try:
                identifier, text, label = line["identifier"], line["sentence"], line["label"]
                directory = str(line["directory"]) if split == "train" else ""
                pair = identifier.rpartition("-")[0]
            except (KeyError, TypeError, AttributeError):
                pair = text = None
            if not pair or not isinstance(text, str):
                skip("malformed line")
            elif label not in _CLASSES:
                skip("unknown label")
            else:
                entry = {"id": identifier, "text": text, "label": _CLASSES.index(label)}
                pairs.setdefault(pair, (directory, []))[1].append(entry)
        return pairs
