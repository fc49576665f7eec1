"""Pictures of easy-VQA: one coloured shape each, with the package's own questions (PyPI `easy-vqa` 1.0, MIT).

Shape and colour are taken from questions and answers, the place of the shape from the pixels. Of the 5,000 images
those are used whose shape and colour the questions tell and whose shape is clearly within a third of the picture,
about half. Splits are those of the package, with the validation part of `source=easy_vqa`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

from bt.data.sources.base import read_json
from bt.data.sources.easy_vqa import HELD_OUT_EVERY
from bt.errors import DataError
from bt.samples.collection import Collection, Fact, Item, Question, generator, split_sizes

_CORNERS = {"circle": "0", "rectangle": "4", "triangle": "3"}
_HUES = ("blue", "brown", "green", "red", "teal", "yellow")
FACTS = {
    "kind": Fact(tuple(_CORNERS), "there is {a}", "is there {a}?", "what shape is there?", "shape"),
    "color": Fact(
        tuple(sorted((*_HUES, "black", "gray"))),
        "the shape is {}",
        "is the shape {}?",
        "what color is the shape?",
        "color of the shape",
    ),
    "height": Fact(
        ("top", "middle", "bottom"),
        "the shape is in the {} third of the picture",
        "is the shape in the {} third of the picture?",
        "is the shape at the top, in the middle or at the bottom?",
        "height of the shape",
    ),
    "side": Fact(
        ("left", "center", "right"),
        "the shape is in the {} third of the picture",
        "is the shape in the {} third of the picture?",
        "is the shape on the left, in the center or on the right?",
        "side of the shape",
    ),
}
CAPTIONS = (
    "a {color} {kind} in the {height} {side}",
    "the {height} {side} of the picture has a {color} {kind}",
    "one {kind} , {color} , drawn in the {height} {side} third",
    "a {kind} in {color} on the {side}",
    "a {color} {kind} on a light ground",
)


def package_data() -> Path:
    """The folder of the package's raw files; DataError if it is not installed."""
    package = find_spec("easy_vqa")
    if package is None:
        raise DataError("the package easy-vqa is not installed: `pip install easy-vqa==1.0`")
    return Path(package.origin).parent / "data"


def easy_vqa(limit: int | None = None, seed: int = 0) -> Collection:
    """limit: so many pictures, drawn with `seed`; None for all that can be used."""
    folder = package_data()
    wanted = split_sizes(limit) if limit else dict.fromkeys(("train", "val", "test"), 5000)
    items = []
    for part, splits in (("train", ("train", "val")), ("test", ("test",))):
        asked = _by_image(folder / part / "questions.json")
        numbers = sorted(asked)
        generator("easy_vqa", part, seed).shuffle(numbers)
        for split in splits:
            found = _items(folder / part / "images", part, split, {n: asked[n] for n in numbers})
            items += [item for item, _ in zip(found, range(wanted[split]), strict=False)]
    return Collection("easy_vqa", tuple(items), FACTS, _HUES, CAPTIONS)


def _by_image(path: Path) -> dict[int, list[tuple[str, str]]]:
    """Questions with their answers by image; each question once."""
    asked: dict[int, dict[str, str]] = {}
    for question, answer, image in read_json(path):
        asked.setdefault(image, {})[question] = answer
    return {image: list(questions.items()) for image, questions in asked.items()}


def _items(images: Path, part: str, split: str, asked: dict[int, list[tuple[str, str]]]) -> Iterator[Item]:
    for number, questions in asked.items():
        if part == "train" and (split == "val") != (number % HELD_OUT_EVERY == 0):
            continue
        kind, color = _told(questions, _CORNERS), _told(questions, FACTS["color"].values)
        place = _place(images / f"{number}.png") if kind and color else None
        if place is not None:
            facts = {"kind": kind, "color": color, "height": place[0], "side": place[1]}
            png = (images / f"{number}.png").read_bytes()
            yield Item(f"{part}-{number}", split, png, facts, kind, questions=_questions(questions, kind))


def _told(questions: list[tuple[str, str]], words) -> str | None:
    """The one of the words that questions and answers say is in the picture; None if they do not tell."""
    for question, answer in questions:
        denied = " not " in question or question.startswith("is no ")
        true = question if answer == ("no" if denied else "yes") else answer
        if question.startswith("what"):
            true = f"{question} {answer}"
        found = [word for word in words if word in re.findall(r"\w+", true)]
        if found:
            return found[0]
    return None


def _place(path: Path) -> tuple[str, str] | None:
    """The third of the picture, from top to bottom and from left to right, that the shape's centre is clearly in."""
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    ground = np.median(np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]]), axis=0)
    thirds = []
    for where, names in zip(np.nonzero(np.abs(pixels - ground).sum(2) > 60), ("height", "side"), strict=True):
        centre = 3 * (where.min() + where.max() + 1) / 2 / len(pixels)
        if min(abs(centre - 1), abs(centre - 2)) < 0.1:  # nobody could tell which of two thirds it is
            return None
        thirds.append(FACTS[names].values[int(centre)])
    return thirds[0], thirds[1]


def _questions(questions: list[tuple[str, str]], kind: str) -> tuple[Question, ...]:
    """The package's, and two that a number answers."""
    given = [Question(text, answer, "yes/no" if answer in ("yes", "no") else "other") for text, answer in questions]
    corners = ("how many corners does the shape have?", "what is the number of corners?")
    return (*given, *(Question(text, _CORNERS[kind], "number") for text in corners))
