"""easy-VQA: coloured shapes on 64-pixel images with questions from templates (PyPI package `easy-vqa` 1.0, MIT).

Raw files, inside the package's folder:

    data/answers.txt                     the 13 answers, one a line
    data/{train,test}/questions.json     [[question, answer, image id], ...]: 38,575 and 9,673
    data/{train,test}/images/<id>.png    4,000 and 1,000 images
"""

from __future__ import annotations

import importlib.util
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bt.data.sources.base import RawSample, Source, read_json
from bt.errors import DataError

HELD_OUT_EVERY = 10  # images of the training part whose id divides by this make the validation split

# Question -> statement that is true if the answer is "yes"; None: of the kind that makes no caption.
_YES = [
    (re.compile(r"is there not (.+)\?"), None),
    (re.compile(r"is there (.+)\?"), r"there is \1"),
    (re.compile(r"does the image contain (.+)\?"), r"the image contains \1"),
    (re.compile(r"does the image not contain (.+)\?"), None),
    (re.compile(r"is a (.+) present\?"), r"a \1 is present"),
    (re.compile(r"is no (.+) present\?"), None),
]
# Question -> statement that is true with its answer in the place of {}, and what kind of answer it asks for.
_OPEN = [
    (re.compile(r"what color is the (.+)\?"), r"the \1 is {}", "color"),
    (re.compile(r"what is the color of the (.+)\?"), r"the color of the \1 is {}", "color"),
    (re.compile(r"what is the (.+) shape\?"), r"the \1 shape is a {}", "shape"),
    (re.compile(r"what shape does the image contain\?"), r"the image contains a {}", "shape"),
    (re.compile(r"what shape is in the image\?"), r"a {} is in the image", "shape"),
    (re.compile(r"what shape is present\?"), r"a {} is present", "shape"),
]
QUESTION_TYPES = ["yes/no", "color", "shape"]


def statement(question: str, answer: str) -> tuple[str, str | None]:
    """The question's type and the statement of what is in the image that question and answer make, None if none.

    "is there a blue circle?" + "yes" -> "there is a blue circle"; "what color is the shape?" + "teal" -> "the shape is
    teal". The answer "no" makes none, nor does a negated question: what is not in an image is not in most others
    either, so that hardly a false image could be told from the true one.
    DataError if the question is none of the data set's templates.
    """
    for pattern, template in _YES:
        if found := pattern.fullmatch(question):
            if answer not in ("yes", "no"):
                break
            return "yes/no", found.expand(template) if template and answer == "yes" else None
    for pattern, template, kind in _OPEN:
        if found := pattern.fullmatch(question):
            return kind, found.expand(template).format(answer)
    raise DataError(f"easy_vqa: question {question!r} with answer {answer!r} fits none of the known templates")


@dataclass
class EasyVQA(Source):
    """raw_dir: the package's folder; null finds the installed package.

    Splits: `test` is the package's; of its training images those whose id divides by ten (400 of 4,000) are `val`, the
    rest `train`. A sample has `questions` and, made from their answers (see `statement`), `captions`, each once, in the
    order of the questions; 121 images (81 of `train`, 6 of `val`, 34 of `test`) are asked about what is not in them
    alone and have no caption. A question's id is its place in questions.json; train and val share one file.
    """

    splits = ("train", "val", "test")

    name: str = field(init=False, default="easy_vqa")
    text_fields: dict = field(init=False, default_factory=lambda: {"captions": None, "questions": "question"})

    def labels(self) -> dict[str, list[str]]:
        path = self._folder() / "answers.txt"
        try:
            answers = path.read_text(encoding="utf-8").split()
        except OSError:
            raise DataError(f"missing raw file: {path}") from None
        return {"answers": answers, "question_types": QUESTION_TYPES}

    def count(self) -> int:
        return sum(len(images) for split, _, images in self._parts() if self.wants(split))

    def samples(self, skip: Callable[[str], None]) -> Iterator[RawSample]:
        for split, part, images in self._parts():
            if not self.wants(split):
                continue
            folder = self._folder() / part / "images"
            for number, questions in images.items():
                yield RawSample(split, f"{split}-{number:06d}", {"": folder / f"{number}.png"}, self._info(questions))

    def _parts(self) -> list[tuple[str, str, dict[int, list[tuple[int, str, str]]]]]:
        """Split, the package's part that it is of, and its questions by image."""
        train, test = self._by_image("train"), self._by_image("test")
        return [
            ("train", "train", {i: q for i, q in train.items() if i % HELD_OUT_EVERY}),
            ("val", "train", {i: q for i, q in train.items() if not i % HELD_OUT_EVERY}),
            ("test", "test", test),
        ]

    def _folder(self) -> Path:
        if self.raw_dir is not None:
            return Path(self.raw_dir).expanduser() / "data"
        package = importlib.util.find_spec("easy_vqa")
        if package is None:
            raise DataError("easy_vqa: the package is not installed: `pip install easy-vqa==1.0`, or give raw_dir")
        return Path(package.origin).parent / "data"

    def _by_image(self, part: str) -> dict[int, list[tuple[int, str, str]]]:
        """Image id -> (question id, question, answer), in the order of image ids."""
        path = self._folder() / part / "questions.json"
        images = defaultdict(list)
        try:
            for number, (question, answer, image) in enumerate(read_json(path)):
                images[int(image)].append((number, question, answer))
        except (TypeError, ValueError):
            raise DataError(f"{path} is not a list of [question, answer, image id]") from None
        return dict(sorted(images.items()))

    def _info(self, questions: list[tuple[int, str, str]]) -> dict[str, Any]:
        captions: dict[str, None] = {}
        entries = []
        for number, question, answer in questions:
            kind, caption = statement(question, answer)
            entries.append({"id": number, "question": question, "answers": {answer: 1.0}, "type": kind})
            if caption is not None:
                captions[caption] = None
        return {"captions": list(captions), "questions": entries}
