"""Pictures and what is true of them: what every raw tree is made from, whoever provides it."""

from __future__ import annotations

import io
import random
from collections.abc import Mapping
from dataclasses import dataclass

from PIL import Image

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Fact:
    """A property that each picture of a collection has, and how one speaks of it.

    values: all that it can be. say: a statement, check: a question for yes or no; in both {} stands for the value and
    {a} for the value with its article. ask: the question that the value answers. noun: what the property is called.
    type: the type that VQAv2 gives to such an answer.
    """

    values: tuple[str, ...]
    say: str
    check: str
    ask: str
    noun: str
    type: str = "other"

    def statement(self, value: str) -> str:
        return self.say.format(value, a=with_article(value))

    def question(self, value: str) -> str:
        return self.check.format(value, a=with_article(value))


@dataclass(frozen=True)
class Question:
    """type: "yes/no", "number" or "other"."""

    text: str
    answer: str
    type: str


@dataclass(frozen=True)
class Item:
    """A picture. png: its file. facts: the value of each of the collection's facts. title, tags: what it shows, in
    words. questions: those that came with it; empty where they are made by rule."""

    name: str
    split: str
    png: bytes
    facts: Mapping[str, str]
    title: str
    tags: tuple[str, ...] = ()
    questions: tuple[Question, ...] = ()

    def image(self) -> Image.Image:
        """RGB."""
        return Image.open(io.BytesIO(self.png)).convert("RGB")


@dataclass(frozen=True)
class Collection:
    """name: of the provider. items: in no telling order. facts: by name; "color" is one of them, and `hues` are those
    of its values that a picture without colours does not show. captions: templates over the names of the facts, {title}
    and {tags}; the first one names every fact."""

    name: str
    items: tuple[Item, ...]
    facts: Mapping[str, Fact]
    hues: tuple[str, ...]
    captions: tuple[str, ...]

    def of(self, *splits: str) -> list[Item]:
        return [item for item in self.items if item.split in splits]


def with_article(noun: str) -> str:
    """ "an animal", "a circle"."""
    return f"{'an' if noun[0].lower() in 'aeiou' else 'a'} {noun}"


def generator(*names: object) -> random.Random:
    """Random numbers that depend on these names alone."""
    return random.Random("/".join(map(str, names)))


def split_sizes(total: int) -> dict[str, int]:
    """Of `total` pictures a sixth, but at least one, for val and for test each."""
    part = max(1, total // 6)
    return {"train": total - 2 * part, "val": part, "test": part}
