"""Raw trees of labelled texts: NLVR2, SNLI-VE, and a table of one's own."""

from __future__ import annotations

import csv
import io
import random
from collections.abc import Iterator
from pathlib import Path

from bt.data.sources.raw import COCO_HOME
from bt.samples.collection import SPLITS, Collection, Item, generator
from bt.samples.trees.captions import flickr_id
from bt.samples.trees.files import put, put_jpeg, put_lines
from bt.samples.words import captions, hypotheses, pair_statements, questions

_IMAGES_A_DIRECTORY = 100  # of the pairs of train


def nlvr2(collection: Collection, raw_dir: Path, seed: int) -> None:
    """As many pairs as pictures, with four statements each (`pair_statements`); dev is val. The first half of the pairs
    of dev and test1 are their balanced part, the rest the unbalanced one."""
    root = raw_dir / "nlvr"
    for split, name in zip(SPLITS, ("train", "dev", "test1"), strict=True):
        draw = generator("nlvr2", seed, split)
        lines: list[list[dict]] = []
        for number, (left, right, fact) in enumerate(_pairs(collection, split, draw)):
            directory = number // _IMAGES_A_DIRECTORY
            folder = root / (f"images/train/{directory}" if split == "train" else name)
            for side, item in enumerate((left, right)):
                put(folder / f"{name}-{number}-0-img{side}.png", item.png)
            more = {"directory": directory} if split == "train" else {}
            lines.append(
                [
                    {"identifier": f"{name}-{number}-0-{k}", "sentence": text, "label": str(label), **more}
                    for k, (text, label) in enumerate(pair_statements(collection, left, right, fact, draw))
                ]
            )
        data, half = root / "nlvr2/data", (len(lines) + 1) // 2
        put_lines(data / f"{name}.json", sum(lines, []))
        if split != "train":
            put_lines(data / f"balanced/balanced_{name}.json", sum(lines[:half], []))
            put_lines(data / f"unbalanced/unbalanced_{name}.json", sum(lines[half:], []))


def _pairs(collection: Collection, split: str, draw: random.Random) -> Iterator[tuple[Item, Item, str]]:
    """Each picture once on the left, with another that has the same value of a fact as often as not, and the fact."""
    items = collection.of(split)
    having: dict[tuple[str, str], list[Item]] = {}
    for item in items:
        for fact in item.facts.items():
            having.setdefault(fact, []).append(item)
    for left in items:
        name, same = draw.choice(list(collection.facts)), draw.random() < 0.5
        own = left.facts[name]
        values = [
            value for value in collection.facts[name].values if (value == own) == same and (name, value) in having
        ]
        fitting = having[name, draw.choice(values or [own])]
        others = [item for item in draw.sample(fitting, min(2, len(fitting))) if item is not left]
        yield left, others[0] if others else draw.choice(items), name


def snli_ve(collection: Collection, raw_dir: Path, seed: int) -> None:
    """Two hypotheses a picture (`hypotheses`); every other picture is shown without colours. Pictures whose colour is
    no hue, such as black, are left out."""
    folder = raw_dir / COCO_HOME
    for split, name in zip(SPLITS, ("train", "dev", "test"), strict=True):
        lines = []
        for place, (number, item) in enumerate(_with_hue(collection, split)):
            grey, image = place % 2 == 1, flickr_id(number)
            put_jpeg(folder / f"flickr30k-images/{image}.jpg", item.image().convert("L" if grey else "RGB"))
            found = hypotheses(collection, item, grey, generator("snli_ve", seed, item.name))
            for k, (text, label) in enumerate(found):
                line = {"Flickr30K_ID": str(image), "pairID": f"{image}.jpg#0r{k}", "gold_label": label}
                lines.append({**line, "sentence1": captions(collection, item)[0], "sentence2": text})
        put_lines(folder / f"snli_ve/snli_ve_{name}.jsonl", lines)


def _with_hue(collection: Collection, split: str) -> list[tuple[int, Item]]:
    return [
        (number, item)
        for number, item in enumerate(collection.items, 1)
        if item.split == split and item.facts["color"] in collection.hues
    ]


def image_folder_csv(collection: Collection, raw_dir: Path, seed: int) -> None:
    """pictures.csv with image, question, answer and split, and the images in a folder a split."""
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["image", "question", "answer", "split"])
    for item in collection.items:
        put(raw_dir / item.split / f"{item.name}.png", item.png)
        for asked in questions(collection, item, generator("questions", seed, item.name)):
            writer.writerow([f"{item.split}/{item.name}.png", asked.text, asked.answer, item.split])
    put(raw_dir / "pictures.csv", table.getvalue())
