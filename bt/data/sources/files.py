"""What several sources need of raw files: tables, big json lists, keys from names, images in one of several folders."""

from __future__ import annotations

import codecs
import csv
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from bt.errors import DataError

_CHUNK = 1 << 20
_DECODER = json.JSONDecoder()
_SPACE = re.compile(r"[ \t\r\n]*")


def sample_key(name: str) -> str:
    """A sample's key from a file name or path: itself where all its characters are allowed, else with a hash.

    Two names never give one key. "COCO_val2014_000000391895" stays; "red/tea pot" becomes "red_tea_pot-" and 16 hex
    digits of the name's SHA-256.
    """
    if re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name):
        return name
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:16]
    return f"{re.sub(r'[^A-Za-z0-9_-]', '_', name)[:47]}-{digest}"


def image_key(name: str) -> str:
    """`sample_key` of an image's file name; the ending that nearly all have, .jpg, is left out."""
    return sample_key(name.removesuffix(".jpg"))


def valid_utf8(text: str) -> bool:
    """Whether text decoded with errors="surrogateescape" was UTF-8."""
    return text.isascii() or not re.search("[\ud800-\udfff]", text)


def need_folder(*folders: Path) -> None:
    """DataError unless one of the folders is there."""
    if not any(folder.is_dir() for folder in folders):
        raise DataError(f"missing raw folder: {' or '.join(map(str, folders))}")


def first_present(name: str, folders: Iterable[Path]) -> Path:
    """The image in the first folder that has it; in the last one if none has."""
    for folder in folders:
        path = folder / name
        if os.path.exists(path):  # False, too, for a name that no file can have
            break
    return path


def csv_rows(path: Path, delimiter: str) -> Iterator[list[str]]:
    """The rows of a table that are not blank, with or without a byte order mark; quoted fields may span lines.

    Bytes that are not UTF-8 become surrogates: see `valid_utf8`. DataError if the file is missing or cannot be read.
    """
    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            reader = csv.reader(file, delimiter=delimiter)
            try:
                yield from (row for row in reader if len(row) > 1 or (row and not row[0].isspace()))
            except csv.Error as error:
                hint = "is there a quotation mark without its partner?"
                raise DataError(f"cannot read the raw file {path}: line {reader.line_num}: {error}; {hint}") from None
    except FileNotFoundError:
        raise DataError(f"missing raw file: {path}") from None
    except OSError as error:
        raise DataError(f"cannot read the raw file {path}: {error}") from None


def stream_list(path: Path, key: str | None = None) -> Iterator[Any]:
    """The elements of a json list, read and decoded one after another; key: of the list in the file's object.

    For files that would take gigabytes as a whole. Bytes that are not UTF-8 become surrogates, so that only the texts
    that hold them are lost. DataError in one line if the file is missing, is broken or has no such list; what precedes
    the fault has been yielded by then.
    """
    try:
        with open(path, "rb") as file:
            yield from _Cursor(path, file).elements(key)
    except FileNotFoundError:
        raise DataError(f"missing raw file: {path}") from None
    except OSError as error:
        raise DataError(f"cannot read the raw file {path}: {error}") from None


class _Cursor:
    """A place in a json text of which only a part is in memory."""

    def __init__(self, path: Path, file: BinaryIO):
        self._path, self._file = path, file
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")
        self._text, self._at, self._ended, self._passed = "", 0, False, 0

    def elements(self, key: str | None) -> Iterator[Any]:
        if key is not None:
            self._enter(key)
        self._take("[")
        if self._peek() == "]":
            return
        while True:
            yield self._value()
            if self._take(",]") == "]":
                return

    def _enter(self, key: str) -> None:
        """Go to the value of a key of the object that starts here."""
        self._take("{")
        missing = DataError(f"{self._path}: its object has no list {key!r}")
        if self._peek() == "}":
            raise missing
        while True:
            name = self._value()
            self._take(":")
            if name == key:
                return
            self._value()
            if self._take(",}") == "}":
                raise missing

    def _value(self) -> Any:
        self._peek()
        size = _CHUNK
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._at)
                if end < len(self._text) or self._ended:  # else a number may go on behind what is in memory
                    self._at = end
                    return value
            except json.JSONDecodeError as error:
                if self._ended:
                    raise self._fault(error.msg, error.pos) from None
            self._read(size)
            size *= 2

    def _take(self, allowed: str) -> str:
        found = self._peek()
        if not found or found not in allowed:
            raise self._fault(f"expected {' or '.join(allowed)}", self._at)
        self._at += 1
        return found

    def _peek(self) -> str:
        """The next character that is not white space; "" at the end."""
        while True:
            self._at = _SPACE.match(self._text, self._at).end()
            if self._at < len(self._text) or self._ended:
                return self._text[self._at : self._at + 1]
            self._read(_CHUNK)

    def _read(self, size: int) -> None:
        data = self._file.read(size)
        self._ended = not data
        self._passed += self._at
        self._text, self._at = self._text[self._at :] + self._decoder.decode(data, final=self._ended), 0

    def _fault(self, what: str, at: int) -> DataError:
        return DataError(f"cannot read the raw file {self._path}: {what} (character {self._passed + at})")
