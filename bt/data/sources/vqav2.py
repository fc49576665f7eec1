"""VQAv2: questions on COCO images, each answered by ten people (visualqa.org; official write_vqa.py).

Raw files, as in the official tree; raw_dir is the folder that holds them or the one above:

    mscoco_flickr30k_vqav2_snli_ve/
        train2014/COCO_train2014_<12 digits>.jpg, val2014/..., test2015/...
        vqav2/v2_OpenEnded_mscoco_{train2014,val2014,test2015,test-dev2015}_questions.json
        vqav2/v2_mscoco_{train2014,val2014}_annotations.json

METER and ViLT have the .json files beside the folders of images, without vqav2/.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from bt.data import answers as spelling
from bt.data.sources.base import RawSample, Source
from bt.data.sources.files import need_folder, stream_list, valid_utf8
from bt.data.sources.raw import COCO_HOME, ignore, inside, need
from bt.errors import ConfigError

QUESTION_TYPES = ["yes/no", "number", "other"]  # the data set's answer_type
_IMAGES = {"train": "train2014", "val": "val2014", "test": "test2015", "test-dev": "test2015"}
_QUESTIONS = {"train": "train2014", "val": "val2014", "test": "test2015", "test-dev": "test-dev2015"}


class Annotation(NamedTuple):
    """major: the one answer that the vocabulary counts. answers: of the ten people. kind: the answer_type."""

    major: str
    answers: list[str]
    kind: str


def check_answers(options: Mapping[str, Any], allowed: tuple[str, ...] = spelling.NORMALISE) -> dict[str, str]:
    """The option `answers` of a source as a plain mapping; ConfigError for anything but {"normalise": ...}."""
    if not isinstance(options, Mapping):
        raise ConfigError(f"source.answers={options}: give source.answers.normalise")
    unknown = sorted(set(options) - {"normalise"})
    if unknown:
        raise ConfigError(f"unknown option source.answers.{unknown[0]}: there is normalise")
    how = options.get("normalise", "official")
    if how not in allowed:
        raise ConfigError(f"source.answers.normalise={how}: allowed are {', '.join(allowed)}")
    return {"normalise": how}


def annotation_files(folder: Path) -> dict[str, Path]:
    """By split; folder: where they are, vqav2/ of the official tree. DataError if one is missing."""
    files = {split: folder / f"v2_mscoco_{split}2014_annotations.json" for split in ("train", "val")}
    need(*files.values())
    return files


def read_annotations(path: Path, skip: Callable[[str], None] = ignore) -> list[tuple[int, Annotation]]:
    """Question id and annotation, in the order of the file."""
    found = []
    for entry in stream_list(path, "annotations"):
        try:
            answers = [sys.intern(str(answer["answer"])) for answer in entry["answers"]]  # few differ
            kind, major = str(entry["answer_type"]), str(entry["multiple_choice_answer"])
            if not valid_utf8(major):  # it could become a class
                raise ValueError(major)
            found.append((int(entry["question_id"]), Annotation(major, answers, kind)))
        except (KeyError, TypeError, ValueError):
            skip("malformed annotation")
    return found


def answer_labels(annotations: Iterable[Annotation], how: str, minimum: int) -> dict[str, list[str]]:
    """Label maps. The vocabulary is that of all training and validation annotations, in this order; answers that are
    left as they are (`none`) still have the official one, as in METER and in the official tables without `_fix`."""
    spelt = "official" if how == "none" else how
    majors = (spelling.normalise(annotation.major, spelt) for annotation in annotations)
    return {"answers": spelling.vocabulary(majors, minimum), "question_types": QUESTION_TYPES}


@dataclass
class VQAv2(Source):
    """answers.normalise: how answers are spelt, see bt.data.answers. min_answer_count: a class is an answer that is the
    agreed one of so many questions of train and val: 3,129 with the official 9.

    A sample is an image with all its questions. An entry has `answers` (soft score by class), `raw_answers` (all ten,
    for metrics that need them) and `type`; in the test splits, whose answers are not public, `answers` is empty and
    the others are missing. Both annotation files are needed for every split, since they make the classes.

    As in the official script, questions of train and val without an answer among the classes are left out, which the
    official evaluation counts as wrong: of val, metrics over what is left are too good. keep_unanswerable=True keeps
    them, with `answers` empty: they then count in the official accuracy, but have no loss and no score. Unlike
    there, images come in the order of the questions and not shuffled anew each time, a missing image is counted, and
    nothing is cut off `val` by chance (`rest_val`, unused there).
    """

    splits = ("train", "val", "test", "test-dev")
    home = COCO_HOME

    answers: dict[str, Any] = field(default_factory=lambda: {"normalise": "official"})
    min_answer_count: int = 9
    keep_unanswerable: bool = False
    name: str = field(init=False, default="vqav2")
    text_fields: dict = field(init=False, default_factory=lambda: {"questions": "question"})

    def __post_init__(self):
        super().__post_init__()
        self.answers = check_answers(self.answers)

    def labels(self) -> dict[str, list[str]]:
        annotations = [a for path in self._annotation_files().values() for _, a in read_annotations(path)]
        return answer_labels(annotations, self.answers["normalise"], self.min_answer_count)

    def count(self) -> int:
        """Images with questions: at most so many samples."""
        return sum(len({image for image, _, _ in self._questions(split)}) for split in self.splits if self.wants(split))

    def samples(self, skip: Callable[[str], None]) -> Iterator[RawSample]:
        wanted = [split for split in self.splits if self.wants(split)]
        need(*map(self._questions_file, wanted))
        for split in wanted:
            need_folder(self.path(_IMAGES[split]))
        annotations = {
            split: read_annotations(path, skip if split in wanted else ignore)
            for split, path in self._annotation_files().items()
        }
        everyone = [annotation for split in annotations.values() for _, annotation in split]
        known = set(answer_labels(everyone, self.answers["normalise"], self.min_answer_count)["answers"])
        for split in wanted:
            # Where a question has two annotations the first counts, as in the official script.
            given = dict(reversed(annotations[split])) if split in annotations else None
            part = _IMAGES[split]
            folder = self.path(part)
            for image, entries in self._entries(split, given, known, skip).items():
                key = f"COCO_{part}_{image:012d}"
                info = {"image_id": image, "questions": entries}
                yield RawSample(split, key, {"": folder / f"{key}.jpg"}, info)

    def _folder(self) -> Path:
        return inside(self.path(), "vqav2", "v2_*.json")

    def _annotation_files(self) -> dict[str, Path]:
        return annotation_files(self._folder())

    def _questions_file(self, split: str) -> Path:
        return self._folder() / f"v2_OpenEnded_mscoco_{_QUESTIONS[split]}_questions.json"

    def _questions(self, split: str, skip: Callable[[str], None] = ignore) -> Iterator[tuple[int, int, str]]:
        """Image id, question id and question, in the order of the file."""
        path = self._questions_file(split)
        for entry in stream_list(path, "questions"):
            try:
                image, number, question = int(entry["image_id"]), int(entry["question_id"]), entry["question"]
            except (KeyError, TypeError, ValueError):
                question = None
            if isinstance(question, str):
                yield image, number, question
            else:
                skip("malformed question")

    def _entries(
        self, split: str, given: dict[int, Annotation] | None, known: set[str], skip: Callable[[str], None]
    ) -> dict[int, list[dict[str, Any]]]:
        """The questions to keep by image id. given: annotations by question id; None where there are none."""
        images: dict[int, list[dict[str, Any]]] = {}
        seen = set()
        for image, number, question in self._questions(split, skip):
            if number in seen:
                skip("duplicate question")
                continue
            seen.add(number)
            entry: dict[str, Any] = {"id": number, "question": question, "answers": {}}
            if given is not None:
                annotation = given.get(number)
                if annotation is None:
                    skip("question without annotation")
                    continue
                spelt = (spelling.normalise(answer, self.answers["normalise"]) for answer in annotation.answers)
                scores = spelling.soft_scores(spelt, known)
                if not scores and not self.keep_unanswerable:
                    skip("question without an answer among the classes")
                    continue
                entry |= {"answers": scores, "raw_answers": annotation.answers, "type": annotation.kind}
            images.setdefault(image, []).append(entry)
        for _ in set(given or ()) - seen:
            skip("annotation without question")
        return images
