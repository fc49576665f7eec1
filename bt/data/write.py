"""Writes a data set: source -> shards and index."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bt.data import index as index_file
from bt.data.images import BadImage, load_images_in_order
from bt.data.index import Index, ShardInfo, table_name
from bt.data.journal import NAME as UNFINISHED
from bt.data.journal import Finished, Journal, differences
from bt.data.rules import CaptionRules, ImageRules
from bt.data.shards import ShardWriter, write_atomic
from bt.data.sources.base import RawSample, Source
from bt.errors import DataError

# Reasons that speak of bad raw data; texts that are left out and what a source does not want are no mistakes.
_BAD = {
    "missing image",
    "image cannot be read",
    "image cannot be decoded",
    "image too large",
    "duplicate key",
    "text is not unicode",
}
_BAD_IN_SOURCE = ("line ", "malformed ")  # so begin a source's own reasons that do
_JUDGED_FROM = 1000  # samples of a split before its share of bad ones is judged


@dataclass(frozen=True)
class Limits:
    """What is done about bad raw data. on_bad_sample: "skip" leaves it out and counts it, "fail" stops at the first.

    max_bad_share: the conversion stops above this share of bad samples, in a split of which 1,000 have been seen, or
    in all at the end. By default nearly all must be bad, as in a wrong folder: sets from the web have many dead images.
    """

    on_bad_sample: str = "skip"
    max_bad_share: float = 0.9


def convert(
    source: Source,
    out_dir: Path,
    shard_size: int = 1000,
    progress: Callable[[Iterable[RawSample]], Iterable[RawSample]] = lambda samples: samples,
    *,
    workers: int = 0,
    captions: CaptionRules | None = None,
    images: ImageRules | None = None,
    limits: Limits | None = None,
) -> tuple[Index, bool]:
    """Write the shards of a source to out_dir, index last; returns the index and whether anything was written.

    The same source and options give the same bytes, whatever `workers`: processes that read images, 0 for none beside
    this one. A finished out_dir of the same source and options is left as it is; an unfinished one is finished, without
    reading images of finished shards again; one with anything else in it is refused. What is left out is counted in
    `index.skipped`. progress: wraps the iterator of samples.

    Raises DataError if nothing is usable, too much is bad or out_dir cannot be written to; what is finished stays.
    """
    if shard_size < 1:
        raise DataError(f"shard_size={shard_size}: must be at least 1")
    captions, images = captions or CaptionRules(), images or ImageRules()
    own = {"shard_size": shard_size, "captions": asdict(captions), "images": asdict(images)}
    if clash := own.keys() & source.options().keys():
        raise DataError(f"{source.name}: its option '{min(clash)}' has the name of one of the converter")
    identity = json.loads(json.dumps({"source": source.name, "options": {**source.options(), **own}}))
    with _writing(out_dir):
        done = _claim(out_dir, identity)
    if done is not None:
        return done, False
    labels = source.labels()
    with _writing(out_dir):
        journal = Journal(out_dir, identity)
    complete = False
    try:
        conversion = _Conversion(source, out_dir, shard_size, captions, limits or Limits(), journal)
        conversion.run(progress, images, workers)
        index = Index(
            **identity,
            text_fields=dict(source.text_fields),
            labels=labels,
            splits=conversion.shards(),
            skipped=dict(sorted(conversion.skipped().items())),
        )
        with _writing(out_dir):
            write_atomic(out_dir / index_file.NAME, index.to_json().encode())
        complete = True
    finally:
        journal.close(complete)
    return index, True


@contextmanager
def _writing(out_dir: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(
            f"cannot write to {out_dir}: {error.strerror or error}; give the command again when that is mended"
        ) from None


def _claim(out_dir: Path, identity: Mapping[str, Any]) -> Index | None:
    """The index if the conversion is already complete; DataError if out_dir holds something else."""
    out_dir.mkdir(parents=True, exist_ok=True)
    present = {path.name for path in out_dir.iterdir()}
    if index_file.NAME in present:
        index = index_file.parse((out_dir / index_file.NAME).read_text(encoding="utf-8"), str(out_dir))
        held = {"source": index.source, "options": index.options}
        if held != identity:
            raise DataError(f"{out_dir} holds another data set ({differences(held, identity)})")
        return index
    if present and UNFINISHED not in present:
        raise DataError(f"{out_dir} is not empty and holds no {index_file.NAME}: give a new out_dir")
    return None


@dataclass
class _Split:
    """taken: raw samples so far; resumed: how many of them finished shards of an earlier attempt account for. noted:
    shards in the journal."""

    writer: ShardWriter
    taken: int = 0
    resumed: int = 0
    noted: int = 0
    keys: set[bytes] = field(default_factory=set)
    skipped: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class _Item:
    """A raw sample with its texts chosen. number: its place in its split. left_out: texts, by reason."""

    raw: RawSample
    number: int
    info: dict[str, Any]
    left_out: Counter[str]
    has_text: bool

    @property
    def images(self) -> Mapping[str, Any]:
        return self.raw.images if self.has_text else {}


class _Conversion:
    """One conversion: samples come in the order of the source, images are read ahead, shards are written in order.

    What is counted is counted per split when a sample is taken, so that the counts at the end of a shard speak of the
    samples up to there alone.
    """

    def __init__(
        self,
        source: Source,
        out_dir: Path,
        shard_size: int,
        captions: CaptionRules,
        limits: Limits,
        journal: Journal,
    ):
        self.source, self.out_dir, self.shard_size = source, out_dir, shard_size
        self.captions, self.limits, self.journal = captions, limits, journal
        self.splits: dict[str, _Split] = {}
        self.by_source: Counter[str] = Counter()
        self.first_bad: dict[str, str] = {}

    def run(self, progress: Callable[[Iterable[RawSample]], Iterable[RawSample]], rules: ImageRules, workers: int):
        # Closed at once, whatever happens: processes end, and a progress bar before a line on what happened.
        with (
            closing(self._items(progress(self.source.samples(self._skip)))) as items,
            closing(load_images_in_order(items, rules, workers)) as loaded,
        ):
            for item, images in loaded:
                self._take(item, images)
        with _writing(self.out_dir):
            for name, split in self.splits.items():
                split.writer.close()
                self._note(name, split)
        if not self.shards():
            reasons = ", ".join(f"{reason} {n}" for reason, n in self.skipped().items()) or "no samples"
            raise DataError(f"nothing to convert from {self.source.name}: {reasons}{self._example()}")
        self._judge("samples", sum(split.taken for split in self.splits.values()), self.skipped())

    def shards(self) -> dict[str, list[ShardInfo]]:
        """Splits without a sample are left out."""
        return {name: split.writer.shards for name, split in self.splits.items() if split.writer.shards}

    def skipped(self) -> Counter[str]:
        return sum((split.skipped for split in self.splits.values()), Counter(self.by_source))

    def _items(self, raws: Iterable[RawSample]) -> Iterator[_Item]:
        """The samples behind those that finished shards account for. Runs ahead of what is taken, and counts nothing
        but places."""
        places: Counter[str] = Counter()
        try:
            for raw in raws:
                places[raw.split] += 1
                if raw.split not in self.splits:
                    self.splits[raw.split] = self._resume(raw.split)
                if places[raw.split] > self.splits[raw.split].resumed:
                    yield self._item(raw, places[raw.split])
        except OSError as error:
            raise DataError(f"cannot read the raw files of {self.source.name}: {error}") from None

    def _resume(self, name: str) -> _Split:
        fields = list(self.source.text_fields)
        split = _Split(ShardWriter(self.out_dir, name, fields, self.shard_size))
        for finished in self.journal.finished:
            if finished.split == name:
                split.writer.shards.append(finished.shard)
                split.keys.update(np.load(self.out_dir / table_name(finished.shard.name))["key"].tolist())
                split.noted += 1
                split.taken = split.resumed = finished.taken
                split.skipped = Counter(finished.skipped)
        return split

    def _item(self, raw: RawSample, number: int) -> _Item:
        fields = self.source.text_fields
        info = {name: value for name, value in raw.info.items() if name not in fields}
        left_out: Counter[str] = Counter()
        for name, inner in fields.items():
            given = raw.info.get(name, [])
            info[name] = [entry for entry in given if _says_something(entry if inner is None else entry[inner])]
            if len(info[name]) < len(given):
                left_out[f"empty text ({name})"] += len(given) - len(info[name])
            if inner is None:
                info[name] = self.captions.keep(info[name], name, left_out)
        return _Item(raw, number, info, left_out, not fields or any(info[name] for name in fields))

    def _take(self, item: _Item, images: dict[str, bytes] | BadImage) -> None:
        """Write a sample, or count why not."""
        split, raw = self.splits[item.raw.split], item.raw
        split.taken = item.number
        split.skipped += item.left_out
        if not item.has_text:
            split.skipped["no text"] += 1
        elif isinstance(images, BadImage):
            self._leave_out(split, raw, images.reason, images.where)
        elif raw.key.encode() in split.keys:
            self._leave_out(split, raw, "duplicate key", raw.key)
        else:
            self._write(split, raw, images, item.info)
        if split.taken % _JUDGED_FROM == 0:
            self._judge(f"samples of {raw.split}", split.taken, split.skipped)

    def _write(self, split: _Split, raw: RawSample, images: dict[str, bytes], info: dict[str, Any]) -> None:
        with _writing(self.out_dir):
            try:
                split.writer.add(raw.key, images, info)
            except UnicodeEncodeError:  # it has written nothing yet
                info = self._unicode_part(split, raw, info)
                if info is None:
                    return
                split.writer.add(raw.key, images, info)
            split.keys.add(raw.key.encode())
            self._note(raw.split, split)

    def _unicode_part(self, split: _Split, raw: RawSample, info: dict[str, Any]) -> dict[str, Any] | None:
        """The sample without the texts that are not unicode, which are counted; None if that leaves none, counted."""
        fields = self.source.text_fields
        kept = info | {name: [entry for entry in info[name] if _is_unicode(entry)] for name in fields}
        if not _is_unicode(kept) or not any(kept[name] for name in fields):
            self._leave_out(split, raw, "text is not unicode", raw.key)
            return None
        for name in fields:
            for _ in range(len(info[name]) - len(kept[name])):
                self._leave_out(split, raw, f"text is not unicode ({name})", raw.key)
        return kept

    def _note(self, name: str, split: _Split) -> None:
        """Put a shard that has just been finished into the journal."""
        if len(split.writer.shards) > split.noted:
            split.noted = len(split.writer.shards)
            self.journal.add(Finished(name, split.taken, dict(split.skipped), split.writer.shards[-1]))

    def _skip(self, reason: str) -> None:
        """What the source leaves out itself. It is enumerated from its beginning in any case, so this starts at 0."""
        self.by_source[reason] += 1
        if self.limits.on_bad_sample == "fail" and reason.startswith(_BAD_IN_SOURCE):
            raise DataError(f"{self.source.name}: {reason}; on_bad_sample=skip leaves such out and counts them")

    def _leave_out(self, split: _Split, raw: RawSample, reason: str, where: str) -> None:
        split.skipped[reason] += 1
        self.first_bad.setdefault(reason, where)
        if self.limits.on_bad_sample == "fail":
            raise DataError(
                f"{self.source.name}: sample '{raw.key}' of {raw.split}: {reason} ({where}); "
                "on_bad_sample=skip leaves such samples out and counts them"
            )

    def _judge(self, what: str, seen: int, skipped: Counter[str]) -> None:
        bad = {r: n for r, n in skipped.items() if r in _BAD or r.startswith(_BAD_IN_SOURCE)}
        total = seen + sum(n for reason, n in bad.items() if reason not in _BAD)  # those never became samples
        if total and sum(bad.values()) > self.limits.max_bad_share * total:
            reasons = ", ".join(f"{reason} {n:,}" for reason, n in sorted(bad.items()))
            raise DataError(
                f"{self.source.name}: {sum(bad.values()):,} of {total:,} {what} are bad, more than "
                f"max_bad_share={self.limits.max_bad_share}: {reasons}{self._example()}"
            )

    def _example(self) -> str:
        return "".join(f"; first {reason}: {where}" for reason, where in list(self.first_bad.items())[:1])


def _is_unicode(value: Any) -> bool:
    """False where a string holds a surrogate: half of a pair, which json can hold, or a byte that was not UTF-8."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _says_something(text: Any) -> bool:
    return isinstance(text, str) and bool(text.strip())
