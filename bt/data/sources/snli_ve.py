"""SNLI-VE: does a Flickr30K image entail a sentence (github.com/necla-ml/SNLI-VE; official write_snli.py).

Raw files, as in the official tree; raw_dir is the folder that holds them or the one above:

    mscoco_flickr30k_vqav2_snli_ve/
        snli_ve/snli_ve_{train,dev,test}.jsonl
        flickr30k-images/<Flickr30K_ID>.jpg

METER has the .jsonl files without snli_ve/, and the images in Flickr30K/images/.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bt.data.sources.base import RawSample, Source
from bt.data.sources.files import need_folder, sample_key
from bt.data.sources.raw import COCO_HOME, ignore, inside, json_lines, need

_CLASSES = ["contradiction", "neutral", "entailment"]


@dataclass
class SNLIVE(Source):
    """A sample is an image with all its hypotheses (sentence2, without white space around it, as the official data set
    reads them), in the order in which the images first occur. The premise (sentence1) is a caption of the image, which
    no model is shown, and is left out.

    Lines whose annotators did not agree (gold label "-"), on which the official script ends, are counted as
    no_gold_label. The official recipe validates and tests on dev and test together.
    """

    splits = ("train", "dev", "test")
    home = COCO_HOME

    name: str = field(init=False, default="snli_ve")
    text_fields: dict = field(init=False, default_factory=lambda: {"hypotheses": "text"})

    def labels(self) -> dict[str, list[str]]:
        return {"classes": _CLASSES}

    def count(self) -> int:
        return sum(len(self._hypotheses(split, ignore)) for split in self.splits if self.wants(split))

    def samples(self, skip: Callable[[str], None]) -> Iterator[RawSample]:
        wanted = [split for split in self.splits if self.wants(split)]
        images = self.path("flickr30k-images")
        if not images.is_dir() and self.path("Flickr30K", "images").is_dir():
            images = self.path("Flickr30K", "images")
        need(*map(self._file, wanted))
        need_folder(images)
        for split in wanted:
            for image, hypotheses in self._hypotheses(split, skip).items():
                yield RawSample(split, sample_key(image), {"": images / f"{image}.jpg"}, {"hypotheses": hypotheses})

    def _file(self, split: str) -> Path:
        return inside(self.path(), "snli_ve", "snli_ve_*.jsonl") / f"snli_ve_{split}.jsonl"

    def _hypotheses(self, split: str, skip: Callable[[str], None]) -> dict[str, list[dict[str, Any]]]:
        """By image id. An entry's id is the file's pairID, or the line's number where there is none."""
        images: dict[str, list[dict[str, Any]]] = {}
        for number, line in json_lines(self._file(split), skip):
            try:
                image, text, label = str(line["Flickr30K_ID"]), line["sentence2"].strip(), line["gold_label"]
                name = line.get("pairID", number)
            except (KeyError, TypeError, AttributeError):
                skip("malformed line")
                continue
            if label in _CLASSES:
                entry = {"id": name, "text": text, "label": _CLASSES.index(label)}
                images.setdefault(image, []).append(entry)
            else:
                skip("no_gold_label" if label == "-" else "unknown label")
        return images
