"""Pairs of pictures and texts to predict on: of a CSV or JSONL file, or of shards."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bt.data.index import NAME as INDEX
from bt.data.shards import BadSample, ShardSet
from bt.errors import DataError

TEXT_COLUMNS = ("text", "question", "caption", "sentence", "hypothesis")


@dataclass(frozen=True)
class Row:
    """One pair. image, second: path or encoded bytes; second is the right one of two. kept: what is copied into the
    result, such as an id. problem: why the pair cannot be had at all."""

    image: Path | bytes
    text: str
    second: Path | bytes | None = None
    kept: dict[str, Any] = field(default_factory=dict)
    problem: str | None = None


@dataclass(frozen=True)
class Table:
    """total rows, read in their order by `rows()`."""

    total: int
    rows: Callable[[], Iterator[Row]]


def read_table(path: Path, images: Path | None, split: str, field: str | None) -> Table:
    """The rows of a file NAME.csv or NAME.jsonl, or of a folder of shards.

    images: the folder that relative paths of pictures start from; None: the file's own. split: of shards. field: which
    texts of a sample make the pairs (captions, questions, ...); None: the only ones that there are.
    Raises DataError.
    """
    if (path / INDEX).is_file():
        return _shards(path, split, field)
    reader = {".csv": _csv, ".jsonl": _jsonl}.get(path.suffix.lower())
    if reader is None or path.is_dir():
        raise DataError(f"{path} is neither a file NAME.csv or NAME.jsonl nor a folder of shards")
    if not path.is_file():
        raise DataError(f"{path} does not exist")

    def rows() -> Iterator[Row]:
        for number, entry in reader(path):
            yield _row(entry, f"{path}:{number}", images or path.parent)

    return Table(sum(1 for _ in reader(path)), rows)


def _csv(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            for entry in reader:
                if None in entry or None in entry.values():
                    raise DataError(f"{path}:{reader.line_num} has not as many columns as the first line")
                yield reader.line_num, entry
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} is not CSV in UTF-8: {error}") from error


def _jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    entry = json.loads(line)
                    if not isinstance(entry, dict):
                        raise DataError(f"{path}:{number} is not a JSON object")
                    yield number, entry
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8: {error}") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{number} is not JSON: {error}") from error


def _row(entry: dict[str, Any], where: str, images: Path) -> Row:
    column = next((name for name in TEXT_COLUMNS if name in entry), None)
    if column is None or "image" not in entry:
        found = ", ".join(map(str, entry)) or "none"
        raise DataError(f"{where}: there must be columns image and one of {', '.join(TEXT_COLUMNS)}; here are {found}")
    text, names = entry[column], [entry["image"], entry.get("image2")]
    if not isinstance(text, str) or not isinstance(names[0], str) or not isinstance(names[1], str | None):
        return Row(b"", "", kept=entry, problem=f"{where}: image and {column} must be strings")
    return Row(images / names[0], text, None if names[1] is None else images / names[1], entry)


def _shards(folder: Path, split: str, field: str | None) -> Table:
    shards = ShardSet(str(folder), split)
    if field is None:
        if len(shards.text_fields) != 1:
            known = ", ".join(shards.text_fields) or "none"
            raise DataError(f"{folder} has the texts {known}: --texts must name which to take")
        (field,) = shards.text_fields
    counts = shards.counts(field)

    def rows() -> Iterator[Row]:
        for number in range(len(shards)):
            try:
                sample = shards.read(number)
            except BadSample as bad:
                key = shards.key(number)
                yield from (Row(b"", "", kept={"image": key}, problem=str(bad)) for _ in range(counts[number]))
                continue
            images = [*sample.images.values(), None]
            inner = shards.text_fields[field]
            for entry, text in zip(sample.info.get(field, ()), shards.texts(sample.info, field), strict=True):
                kept = {"image": sample.key, inner or "text": text}
                if isinstance(entry, dict) and "id" in entry:
                    kept = {"id": entry["id"], **kept}
                yield Row(images[0] or b"", text, images[1], kept)

    return Table(int(np.sum(counts)), rows)
