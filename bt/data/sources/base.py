"""What a source is: it knows one data set's raw files and yields samples; the converter does the rest."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bt.errors import DataError


@dataclass(frozen=True)
class RawSample:
    """One sample before it is written.

    images: by the name of the image ("" for a sample's only one, else such as "left"): the path of its file. info: what
    goes into the sample's json.
    """

    split: str
    key: str
    images: Mapping[str, Path]
    info: Mapping[str, Any]


@dataclass
class Source:
    """Base of the sources. `raw_dir`: where the raw files are.

    name: of the data set. text_fields: the lists of texts in `info`, with the key of the text inside an entry or None
    where entries are strings. splits: in the order in which they are yielded. All other dataclass fields of a subclass
    are its options; they are written to the index, so paths other than raw_dir do not belong there.
    """

    raw_dir: str | None = None
    name: str = field(init=False, default="")
    text_fields: Mapping[str, str | None] = field(init=False, default_factory=dict)

    def options(self) -> dict[str, Any]:
        """What was asked for, beside where the raw files are."""
        return {k: v for k, v in vars(self).items() if k not in ("raw_dir", "name", "text_fields")}

    def labels(self) -> dict[str, list[str]]:
        """Label maps by name; the position is the class number."""
        return {}

    def count(self) -> int | None:
        """How many samples there will be, for the progress bar; None if that is not known."""
        return None

    def samples(self, skip: Callable[[str], None]) -> Iterator[RawSample]:
        """The samples, always in the same order. skip: called with the reason for each one left out."""
        raise NotImplementedError


def read_json(path: Path) -> Any:
    """A raw json file; DataError in one line if it is missing or broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"missing raw file: {path}") from None
    except (ValueError, OSError) as error:
        raise DataError(f"cannot read the raw file {path}: {error}") from None
