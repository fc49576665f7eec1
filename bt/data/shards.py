"""Shards: plain tar files that webdataset reads too, with an index and a table of byte offsets beside each.

out_dir/index.json, out_dir/<split>-%06d.tar and out_dir/<split>-%06d.npy. One sample is `key.json` (everything known of
the image) followed by its images (`key.jpg`, or `key.left.jpg` and `key.right.jpg`) in their original bytes. The table
gives the span of each sample in the tar and the CRC-32 of that span, so a sample is one read at any position.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import re
import struct
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bt.data import index as index_file
from bt.data.index import Index, ShardInfo, table_name
from bt.data.store import Store
from bt.errors import DataError

log = logging.getLogger("bt")

_BLOCK = 512
_KEY = re.compile(r"[A-Za-z0-9_-]{1,64}")
# Name, mode, owner, group, size, time, checksum, type and format; the other fields of a tar's header are empty.
_HEADER = struct.Struct("100s8s8s8s12s12s8sc100x8s247x")
_USTAR = (b"0", b"ustar\x0000")
# The sum of a header's bytes, with spaces for the checksum, but for those of name and size.
_HEADER_SUM = sum(_HEADER.pack(b"", b"0000644", b"0000000", b"0000000", b"", b"0" * 11, b" " * 8, *_USTAR))
_SPAN = np.dtype([("offset", "<u8"), ("size", "<u4"), ("crc32", "<u4")])
_OPEN_FILES = 64  # most shards that one process holds open


class BadSample(DataError):
    """A sample that cannot be used. shard and reason: what it is counted under where bad samples are skipped."""

    def __init__(self, message: str, shard: str = "", reason: str = ""):
        super().__init__(message)
        self.shard, self.reason = shard, reason


@dataclass(frozen=True)
class Sample:
    """One sample as it lies in a shard. images: encoded bytes by name ("image", or "left" and "right")."""

    key: str
    shard: str
    images: dict[str, bytes]
    info: dict[str, Any]


def table_dtype(text_fields: Sequence[str], key_bytes: int = 64) -> np.dtype:
    """One row a sample: its key, the span of its bytes in the tar, their CRC-32, and its texts by field."""
    fixed = [("key", f"S{key_bytes}"), ("offset", "<u8"), ("size", "<u4"), ("crc32", "<u4")]
    return np.dtype(fixed + [(f"texts.{name}", "<u4") for name in text_fields])


def _member(name: str, data: bytes) -> bytes:
    """A tar member (POSIX.1-1988, ustar) with nothing in its header that differs between two conversions.

    The bytes are those of tarfile, which takes as long for its headers as all else that writing a sample takes.
    """
    encoded = name.encode()
    if len(encoded) > 100:
        raise DataError(f"{name}: names in a shard have at most 100 bytes")
    size = b"%011o" % len(data)
    sum_of_all = _HEADER_SUM + sum(encoded) + sum(size)
    header = _HEADER.pack(
        encoded, b"0000644", b"0000000", b"0000000", size, b"00000000000", b"%06o\0 " % sum_of_all, *_USTAR
    )
    return header + data + bytes(-len(data) % _BLOCK)


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file whole or not at all: temporary name, fsync, rename."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


class ShardWriter:
    """Writes the shards of one split; the same samples give the same bytes.

    A shard gets its final name only when it and its table are complete. `shards` lists what has been written after
    `close`.
    """

    def __init__(self, out_dir: Path, split: str, text_fields: Sequence[str], shard_size: int):
        self.out_dir, self.split, self.text_fields, self.shard_size = out_dir, split, list(text_fields), shard_size
        self.shards: list[ShardInfo] = []
        self._rows: list[tuple] = []
        self._file: io.BufferedWriter | None = None

    def add(self, key: str, images: Mapping[str, bytes], info: Mapping[str, Any]) -> None:
        """Append a sample. images: bytes by the ending of the member ("jpg", "left.jpg"). key: letters, digits, _ -."""
        if not _KEY.fullmatch(key):
            raise DataError(f"sample key {key!r}: allowed are 1 to 64 letters, digits, '_' and '-'")
        text = json.dumps(info, ensure_ascii=False, separators=(",", ":")).encode()
        if self._file is None:
            self._begin()
        span = _member(f"{key}.json", text) + b"".join(_member(f"{key}.{end}", data) for end, data in images.items())
        counts = [len(info.get(field, ())) for field in self.text_fields]
        self._rows.append((key.encode(), self._offset, len(span), zlib.crc32(span), *counts))
        self._write(span)
        if len(self._rows) == self.shard_size:
            self._end()

    def close(self) -> None:
        """Complete the last shard."""
        if self._file is not None:
            self._end()

    def _begin(self) -> None:
        self._path = self.out_dir / f"{self.split}-{len(self.shards):06d}.tar"
        self._temporary = self._path.with_name(self._path.name + ".tmp")
        self._file = open(self._temporary, "wb")  # noqa: SIM115 - open across calls
        self._offset, self._hash = 0, hashlib.sha256()

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._hash.update(data)
        self._offset += len(data)

    def _end(self) -> None:
        self._write(bytes(2 * _BLOCK))  # the tar's own end mark
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        buffer = io.BytesIO()
        width = max(len(row[0]) for row in self._rows)
        table = np.array(self._rows, dtype=table_dtype(self.text_fields, width))
        np.save(buffer, table, allow_pickle=False)
        table_bytes = buffer.getvalue()
        write_atomic(self.out_dir / table_name(self._path.name), table_bytes)
        os.replace(self._temporary, self._path)
        sync_folder(self.out_dir)
        self.shards.append(
            ShardInfo(
                name=self._path.name,
                samples=len(table),
                texts={field: int(table[f"texts.{field}"].sum()) for field in self.text_fields},
                bytes=self._offset,
                sha256=self._hash.hexdigest(),
                table_bytes=len(table_bytes),
                table_sha256=hashlib.sha256(table_bytes).hexdigest(),
            )
        )
        self._file, self._rows = None, []


def _members(span: bytes) -> dict[str, bytes]:
    """Member name -> data of a run of tar members as `_member` writes them, whose CRC-32 has been checked. ValueError
    for anything else.

    tarfile's reader would take as long as decoding a small image.
    """
    members, at = {}, 0
    while at < len(span):
        name = span[at : at + 100].rstrip(b"\0").decode()
        size = int(span[at + 124 : at + 135], 8)
        at += _BLOCK
        if at + size > len(span):
            raise ValueError(f"member {name} is cut")
        members[name] = span[at : at + size]
        at += size + -size % _BLOCK
    return members


def load_table(store: Store, shard: ShardInfo, text_fields: Sequence[str]) -> np.ndarray:
    """The table of a shard; DataError if it is missing, cut or not the shard's."""
    path = store.path(table_name(shard.name), shard.table_bytes)
    try:
        table = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError, SyntaxError) as error:
        raise DataError(f"{path} is not a table of a shard: {error}") from None
    if table.dtype.names != table_dtype(text_fields).names or len(table) != shard.samples:
        raise DataError(f"{path} does not belong to the index beside it: convert the data again")
    return table


class ShardSet:
    """The samples of a split (or several) in one or more data sets, numbered in file order, read at any position.

    Raises DataError when opened if an index, table or shard is missing, cut or of another version; shards of a remote
    data set are checked when they are first read. What is held is 16 bytes a sample and 4 for each text field; a fork
    shares them.

    A data set need not have all of the named splits; with `each`, it must have one of them. One that none has is named
    in a warning.

    starts: (shards + 1,) int64, the first sample of each shard. parts: (data sets + 1,) int64, the first sample of
    each data set, in the order of `places`. labels: label maps by name.
    text_fields: see Index; only those that every data set has.
    """

    def __init__(
        self,
        places: str | Sequence[str],
        split: str | Sequence[str],
        cache_dir: str | None = None,
        each: bool = True,
    ):
        self.splits = [split] if isinstance(split, str) else list(split)
        self.labels: dict[str, list[str]] = {}
        self.text_fields: dict[str, str | None] = {}
        self._shards: list[tuple[Store, ShardInfo]] = []
        tables: list[np.ndarray] = []
        found: list[str] = []
        missing = dict.fromkeys(self.splits)
        shards_before = [0]
        for place in [places] if isinstance(places, str | Path) else places:
            store = Store(place, cache_dir)
            data_set = index_file.parse(store.read_index(index_file.NAME), store.place)
            filled = [name for name, shards in data_set.splits.items() if shards]
            found.append(f"{store.place} has {', '.join(filled) or 'no split'}")
            if each and not any(data_set.splits.get(name) for name in self.splits):
                raise DataError(f"no split '{' or '.join(self.splits)}': {found[-1]}")
            missing = {name: None for name in missing if not data_set.splits.get(name)}
            tables += self._open(store, data_set)
            shards_before.append(len(self._shards))
        if not self._shards:
            raise DataError(
                f"no split '{' or '.join(self.splits)}': {'; '.join(found) or 'data.dir names no data set'}"
            )
        if missing:
            log.warning(f"read without the splits that no data set has ({', '.join(missing)}): {'; '.join(found)}")
        self.starts = np.cumsum([0] + [shard.samples for _, shard in self._shards])
        self.parts = self.starts[shards_before]
        self._spans = np.concatenate([table[["offset", "size", "crc32"]] for table in tables]).astype(_SPAN)
        self._counts = {
            field: np.concatenate([table[f"texts.{field}"].astype(np.int32) for table in tables])
            for field in self.text_fields
        }
        self._files: OrderedDict[int, int] = OrderedDict()

    def _open(self, store: Store, data_set: Index) -> list[np.ndarray]:
        """Check a data set and list its shards of these splits; returns their tables."""
        shards = [shard for name in self.splits for shard in data_set.splits.get(name, ())]
        if not shards:
            return []
        for name, values in data_set.labels.items():
            if self.labels.setdefault(name, values) != values:
                raise DataError(f"{store.place}: its labels '{name}' differ from those of the other data in data.dir")
        fields = data_set.text_fields
        held = self.text_fields if self._shards else fields
        self.text_fields = {name: inner for name, inner in held.items() if name in fields}
        for shard in shards:
            if not store.remote:
                store.path(shard.name, shard.bytes)
            self._shards.append((store, shard))
        return [load_table(store, shard, list(fields)) for shard in shards]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": OrderedDict()}

    def __del__(self):
        for handle in getattr(self, "_files", {}).values():
            os.close(handle)

    def _handle(self, number: int) -> int:
        """An open file of the shard. `pread` keeps no position, so files inherited by a fork are safe to share."""
        if number not in self._files:
            store, shard = self._shards[number]
            self._files[number] = os.open(store.path(shard.name, shard.bytes), os.O_RDONLY | os.O_CLOEXEC)
            if len(self._files) > _OPEN_FILES:
                os.close(self._files.popitem(last=False)[1])
        self._files.move_to_end(number)
        return self._files[number]

    def counts(self, field: str | None) -> np.ndarray:
        """(samples,) int32: the number of texts of a field in each sample; without a field one each."""
        if field is None:
            return np.ones(len(self), np.int32)
        if field not in self.text_fields:
            known = ", ".join(self.text_fields) or "none"
            raise DataError(f"text field '{field}' is not in every data set of data.dir: known are {known}")
        return self._counts[field]

    def __len__(self) -> int:
        return int(self.starts[-1])

    def key(self, number: int) -> str:
        """The key of a sample, from its shard's table on disk."""
        shard_number = self._shard_of(number)
        store, shard = self._shards[shard_number]
        path = store.path(table_name(shard.name), shard.table_bytes)
        return np.load(path, mmap_mode="r", allow_pickle=False)[number - self.starts[shard_number]]["key"].decode()

    def _shard_of(self, number: int) -> int:
        return int(np.searchsorted(self.starts, number, side="right")) - 1

    def read(self, number: int) -> Sample:
        """The sample with this number; BadSample if its bytes are not those that were written."""
        offset, size, crc32 = self._spans[number].tolist()
        shard_number = self._shard_of(number)
        store, shard = self._shards[shard_number]
        span = os.pread(self._handle(shard_number), size, offset)
        if len(span) != size or zlib.crc32(span) != crc32:
            raise BadSample(
                f"{store.folder / shard.name}: the bytes of sample '{self.key(number)}' differ from the index "
                f"(CRC-32); `python -m bt.convert verify={store.folder}` lists all faults",
                shard.name,
                "bytes differ from the index",
            )
        try:
            members = _members(span)
            key = next(iter(members)).removesuffix(".json")
            info = json.loads(members.pop(f"{key}.json"))
            if not isinstance(info, dict):
                raise ValueError("not an object")
        except (ValueError, KeyError, StopIteration):
            raise BadSample(
                f"{store.folder / shard.name}: sample '{self.key(number)}' is not a .json followed by its images; "
                "convert the data again",
                shard.name,
                "malformed sample",
            ) from None
        images = {name[len(key) + 1 :].rpartition(".")[0] or "image": data for name, data in members.items()}
        return Sample(key, shard.name, images, info)

    def texts(self, info: Mapping[str, Any], field: str) -> list[str]:
        """The texts of one field of a sample's json."""
        inner = self.text_fields[field]
        return [entry if inner is None else entry[inner] for entry in info.get(field, ())]

    def all_texts(self, skip_bad: bool = False) -> Iterator[str]:
        """Every text of every field, in file order, for training a tokenizer. Images are not decoded."""
        for number in range(len(self)):
            try:
                info = self.read(number).info
            except BadSample:
                if not skip_bad:
                    raise
                continue
            for field, inner in self.text_fields.items():
                for entry in info.get(field, ()):
                    yield entry if inner is None else entry[inner]
                    if inner is not None and "text_pair" in entry:
                        yield entry["text_pair"]
