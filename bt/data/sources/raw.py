"""Raw files of the labelled data sets: their place in the official tree, and files of one entry a line."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bt.errors import DataError


def inside(folder: Path, *names: str) -> Path:
    """The folder of this name in `folder` where there is one, else `folder`: both may be given as raw_dir."""
    inner = folder.joinpath(*names)
    return inner if inner.is_dir() else folder


def need(*paths: Path) -> None:
    """DataError that names the first file that is missing."""
    for path in paths:
        if not path.is_file():
            raise DataError(f"missing raw file: {path}")


def text_lines(path: Path, skip: Callable[[str], None]) -> Iterator[tuple[int, str]]:
    """Line number (from 0) and line, without its end. A line that is not UTF-8 is skipped and counted."""
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file):
                try:
                    yield number, line.decode("utf-8" if number else "utf-8-sig").rstrip("\r\n")
                except UnicodeDecodeError:
                    skip("line is not utf-8")
    except OSError as error:
        raise DataError(f"cannot read the raw file {path}: {error}") from None


def json_lines(path: Path, skip: Callable[[str], None]) -> Iterator[tuple[int, Any]]:
    """Line number (from 0) and value of each line of a .jsonl file. Empty lines do not count; broken ones do."""
    for number, line in text_lines(path, skip):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except ValueError:
            skip("line is not json")
