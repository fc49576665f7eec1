"""Raw trees of captions: COCO and Flickr30K with Karpathy's splits, Visual Genome, SBU, Conceptual Captions."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bt.samples.collection import Collection, Item, generator
from bt.samples.trees.files import put_jpeg, put_json, put_lines
from bt.samples.words import captions


def coco_karpathy(collection: Collection, raw_dir: Path, seed: int) -> None:
    """Every fifth image of train is in restval. Five captions an image."""
    entries, train = [], 0
    for number, item in enumerate(collection.items, 1):
        split = item.split
        if split == "train":
            train += 1
            split = "train" if train % 5 else "restval"
        folder = "train2014" if split == "train" else "val2014"
        name = f"COCO_{folder}_{number:012d}.jpg"
        put_jpeg(raw_dir / folder / name, item.image())
        more = {"filepath": folder, "cocoid": number}
        entries.append(_entry(collection, item, name, split, number, more))
    put_json(raw_dir / "karpathy/dataset_coco.json", {"images": entries, "dataset": "coco"})


def flickr30k_karpathy(collection: Collection, raw_dir: Path, seed: int) -> None:
    """Five captions an image."""
    entries = []
    for number, item in enumerate(collection.items, 1):
        name = f"{flickr_id(number)}.jpg"
        put_jpeg(raw_dir / "flickr30k-images" / name, item.image())
        entries.append(_entry(collection, item, name, item.split, number, {}))
    put_json(raw_dir / "karpathy/dataset_flickr30k.json", {"images": entries, "dataset": "flickr30k"})


def flickr_id(number: int) -> int:
    """A number as long as Flickr's."""
    return 1000000000 + 7919 * number


def _entry(
    collection: Collection, item: Item, name: str, split: str, number: int, more: Mapping[str, Any]
) -> dict[str, Any]:
    """An image in Karpathy's list."""
    sentences = [
        {"tokens": text.replace(",", " ").split(), "raw": text, "imgid": number - 1, "sentid": 5 * number + place}
        for place, text in enumerate(captions(collection, item))
    ]
    ids = [sentence["sentid"] for sentence in sentences]
    return {"sentids": ids, "imgid": number - 1, "sentences": sentences, "split": split, "filename": name, **more}


def visual_genome(collection: Collection, raw_dir: Path, seed: int) -> None:
    """Phrases: captions and what is true of single facts, each with the whole image as its box. Images of val and test
    are among Karpathy's, so that the converter leaves them out of its only split."""
    entries = []
    for number, item in enumerate(collection.items, 1):
        put_vg_image(raw_dir, number, item)
        phrases = captions(collection, item)[1:]
        phrases += [fact.statement(item.facts[name]) for name, fact in collection.facts.items()]
        width, height = item.image().size
        box = {"x": 0, "y": 0, "width": width, "height": height, "image_id": number}
        regions = [{"region_id": 100 * number + k, "phrase": phrase, **box} for k, phrase in enumerate(phrases)]
        entries.append({"id": number, "regions": regions})
    put_json(raw_dir / "annotations/region_descriptions.json", entries)
    put_vg_images_list(raw_dir, collection)


def put_vg_image(raw_dir: Path, number: int, item: Item) -> None:
    """In one of the two folders that Visual Genome has."""
    folder = "VG_100K" if number % 2 else "VG_100K_2"
    put_jpeg(raw_dir / "images" / folder / f"{number}.jpg", item.image())


def put_vg_images_list(raw_dir: Path, collection: Collection) -> None:
    """image_data.json and the lists of Karpathy's splits, in which each image is by its own."""
    images = [{"image_id": n, "coco_id": n, "flickr_id": None, "url": ""} for n in range(1, len(collection.items) + 1)]
    put_json(raw_dir / "image_data.json", images)
    for split in ("train", "val", "test"):
        numbers = [n for n, item in enumerate(collection.items, 1) if item.split == split]
        folder = "train2014" if split == "train" else "val2014"
        lines = [f"{folder}/COCO_{folder}_{n:012d}.jpg {n}" for n in numbers]
        put_lines(raw_dir / f"coco_splits/karpathy_{split}_images.txt", lines)


def sbu(collection: Collection, raw_dir: Path, seed: int) -> None:
    """The training images, one caption each."""
    urls, texts = [], []
    for number, item in enumerate(collection.of("train"), 1):
        name = f"{number:010d}_{generator(seed, item.name).randrange(16**10):010x}.jpg"
        put_jpeg(raw_dir / "SBU" / name, item.image())
        urls.append(f"http://static.flickr.com/{number % 5000}/{name}")
        texts.append(_one(collection, item, seed))
    put_json(raw_dir / "sbu-captions-all.json", {"image_urls": urls, "user_ids": ["0"] * len(urls), "captions": texts})


def cc3m(collection: Collection, raw_dir: Path, seed: int) -> None:
    """The images of train and val, one caption each."""
    tables = {"train": "Train_GCC-training.tsv", "val": "Validation_GCC-1.1.0-Validation.tsv"}
    for split, table in tables.items():
        items = collection.of(split)
        for row, item in enumerate(items):
            put_jpeg(raw_dir / f"{split}_image/{row}.jpg", item.image())
        put_lines(
            raw_dir / "utils" / table,
            [f"{_one(collection, item, seed)}\thttp://example.org/{item.name}.jpg" for item in items],
        )
        put_lines(raw_dir / f"{split}_image_exist.txt", [f"{split}_image/{row}.jpg" for row in range(len(items))])


def _one(collection: Collection, item: Item, seed: int) -> str:
    return generator("caption", seed, item.name).choice(captions(collection, item))
