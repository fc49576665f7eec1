"""index.json: what a folder of shards holds. Every count in training and evaluation comes from here."""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass, field
from typing import Any

from bt.errors import DataError

VERSION = 1
NAME = "index.json"
_SAFE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.tar")


def table_name(shard: str) -> str:
    """The table that lies beside a shard."""
    return shard.removesuffix(".tar") + ".npy"


@dataclass(frozen=True)
class ShardInfo:
    """One shard and its table. texts: number of texts by text field. bytes, table_bytes: exact file sizes."""

    name: str
    samples: int
    texts: dict[str, int]
    bytes: int
    sha256: str
    table_bytes: int
    table_sha256: str


@dataclass(frozen=True)
class Index:
    """A data set.

    source, options: what made it; two data sets with equal ones are the same. text_fields: the lists of texts in a
    sample's json, with the key of the text inside an entry, or None where the entry is the text itself. labels: label
    maps by name, such as {"answers": [...]}; the position is the class number. skipped: samples or texts left out, by
    reason.
    """

    source: str
    options: dict[str, Any]
    text_fields: dict[str, str | None]
    labels: dict[str, list[str]]
    splits: dict[str, list[ShardInfo]]
    skipped: dict[str, int] = field(default_factory=dict)

    def samples(self, split: str) -> int:
        return sum(shard.samples for shard in self.splits[split])

    def texts(self, split: str) -> dict[str, int]:
        return {name: sum(shard.texts[name] for shard in self.splits[split]) for name in self.text_fields}

    def to_json(self) -> str:
        splits = {
            split: {
                "samples": self.samples(split),
                "texts": self.texts(split),
                "shards": [dataclasses.asdict(shard) for shard in shards],
            }
            for split, shards in self.splits.items()
        }
        return json.dumps({"version": VERSION, **vars(self), "splits": splits}, indent=1, ensure_ascii=False) + "\n"


def parse(text: str, place: str) -> Index:
    """The index in `text`; DataError with `place` if it is broken or of another version."""
    where = f"{place}/{NAME}"
    try:
        raw = json.loads(text)
        version = raw.pop("version")
    except (ValueError, KeyError, AttributeError, TypeError):
        raise DataError(f"{where} is not an index of shards") from None
    if version != VERSION:
        raise DataError(f"{where} has version {version}, this program reads version {VERSION}: convert the data again")
    try:
        raw["splits"] = {
            split: [ShardInfo(**shard) for shard in entry["shards"]] for split, entry in raw["splits"].items()
        }
        index = Index(**raw)
        names = [shard.name for shards in index.splits.values() for shard in shards]
        # A shard name becomes part of a path, so an index from elsewhere must not lead out of its folder.
        if not all(_SAFE.fullmatch(name) for name in names):
            raise ValueError("shard name")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{where} is damaged: {error}") from None
    return index
