"""What an unfinished conversion has finished, so that the same command goes on behind it."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bt.data.index import ShardInfo, table_name
from bt.data.shards import sync_folder
from bt.errors import DataError

NAME = "index.json.partial"


@dataclass(frozen=True)
class Finished:
    """A shard that is complete. taken: raw samples of its split that came before it was; skipped: what was left out of
    them, by reason."""

    split: str
    taken: int
    skipped: dict[str, int]
    shard: ShardInfo


class Journal:
    """The file in out_dir that is there until the index is: what is converted, then a line for each finished shard.

    Raises DataError if the file speaks of another conversion that has finished a shard, or if another process is
    writing to out_dir. finished: the shards there are when it is opened.
    """

    def __init__(self, out_dir: Path, identity: dict[str, Any]):
        self.path = out_dir / NAME
        self._file = open(self.path, "a+b")  # noqa: SIM115 - open, and locked, until the conversion ends
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.finished = self._read(out_dir, identity)
        except BaseException as error:
            self._file.close()
            if isinstance(error, BlockingIOError):
                raise DataError(f"another process is writing to {out_dir}") from None
            raise
        for path in out_dir.glob("*.tmp"):
            path.unlink()

    def _read(self, out_dir: Path, identity: dict[str, Any]) -> list[Finished]:
        self._file.seek(0)
        lines = self._file.read().splitlines(keepends=True)
        finished = []
        end = len(lines[0]) if lines else 0
        for line in lines[1:]:
            entry = _parse(line)
            if entry is None or not _is_there(out_dir, entry.shard):
                break  # the last line may be cut; a shard that is gone is written again, and so is all behind it
            finished.append(entry)
            end += len(line)
        if finished and json.loads(lines[0]) != identity:
            raise DataError(f"{out_dir} holds an unfinished data set ({differences(json.loads(lines[0]), identity)})")
        self._file.truncate(end if finished else 0)
        if not finished:
            self._append(identity)
            sync_folder(out_dir)
        return finished

    def add(self, finished: Finished) -> None:
        """Note a shard, durably."""
        self._append(dataclasses.asdict(finished))
        self.finished.append(finished)

    def _append(self, value: dict[str, Any]) -> None:
        self._file.write(json.dumps(value).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self, complete: bool) -> None:
        """Leave what the same command can go on from, if anything, and no half files. complete: the index is there."""
        for path in self.path.parent.glob("*.tmp"):
            path.unlink()
        # A shard may have its name already and no line yet: then the file says whose it is.
        if complete or list(self.path.parent.iterdir()) == [self.path]:
            self.path.unlink()
        self._file.close()


def _parse(line: bytes) -> Finished | None:
    try:
        entry = json.loads(line)
        return Finished(**{**entry, "shard": ShardInfo(**entry["shard"])}) if line.endswith(b"\n") else None
    except (ValueError, TypeError, KeyError):
        return None


def _is_there(out_dir: Path, shard: ShardInfo) -> bool:
    sizes = {shard.name: shard.bytes, table_name(shard.name): shard.table_bytes}
    paths = {out_dir / name: size for name, size in sizes.items()}
    return all(path.is_file() and path.stat().st_size == size for path, size in paths.items())


def differences(held: dict[str, Any], asked: dict[str, Any]) -> str:
    """What differs between two descriptions of a data set, in words: "shard_size=10, asked: shard_size=20"."""
    one, other = _flat(held), _flat(asked)
    keys = [key for key in {**one, **other} if key not in one or key not in other or one[key] != other[key]]

    def says(values: dict[str, Any]) -> str:
        return ", ".join(f"{key}={json.dumps(values[key])}" for key in keys if key in values) or "none of it"

    return f"{says(one)}, asked: {says(other)}"


def _flat(identity: dict[str, Any]) -> dict[str, Any]:
    values = {"source": identity["source"]}
    for key, value in identity["options"].items():
        values |= {f"{key}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {key: value}
    return values
