"""VGQA: Visual Genome's questions whose answers are classes of VQAv2 (official vgqa_split.py, write_vgqa.py).

Raw files, as in the official tree; raw_dir is the folder vg/ or the one above:

    vg/
        annotations/question_answers.json
        image_data.json                       with coco_id and image_id of every image
        coco_splits/karpathy_{train,val,test}_images.txt
        images/VG_100K/<image id>.jpg, images/VG_100K_2/<image id>.jpg
    mscoco_flickr30k_vqav2_snli_ve/
        vqav2/v2_mscoco_{train2014,val2014}_annotations.json
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bt.data import answers as spelling
from bt.data.sources import vqav2
from bt.data.sources.base import RawSample, Source
from bt.data.sources.files import first_present, need_folder, stream_list
from bt.data.sources.raw import COCO_HOME, inside, need, text_lines
from bt.errors import DataError

_HELD_OUT = 5000  # images of val and of test


def split_images(images: list[tuple[int, int | None]], karpathy: dict[str, set[int]]) -> dict[str, set[int]]:
    """Image ids by split, so that no image of Karpathy's COCO val and test is in train.

    images: Visual Genome's image id and COCO id, in the order of image_data.json. Images outside COCO fill test and
    then val up to 5,000, drawn by Python's `random` with seed 0; the rest are train. The official split, number for
    number.
    """
    splits = {split: {image for image, coco in images if coco and coco in ids} for split, ids in karpathy.items()}
    within = set().union(*karpathy.values())
    remainder = [image for image, coco in images if not coco or coco not in within]
    random.Random(0).shuffle(remainder)
    for split in ("test", "val"):
        while remainder and len(splits[split]) < _HELD_OUT:
            splits[split].add(remainder.pop())
    splits["train"].update(remainder)
    return splits


@dataclass
class VGQA(Source):
    """vqav2_dir: see the tree; null finds it there. coco_only: images in Karpathy's COCO splits alone. answers,
    min_answer_count: as for VQAv2; with the same values the label maps are the same, so that the two can be mixed.

    `train` and `val` as in the official tables, where `val` holds both val and test of the split; the official option
    trains on both. A question is kept if its answer, spelt as the option says, is a class. One that has several such
    answers on its image is left out altogether; of a repetition with the same answer the first stays. Score 1. An
    entry has no `type`.
    """

    splits = ("train", "val")
    home = "vg"

    vqav2_dir: str | None = None
    coco_only: bool = False
    answers: dict[str, Any] = field(default_factory=lambda: {"normalise": "official"})
    min_answer_count: int = 9
    name: str = field(init=False, default="vgqa")
    text_fields: dict = field(init=False, default_factory=lambda: {"questions": "question"})

    def __post_init__(self):
        super().__post_init__()
        self.answers = vqav2.check_answers(self.answers, ("official", "fixed"))

    def options(self) -> dict[str, Any]:
        return {name: value for name, value in super().options().items() if name != "vqav2_dir"}

    def labels(self) -> dict[str, list[str]]:
        files = vqav2.annotation_files(self._vqav2_dir())
        annotations = [a for path in files.values() for _, a in vqav2.read_annotations(path)]
        return vqav2.answer_labels(annotations, self.answers["normalise"], self.min_answer_count)

    def samples(self, skip: Callable[[str], None]) -> Iterator[RawSample]:
        questions = self.path("annotations", "question_answers.json")
        need(questions, self.path("image_data.json"), *self._karpathy_files().values())
        image_folders = [self.path("images", part) for part in ("VG_100K", "VG_100K_2")]
        need_folder(*image_folders)
        split_of = self._split_of()
        known = set(self.labels()["answers"])
        wanted: dict[str, list[tuple[int, list[Any]]]] = {split: [] for split in self.splits if self.wants(split)}
        for entry in stream_list(questions):
            try:
                image = int(entry["qas"][0]["image_id"])
            except (KeyError, TypeError, ValueError):
                skip("malformed questions of an image")
                continue
            except IndexError:  # an image without questions
                continue
            if image not in split_of:
                skip("image in no split")
            elif split_of[image] in wanted:
                wanted[split_of[image]].append((image, entry["qas"]))
        for split, images in wanted.items():
            for image, asked in images:
                entries = self._entries(asked, known, skip)
                if entries:
                    path = first_present(f"{image}.jpg", image_folders)
                    yield RawSample(split, f"VG_{image}", {"": path}, {"image_id": image, "questions": entries})

    def _entries(self, asked: list[Any], known: set[str], skip: Callable[[str], None]) -> list[dict[str, Any]]:
        """The questions of one image to keep."""
        pairs, answers = [], {}
        for entry in asked:
            try:
                number, question, answer = int(entry["qa_id"]), entry["question"], entry["answer"]
                answer = spelling.normalise(answer, self.answers["normalise"])
                if not isinstance(question, str):
                    raise TypeError
            except (KeyError, TypeError, ValueError, AttributeError):
                skip("malformed question")
                continue
            if answer in known:
                pairs.append((number, question, answer))
                answers.setdefault(question, set()).add(answer)
            else:
                skip("question without an answer among the classes")
        entries, seen = [], set()
        for number, question, answer in pairs:
            if len(answers[question]) > 1:
                skip("question with several answers")
            elif question in seen:
                skip("repeated question")
            else:
                seen.add(question)
                entries.append({"id": number, "question": question, "answers": {answer: 1.0}})
        return entries

    def _vqav2_dir(self) -> Path:
        if self.vqav2_dir is not None:
            return Path(self.vqav2_dir).expanduser()
        return inside(self.path().absolute().parent / COCO_HOME, "vqav2", "v2_*.json")

    def _karpathy_files(self) -> dict[str, Path]:
        names = ("train", "val", "test")
        return {name: self.path("coco_splits", f"karpathy_{name}_images.txt") for name in names}

    def _split_of(self) -> dict[int, str]:
        """Split by image id; with coco_only without the images that are not in COCO."""
        karpathy = {name: _coco_ids(path) for name, path in self._karpathy_files().items()}
        path = self.path("image_data.json")
        try:
            images = [(int(entry["image_id"]), entry["coco_id"]) for entry in stream_list(path)]
        except (KeyError, TypeError, ValueError):
            raise DataError(f"{path} is not a list of objects with image_id and coco_id") from None
        if self.coco_only:
            within = set().union(*karpathy.values())
            images = [(image, coco) for image, coco in images if coco in within]
        splits = split_images(images, karpathy)
        return {image: "train" if split == "train" else "val" for split, ids in splits.items() for image in ids}


def _coco_ids(path: Path) -> set[int]:
    """One line an image, such as `train2014/COCO_train2014_000000057870.jpg 57870`."""
    try:
        return {
            int(line.split(".")[0].rpartition("_")[2]) for _, line in text_lines(path, _broken(path)) if line.strip()
        }
    except ValueError:
        raise DataError(f"{path} is not a list of COCO image files, one a line") from None


def _broken(path: Path) -> Callable[[str], None]:
    def stop(reason: str) -> None:
        raise DataError(f"{path}: {reason}")

    return stop
