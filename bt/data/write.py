"""Writes a data set: source -> shards and index."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from bt.data import index as index_file
from bt.data.index import Index, ShardInfo
from bt.data.shards import ShardWriter, write_atomic
from bt.data.sources.base import Blob, RawSample, Slice, Source
from bt.data.transforms import UNDECODABLE, decode
from bt.errors import DataError

_STARTED = "index.json.partial"  # what an unfinished conversion leaves, so that only the same one goes on in its folder


def convert(
    source: Source,
    out_dir: Path,
    shard_size: int = 1000,
    progress: Callable[[Iterable[RawSample]], Iterable[RawSample]] = lambda samples: samples,
) -> tuple[Index, bool]:
    """Write the shards of a source to out_dir, index last; returns the index and whether anything was written.

    The same source and options give the same bytes. A finished out_dir of the same source and options is left as it is;
    one with anything else in it is refused. Left out and counted in `index.skipped`: missing and undecodable images,
    duplicate keys, empty texts, samples without any text. progress: wraps the iterator of samples.
    """
    if shard_size < 1:
        raise DataError(f"shard_size={shard_size}: must be at least 1")
    identity = {"source": source.name, "options": {**source.options(), "shard_size": shard_size}}
    done = _claim(out_dir, identity)
    if done is not None:
        return done, False
    labels = source.labels()
    skipped: Counter[str] = Counter()
    try:
        splits = _write_splits(source, out_dir, shard_size, progress, skipped)
    except OSError as error:  # a full disk; files that cannot be read are counted where they are read
        raise DataError(f"cannot write to {out_dir}: {error}; give the command again when that is mended") from None
    if not splits:
        reasons = ", ".join(f"{reason} {n}" for reason, n in skipped.items()) or "no samples"
        raise DataError(f"nothing to convert from {source.name}: {reasons}")
    index = Index(
        **identity,
        text_fields=dict(source.text_fields),
        labels=labels,
        splits=splits,
        skipped=dict(sorted(skipped.items())),
    )
    write_atomic(out_dir / index_file.NAME, index.to_json().encode())
    (out_dir / _STARTED).unlink()
    return index, True


def _claim(out_dir: Path, identity: dict[str, Any]) -> Index | None:
    """The index if the conversion is already complete; DataError if out_dir holds something else."""
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        present = {path.name for path in out_dir.iterdir()}
        if index_file.NAME in present:
            text = (out_dir / index_file.NAME).read_text(encoding="utf-8")
            index = index_file.parse(text, str(out_dir))
            held = {"source": index.source, "options": index.options}
            if held != identity:
                raise DataError(f"{out_dir} holds another data set ({_says(held)}, asked: {_says(identity)})")
            return index
        if _STARTED in present:
            held = json.loads((out_dir / _STARTED).read_text(encoding="utf-8"))
            if held != identity:
                raise DataError(f"{out_dir} holds an unfinished data set ({_says(held)}, asked: {_says(identity)})")
        elif present:
            raise DataError(f"{out_dir} is not empty and holds no {index_file.NAME}: give a new out_dir")
        write_atomic(out_dir / _STARTED, json.dumps(identity).encode())
    except (OSError, ValueError) as error:
        raise DataError(f"cannot write to {out_dir}: {error}") from None
    return None


def _says(identity: dict[str, Any]) -> str:
    return f"{identity['source']} {identity['options']}"


def _write_splits(source, out_dir, shard_size, progress, skipped: Counter[str]) -> dict[str, list[ShardInfo]]:
    """Write all samples; splits without one are left out."""
    fields = source.text_fields
    writers: dict[str, ShardWriter] = {}
    keys: dict[str, set[str]] = {}

    def skip(reason: str) -> None:
        skipped[reason] += 1

    for raw in progress(source.samples(skip)):
        info = {name: value for name, value in raw.info.items() if name not in fields}
        for name, inner in fields.items():
            given = raw.info.get(name, [])
            info[name] = [entry for entry in given if (entry if inner is None else entry[inner]).strip()]
            if len(info[name]) < len(given):
                skipped[f"empty text ({name})"] += len(given) - len(info[name])
        images = _load_images(raw, skip)
        if images is None:
            continue
        if not any(info[name] for name in fields):
            skip("no text")
        elif raw.key in keys.setdefault(raw.split, set()):
            skip("duplicate key")
        else:
            keys[raw.split].add(raw.key)
            if raw.split not in writers:
                writers[raw.split] = ShardWriter(out_dir, raw.split, list(fields), shard_size)
            writers[raw.split].add(raw.key, images, info)
    for writer in writers.values():
        writer.close()
    return {split: writer.shards for split, writer in writers.items()}


def read_image(image: Path | Blob | Slice) -> tuple[bytes, str]:
    """The encoded bytes and the ending of the file name; OSError if they cannot be read."""
    if isinstance(image, Blob):
        return image.data, image.ending
    if isinstance(image, Slice):
        with open(image.path, "rb") as file:
            file.seek(image.offset)
            data = file.read(image.size)
        if len(data) < image.size:
            raise OSError(f"{image.path} ends before the image does")
        return data, image.ending
    return image.read_bytes(), image.suffix.lower().lstrip(".")


def _load_images(raw: RawSample, skip: Callable[[str], None]) -> dict[str, bytes] | None:
    """The original bytes by the ending of the member's name; None if one is missing or cannot be decoded."""
    images = {}
    for name, image in raw.images.items():
        try:
            data, ending = read_image(image)
        except OSError:
            skip("missing image")
            return None
        try:
            decode(data)
        except UNDECODABLE:
            skip("image cannot be decoded")
            return None
        images[f"{name}.{ending}" if name else ending] = data
    return images
