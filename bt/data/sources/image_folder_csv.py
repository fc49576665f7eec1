"""Your own images, with captions, questions, labelled texts or labels in one table.

    <any name>.csv, .tsv or .jsonl    the table: with a header, or one json object a line; UTF-8
    ...                               the images, anywhere under raw_dir

What becomes of it follows from the columns (a JSON Lines file's: the keys of its first object). Their order does not
matter, other columns are not read, and `caption` is another name for `text`:

    image, text                 captions
    image, question, answer     questions, as VQA's
    image, text, label          labelled texts, as SNLI-VE's
    image, label                labelled images, as CIFAR's
    ..., split                  in each: train, val, test or another name; without it, or where it is empty, train

`image` is a path from raw_dir. Rows with the same image and split make one sample; a question's or a text's `id` is
the number of its row, from 0 behind the header (of a JSON Lines file: of its line).
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bt.data.sources.base import RawSample, Source
from bt.data.sources.files import csv_rows, image_key, valid_utf8
from bt.data.sources.raw import json_lines
from bt.errors import ConfigError, DataError

_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_ENDINGS = (*_DELIMITERS, ".jsonl")
# The columns beside `image` and `split` -> the field of texts in a sample, with the key of the text in its entries.
_KINDS: dict[tuple[str, ...], dict[str, str | None]] = {
    ("question", "answer"): {"questions": "question"},
    ("text", "label"): {"hypotheses": "text"},
    ("text",): {"captions": None},
    ("label",): {},
}
_SPLIT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,31}")

Skip = Callable[[str], None]


@dataclass
class ImageFolderCSV(Source):
    """raw_dir: the folder with the table and the images.

    file: the table's path from raw_dir; null: the only .csv, .tsv or .jsonl file in raw_dir itself.
    min_answer_count: questions whose answer comes less often in the table are left out and counted; the answers that
    are left make the label map, in order of first occurrence. A question of the split `test` may have any answer or
    none. Classes are numbered in order of first occurrence too, unless all are whole numbers: then in ascending order.
    Label maps are made from all splits, whichever are wanted.
    """

    file: str | None = None
    min_answer_count: int = 1
    name: str = field(init=False, default="image_folder_csv")

    def __post_init__(self):
        if isinstance(self.split, str):
            self.split = [self.split]
        if self.min_answer_count < 1:
            raise ConfigError(f"source.min_answer_count={self.min_answer_count}: must be at least 1")
        if self.raw_dir is not None:
            self.text_fields = _KINDS[self._kind()]

    def labels(self) -> dict[str, list[str]]:
        kind = self._kind()
        if kind == ("text",):
            return {}
        counts = Counter(row[kind[-1]] for _, row in self._rows(kind, lambda reason: None) if row[kind[-1]])
        if kind == ("question", "answer"):
            return {"answers": [answer for answer, count in counts.items() if count >= self.min_answer_count]}
        if all(re.fullmatch(r"-?\d+", label) for label in counts):
            return {"classes": sorted(counts, key=int)}
        return {"classes": list(counts)}

    def samples(self, skip: Skip) -> Iterator[RawSample]:
        kind = self._kind()
        rank = {label: number for names in self.labels().values() for number, label in enumerate(names)}
        splits: dict[str, dict[str, list[tuple]]] = {}  # (number of the row, its fields) by split and image
        for number, row in self._rows(kind, skip):
            images = splits.setdefault(row["split"], {})
            if self.wants(row["split"]):
                fault = _fault(kind, row, rank)
                if fault is not None:
                    skip(fault)
                elif kind == ("label",) and row["image"] in images:
                    skip("second label of an image")
                else:
                    fields = (row[kind[0]], sys.intern(row[kind[-1]]))
                    images.setdefault(row["image"], []).append((number, *fields))
        for split in self.split or ():
            if split not in splits:
                raise DataError(f"split={split}: {self._table()} has {', '.join(splits) or 'no rows'}")
        for split, images in splits.items():
            for image, rows in images.items():
                entries = [_entry(kind, *row, rank) for row in rows]
                info: dict[str, Any] = {name: entries for name in _KINDS[kind]} or {"label": entries[0]}
                yield RawSample(split, image_key(image), {"": self.path(image)}, {**info, "image_id": image})

    def _table(self) -> Path:
        if self.file is not None:
            path = self.path(self.file)
            if path.suffix.lower() not in _ENDINGS:
                raise ConfigError(f"source.file={self.file}: must end in {', '.join(_ENDINGS)}")
            if not path.is_file():
                raise DataError(f"missing raw file: {path}")
            return path
        if not self.path().is_dir():
            raise DataError(f"missing raw folder: {self.path()}")
        found = sorted(path for path in self.path().iterdir() if path.suffix.lower() in _ENDINGS)
        if len(found) != 1:
            names = ", ".join(path.name for path in found[:5]) or "none"
            raise DataError(f"{self.path()} must hold one .csv, .tsv or .jsonl file (found: {names}): give source.file")
        return found[0]

    def _kind(self) -> tuple[str, ...]:
        """The columns that say what the texts are."""
        path = self._table()
        columns = _columns(path)
        kinds = [kind for kind in _KINDS if columns.issuperset(kind)]
        if "image" not in columns or not kinds or {"text", "question"} <= columns:
            allowed = "; ".join(f"image, {', '.join(kind)}" for kind in _KINDS)
            found = ", ".join(sorted(columns)) or "none"
            raise DataError(f"{path}: its columns are {found}; they must be {allowed}; each with or without split")
        return kinds[0]

    def _rows(self, kind: tuple[str, ...], skip: Skip) -> Iterator[tuple[int, dict[str, str]]]:
        """Number of the row and those of its fields that are read, stripped; rows that cannot be used are left out."""
        for number, row in _table_rows(self._table(), skip):
            row.setdefault("split", "")
            if not all(name in row for name in ("image", *kind)):
                skip("line has too few fields")
                continue
            fields = {name: row[name].strip() for name in ("image", "split", *kind)}
            fields["split"] = fields["split"] or "train"
            if not all(map(valid_utf8, fields.values())):
                skip("line is not utf-8")
            elif not fields["image"]:
                skip("line without an image")
            elif not _SPLIT.fullmatch(fields["split"]):
                skip("line without a usable split")
            else:
                yield number, fields


def _fault(kind: tuple[str, ...], row: dict[str, str], rank: dict[str, int]) -> str | None:
    """Why a row cannot be used, if it cannot."""
    if kind == ("text",) or row[kind[-1]] in rank:
        return None
    if kind == ("question", "answer"):
        return None if row["split"] == "test" else "answer too rare" if row["answer"] else "line without an answer"
    return "line without a label"


def _entry(kind: tuple[str, ...], number: int, first: str, last: str, rank: dict[str, int]) -> Any:
    """What a sample says of a row. first, last: the row's fields of the first and the last column of its kind."""
    if kind == ("text",):
        return first
    if kind == ("label",):
        return rank[last]
    if kind == ("text", "label"):
        return {"id": number, "text": first, "label": rank[last]}
    return {"id": number, "question": first, "answers": {last: 1.0} if last else {}}


def _canonical(names: Iterable[str]) -> list[str]:
    names = [name.strip().lower() for name in names]
    return ["text" if name == "caption" else name for name in names]


def _columns(path: Path) -> set[str]:
    """The columns of a table by their canonical names."""
    if path.suffix.lower() == ".jsonl":
        names = next((list(row) for _, row in _table_rows(path, lambda reason: None)), [])
    else:
        names = _canonical(next(csv_rows(path, _DELIMITERS[path.suffix.lower()]), []))
    for name in ("image", "text", "question", "answer", "label", "split"):
        if names.count(name) > 1:
            raise DataError(f"{path} has the column {name} twice (caption is another name for text)")
    return {name for name in names if name and valid_utf8(name)}


def _table_rows(path: Path, skip: Skip) -> Iterator[tuple[int, dict[str, str]]]:
    """Number and fields by column of each row; of a JSON Lines file, without the fields that are lists or objects."""
    if path.suffix.lower() == ".jsonl":
        for number, row in json_lines(path, skip):
            if isinstance(row, dict):
                fields = zip(_canonical(row), row.values(), strict=True)
                yield number, {name: _text(value) for name, value in fields if not isinstance(value, (list, dict))}
            else:
                skip("line is not a json object")
        return
    rows = csv_rows(path, _DELIMITERS[path.suffix.lower()])
    columns = _canonical(next(rows, []))
    for number, row in enumerate(rows):
        if len(row) == len(columns):
            yield number, dict(zip(columns, row, strict=True))
        else:
            skip("line has too few fields" if len(row) < len(columns) else "line has too many fields")


def _text(value: Any) -> str:
    return value if isinstance(value, str) else "" if value is None else json.dumps(value)
