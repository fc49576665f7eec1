"""Checks every byte of a data set against its index."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

from bt.data import index as index_file
from bt.data.index import Index, ShardInfo, table_name
from bt.data.shards import load_table
from bt.data.store import Store
from bt.errors import DataError


def verify(place: str, progress: Callable[[list[ShardInfo]], Iterable[ShardInfo]] = lambda shards: shards) -> list[str]:
    """What is wrong with the data set in a folder, one line a fault; an empty list if nothing is.

    Sizes and SHA-256 of all shards and tables; where a shard differs, the samples whose CRC-32 differs are named;
    shards that the index does not know are reported. Raises DataError if there is no index to check against.
    progress: wraps the list of shards.
    """
    store = Store(place)
    data_set = index_file.parse(store.read_index(index_file.NAME), store.place)
    shards = [shard for of_split in data_set.splits.values() for shard in of_split]
    faults = [fault for shard in progress(shards) for fault in _shard_faults(store, shard, data_set)]
    known = {shard.name for shard in shards}
    stray = sorted(path.name for path in Path(store.folder).glob("*.tar") if path.name not in known)
    return faults + [f"{store.folder / name} is not in the index" for name in stray]


def _shard_faults(store: Store, shard: ShardInfo, data_set: Index) -> list[str]:
    faults = []
    table_path = store.folder / table_name(shard.name)
    for path, size, sha256 in (
        (store.folder / shard.name, shard.bytes, shard.sha256),
        (table_path, shard.table_bytes, shard.table_sha256),
    ):
        try:
            store.path(path.name, size)
            if _sha256(path) != sha256:
                faults.append(f"{path} differs from the index (SHA-256)")
        except (DataError, OSError) as error:
            faults.append(str(error))
    if faults and not any(str(table_path) in fault for fault in faults):
        faults += _sample_faults(store, shard, data_set)
    return faults


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sample_faults(store: Store, shard: ShardInfo, data_set: Index) -> list[str]:
    """The samples of a damaged shard that are themselves damaged."""
    path = store.folder / shard.name
    if not path.exists():
        return []
    faults = []
    with open(path, "rb") as file:
        for row in load_table(store, shard, list(data_set.text_fields)):
            file.seek(int(row["offset"]))
            if zlib.crc32(file.read(int(row["size"]))) != row["crc32"]:
                faults.append(f"{path}: the bytes of sample '{row['key'].decode()}' differ from the index (CRC-32)")
    return faults
