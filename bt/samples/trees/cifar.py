"""Raw trees of CIFAR-10 and CIFAR-100: the pictures at 32 x 32 pixels in pickled arrays, classes from their facts."""

from __future__ import annotations

import itertools
import math
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bt.samples.collection import Collection, Item
from bt.samples.trees.files import put


def cifar10(collection: Collection, raw_dir: Path, seed: int) -> None:
    """Ten classes (`classes`); train and val are the five training files."""
    names = classes(collection, 10)
    folder = raw_dir / "cifar-10-batches-py"
    train = _labelled(collection, names, "train", "val")
    for n in range(5):
        _put(folder / f"data_batch_{n + 1}", _batch(train[n::5], "labels", f"training batch {n + 1} of 5"))
    test = _labelled(collection, names, "test")
    _put(folder / "test_batch", _batch(test, "labels", "testing batch 1 of 1"))
    meta = {"num_cases_per_batch": len(train[::5]), "label_names": _bytes(names), "num_vis": 3072}
    _put(folder / "batches.meta", meta)


def cifar100(collection: Collection, raw_dir: Path, seed: int) -> None:
    """A hundred fine classes; the coarse ones, which nothing reads, are twenty runs of five."""
    names = classes(collection, 100)
    folder = raw_dir / "cifar-100-python"
    for file, splits in {"train": ("train", "val"), "test": ("test",)}.items():
        found = _labelled(collection, names, *splits)
        batch = _batch(found, "fine_labels", f"{file}ing batch 1 of 1")
        _put(folder / file, {**batch, b"coarse_labels": [label // 5 for _, label in found]})
    coarse = [f"classes {n} to {n + 4}" for n in range(0, 100, 5)]
    _put(folder / "meta", {"fine_label_names": _bytes(names), "coarse_label_names": _bytes(coarse)})


def classes(collection: Collection, count: int) -> list[str]:
    """`count` classes: the values of the first fact if it has so many, else of the first two together, and so on; of
    more the most frequent ones, of equally frequent ones the first."""
    values = [fact.values for fact in collection.facts.values()]
    depth = next(d for d in range(1, len(values) + 1) if math.prod(map(len, values[:d])) >= count)
    every = [", ".join(combination) for combination in itertools.product(*values[:depth])]
    number = Counter(_class(item, depth) for item in collection.items)
    return sorted(sorted(every, key=lambda name: -number[name])[:count])


def _class(item: Item, depth: int) -> str:
    return ", ".join(list(item.facts.values())[:depth])


def _labelled(collection: Collection, names: list[str], *splits: str) -> list[tuple[Item, int]]:
    """The pictures of the classes with their class numbers."""
    depth, place = names[0].count(", ") + 1, {name: number for number, name in enumerate(names)}
    found = ((item, _class(item, depth)) for item in collection.of(*splits))
    return [(item, place[name]) for item, name in found if name in place]


def _batch(found: list[tuple[Item, int]], key: str, label: str) -> dict[str, Any]:
    """One file's dictionary: rows of the red, green and blue plane."""
    rows = [np.asarray(item.image().resize((32, 32), Image.Resampling.BICUBIC)).transpose(2, 0, 1) for item, _ in found]
    return {
        "batch_label": label,
        "data": np.array(rows, dtype=np.uint8).reshape(len(rows), 3072),
        key: [number for _, number in found],
        "filenames": _bytes([f"{item.name}.png" for item, _ in found]),
    }


def _bytes(names: list[str]) -> list[bytes]:
    return [name.encode() for name in names]


def _put(path: Path, content: dict[str | bytes, Any]) -> None:
    """A pickle of protocol 2 with keys of bytes, as Python 2's are read."""
    keyed = {key.encode() if isinstance(key, str) else key: value for key, value in content.items()}
    put(path, pickle.dumps(keyed, protocol=2))
