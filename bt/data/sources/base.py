"""What a source is: it knows one data set's raw files and yields samples; the converter does the rest."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from bt.data.sources.raw import inside
from bt.errors import ConfigError, DataError


@dataclass(frozen=True)
class Blob:
    """An encoded image in memory. ending: of its file name, such as "png"."""

    data: bytes
    ending: str


@dataclass(frozen=True)
class Slice:
    """An encoded image inside a larger file, such as a tar. offset, size: in bytes."""

    path: Path
    offset: int
    size: int
    ending: str


@dataclass(frozen=True)
class RawSample:
    """One sample before it is written. It is cheap to make and to send to another process: images are read later.

    images: by the name of the image ("" for a sample's only one, else such as "left"): where it is. Empty for a data
    set of texts alone. info: what goes into the sample's json. key: unique within the split.
    """

    split: str
    key: str
    images: Mapping[str, Path | Blob | Slice]
    info: Mapping[str, Any]


@dataclass
class Source:
    """Base of the sources. `raw_dir`: where the raw files are. split: those that are wanted; None for all.

    name: of the data set. text_fields: the lists of texts in `info`, with the key of the text inside an entry or None
    where entries are strings; none for a data set of labelled images. All other dataclass fields of a subclass are its
    options; they are written to the index, so paths other than raw_dir do not belong there. Raw files of splits that
    are not wanted need not be there.
    """

    splits: ClassVar[tuple[str, ...]] = ()  # all that the data set has, in the order in which they are yielded
    home: ClassVar[str] = ""  # folder of the official tree that holds the raw files: raw_dir is that or the one above

    raw_dir: str | None = None
    split: list[str] | None = None
    name: str = field(init=False, default="")
    text_fields: Mapping[str, str | None] = field(init=False, default_factory=dict)

    def __post_init__(self):
        if self.split is not None:
            self.split = [self.split] if isinstance(self.split, str) else list(self.split)
            for name in self.split:
                if name not in self.splits:
                    raise ConfigError(f"split={name}: {self.name} has {', '.join(self.splits)}")

    def wants(self, split: str) -> bool:
        return self.split is None or split in self.split

    def path(self, *parts: str) -> Path:
        """A place under raw_dir, or under `home` in it."""
        if self.raw_dir is None:
            raise DataError(f"{self.name}: give raw_dir, the folder of its raw files")
        root = Path(self.raw_dir).expanduser()
        return (inside(root, self.home) if self.home and root.is_dir() else root).joinpath(*parts)

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
        """The samples, always in the same order. skip: called with the reason for each one left out.

        A reason that begins with "line " or "malformed " speaks of broken raw data and counts for max_bad_share; others
        are what the source does not want or what is normal, such as a dead link. What is left out for its images, its
        key or for want of text is the converter's to count.

        Raises DataError for raw files that are missing or broken, before the first sample where that is possible.
        """
        raise NotImplementedError


def read_json(path: Path) -> Any:
    """A raw json file; DataError in one line if it is missing or broken. Bytes that are not UTF-8 become surrogates."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig", errors="surrogateescape"))
    except FileNotFoundError:
        raise DataError(f"missing raw file: {path}") from None
    except (ValueError, OSError) as error:
        raise DataError(f"cannot read the raw file {path}: {error}") from None
