"""Raw files of the labelled data sets: their place in the official tree, and files of one entry a line."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bt.errors import DataError

COCO_HOME = "mscoco_flickr30k_vqav2_snli_ve"  # where the official tree has all that is on COCO's and Flickr30K's images


def ignore(reason: str) -> None:
    """A `skip` for what is counted elsewhere."""


def inside(folder: Path, name: str, holding: str = "*") -> Path:
    """The folder of this name in `folder`, or `folder` itself where it takes its place: both may be given as raw_dir.

    holding: pattern of a file that shows that it does.
    """
    inner = folder / name
    return folder if not inner.is_dir() and any(folder.glob(holding)) else inner


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
    except FileNotFoundError:
        raise DataError(f"missing raw file: {path}") from None
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
