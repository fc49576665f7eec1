"""Shows what a data set holds: numbers in words, and a picture of some samples."""

from __future__ import annotations

import io
import textwrap
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from bt.data import index as index_file
from bt.data.decode import UNDECODABLE, convert, decode
from bt.data.index import Index
from bt.data.shards import Sample, ShardSet
from bt.data.store import Store
from bt.errors import DataError

MOST = 2000  # samples of a split that are read, evenly spread, so that a large set takes no longer than a small one
_COLUMNS = 6  # samples of each split in the picture
_CELL = 2.2  # inches
_SIDE = 240  # pixels
_NAMED = 10  # labels that are named


def inspect(place: str) -> tuple[Index, dict[str, list[str]]]:
    """The index of the data set in a folder and, by split, lines on its texts, images and labels."""
    index = index_file.parse(Store(place).read_index(index_file.NAME), place)
    return index, {split: _describe(ShardSet(place, split)) for split in index.splits}


def _spread(size: int, most: int) -> list[int]:
    return np.unique(np.linspace(0, size - 1, min(size, most)).round().astype(int)).tolist()


def _describe(data: ShardSet) -> list[str]:
    words: dict[str, list[int]] = defaultdict(list)
    sizes: dict[str, list[tuple[int, int]]] = defaultdict(list)
    formats: dict[str, Counter[str]] = defaultdict(Counter)
    labels: dict[str, Counter[str]] = defaultdict(Counter)
    numbers = _spread(len(data), MOST)
    for sample in map(data.read, numbers):
        for field in data.text_fields:
            words[field] += [len(text.split()) for text in data.texts(sample.info, field)]
        for name, encoded in sample.images.items():
            try:
                image = Image.open(io.BytesIO(encoded))
            except UNDECODABLE:
                formats[name]["cannot be decoded"] += 1
                continue
            sizes[name].append(image.size)
            formats[name][f"{image.format} {image.mode}"] += 1
        for kind, label in _labels(sample.info, data):
            labels[kind][label] += 1
    lines = [_text_line(field, data.counts(field), words[field]) for field in data.text_fields]
    lines += [_image_line(name, np.array(sizes[name]), formats[name]) for name in sizes]
    lines += [_label_line(kind, counts) for kind, counts in labels.items()]
    if len(numbers) < len(data):
        lines.append(f"(words, images and labels of {len(numbers):,} of {len(data):,} samples, evenly spread)")
    return lines


def _labels(info: Mapping[str, Any], data: ShardSet) -> Iterator[tuple[str, str]]:
    """Kind and name of every label in a sample: its own, its entries', and the best answer to each question."""
    entries = [entry for field in data.text_fields for entry in info.get(field, ()) if isinstance(entry, dict)]
    for holder in (info, *entries):
        if "label" in holder:
            yield "labels", _class_name(holder["label"], data.labels.get("classes", ()))
        if holder.get("answers"):
            yield "answers", max(holder["answers"], key=holder["answers"].get)


def _class_name(label: Any, classes: Sequence[str]) -> str:
    if isinstance(label, int) and 0 <= label < len(classes):
        return classes[label]
    return f"about {round(label)}" if isinstance(label, float) else str(label)


def _text_line(field: str, counts: np.ndarray, words: Sequence[int]) -> str:
    line = f"{field}: {counts.min()} to {counts.max()} a sample, {counts.mean():.1f} on average"
    if not words:
        return line
    low, median, most, high = np.quantile(words, [0, 0.5, 0.95, 1], method="nearest").tolist()
    return f"{line}; words: min {low}, median {median}, 95 % {most}, max {high}"


def _image_line(name: str, sizes: np.ndarray, formats: Counter[str]) -> str:
    kinds = ", ".join(f"{kind} {number:,}" for kind, number in formats.most_common())
    (width, height), low, high = np.quantile(sizes, 0.5, axis=0, method="nearest"), sizes.min(0), sizes.max(0)
    return (
        f"{'images' if name == 'image' else name}: width {low[0]} to {high[0]}, median {width}; "
        f"height {low[1]} to {high[1]}, median {height}; {kinds}"
    )


def _label_line(kind: str, counts: Counter[str]) -> str:
    shares = [f"{name} {100 * number / counts.total():.1f} %" for name, number in counts.most_common(_NAMED)]
    more = f", {len(counts) - _NAMED:,} more" if len(counts) > _NAMED else ""
    return f"{kind}: {', '.join(shares)}{more}"


def contact_sheet(place: str, path: Path) -> None:
    """Write a PNG with some samples of each split, images above their texts. DataError if it cannot be written."""
    index = index_file.parse(Store(place).read_index(index_file.NAME), place)
    figure = Figure(figsize=(_COLUMNS * _CELL, len(index.splits) * _CELL * 1.6), layout="constrained")
    axes = figure.subplots(len(index.splits), _COLUMNS, squeeze=False)
    for row, split in zip(axes, index.splits, strict=True):
        data = ShardSet(place, split)
        for axis in row:
            axis.axis("off")
        for axis, number in zip(row, _spread(len(data), _COLUMNS), strict=False):
            sample = data.read(number)
            if sample.images:
                axis.imshow(_picture(sample))
            axis.set_title(f"{split} {sample.key}", fontsize=6, parse_math=False)
            lines = [line for text in _captions(sample, data) for line in textwrap.wrap(text, 36)[:3]]
            axis.text(
                0.5,
                -0.03,
                "\n".join(lines[:9]),
                transform=axis.transAxes,
                fontsize=6,
                ha="center",
                va="top",
                parse_math=False,
            )
    try:
        figure.savefig(path, format="png", dpi=120)
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror or error}") from None


def _picture(sample: Sample) -> Image.Image:
    """The images of a sample side by side; grey where one cannot be decoded."""
    images = []
    for encoded in sample.images.values():
        try:
            images.append(convert(decode(encoded), "RGB"))
        except UNDECODABLE:
            images.append(Image.new("RGB", (_SIDE, _SIDE), "grey"))
        images[-1].thumbnail((_SIDE, _SIDE))
    sheet = Image.new("RGB", (sum(image.width for image in images), max(image.height for image in images)), "white")
    left = 0
    for image in images:
        sheet.paste(image, (left, 0))
        left += image.width
    return sheet


def _captions(sample: Sample, data: ShardSet) -> list[str]:
    """The first texts of each field with their answers and labels."""
    texts = [label for _, label in _labels({k: v for k, v in sample.info.items() if k == "label"}, data)]
    for field, inner in data.text_fields.items():
        for entry in sample.info.get(field, ())[:3]:
            labels = ", ".join(label for _, label in _labels({field: [entry]}, data))
            text = entry if inner is None else " | ".join(filter(None, (entry[inner], entry.get("text_pair"))))
            texts.append(f"{text} [{labels}]" if labels else text)
    return texts
