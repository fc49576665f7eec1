"""Makes one micro-batch: reads its samples, draws what the objectives need, and turns all of it into tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bt.data import draws
from bt.data.batch import Batch
from bt.data.device import DeviceTransform, Encoded
from bt.data.draft import Draft, Needs
from bt.data.plan import Cut, PairIndex
from bt.data.shards import BadSample, Sample, ShardSet
from bt.data.text import Tokenizer
from bt.data.transforms import UNDECODABLE, Transform
from bt.errors import ConfigError, DataError

_TRIES = 1000  # redraws of a false image before giving up

TargetMaker = Callable[[Draft], dict[str, Tensor]]


class BatchMaker:
    """Cuts of a plan -> batches.

    text_field: which texts of a sample make its pairs ("captions", "questions"); None for labelled images: each is one
    pair without a text, its entry the sample's json. text_multiple: texts are padded to multiples of so many tokens, so
    that batches have few different shapes. targets: per objective, called with the draft. needs: what the
    objectives want drawn. on_bad_sample: "fail" raises, "skip" leaves the sample out and counts it. substitute: for
    training, a batch of which all samples are bad becomes one drawn pair; otherwise it is an error.
    """

    def __init__(
        self,
        shards: ShardSet,
        index: PairIndex,
        *,
        text_field: str | None,
        tokenizer: Tokenizer,
        transform: Transform | DeviceTransform,
        seed: int,
        max_text_len: int = 50,
        text_multiple: int = 1,
        targets: Mapping[str, TargetMaker] | None = None,
        needs: Iterable[Needs] = (),
        on_bad_sample: str = "fail",
        substitute: bool = False,
    ):
        if on_bad_sample not in ("fail", "skip"):
            raise ConfigError(f"data.on_bad_sample={on_bad_sample}: allowed are fail, skip")
        needs = list(needs)
        self.shards, self.index, self.text_field = shards, index, text_field
        self.tokenizer, self.transform, self.seed, self.max_text_len = tokenizer, transform, seed, max_text_len
        self.text_multiple = text_multiple
        self.targets = dict(targets or {})
        self.false_images = any(need.false_images for need in needs)
        self.false_texts = max((need.false_texts for need in needs), default=0)
        self.any_texts = any(need.any_texts for need in needs)
        self.skip_bad, self.substitute = on_bad_sample == "skip", substitute
        if (self.false_images or self.false_texts) and len(index.samples) < 2:
            raise DataError("false images and texts need at least two images; the chosen data has one")

    def __call__(self, cut: Cut) -> Batch:
        return _Assembly(self, cut).batch()


class _Assembly:
    """The work on one batch: samples read so far, and the rows given to images and texts."""

    def __init__(self, maker: BatchMaker, cut: Cut):
        self.maker = maker
        self.skipped: Counter[str] = Counter()
        self.samples: dict[int, Sample | None] = {}
        self.image_rows: dict[tuple[int, ...], range] = {}  # the first number is the sample's
        self.images: list[Tensor | Encoded] = []
        self.text_rows: dict[str | tuple[str, str], int] = {}
        owners, rows = self._read(cut)
        good = np.array([row is not None for row in rows], bool)
        if not good.any():
            cut = self._substitute(cut)
            owners, rows = self._read(cut)
            good = np.ones(1, bool)
        self.owners = owners[good]
        self.own_rows = [row for row in rows if row is not None]
        self.pairs, self.epochs, self.match = cut.pairs[good], cut.epochs[good], cut.match[good]

    def _read(self, cut: Cut) -> tuple[np.ndarray, list[range | None]]:
        """The sample of each pair, and the rows of its images."""
        owners = self.maker.index.sample_of(cut.pairs)
        places = zip(owners.tolist(), cut.epochs.tolist(), strict=True)
        return owners, [self.rows_of(*place) for place in places]

    def _substitute(self, cut: Cut) -> Cut:
        """One drawn pair in place of a micro-batch of bad samples alone: no rank can leave out its part of a step."""
        maker, epochs = self.maker, cut.epochs[:1]
        for attempt in range(_TRIES if maker.substitute else 0):
            u = draws.uniforms(maker.seed, "substitute", epochs, cut.pairs[:1], 1, first=attempt)[0]
            drawn = Cut(maker.index.pair_at((u * maker.index.size).astype(np.int64)), epochs, cut.match[:1])
            if self._read(drawn)[1][0] is not None:
                return drawn
        raise DataError(f"all samples of a batch are bad: {', '.join(self.skipped)}")

    def sample(self, number: int) -> Sample | None:
        """The sample, read once a batch; None if it is bad and bad ones are skipped."""
        if number not in self.samples:
            try:
                self.samples[number] = self.maker.shards.read(number)
            except BadSample as bad:
                self._drop(number, bad)
        return self.samples[number]

    def _drop(self, number: int, bad: BadSample) -> None:
        if not self.maker.skip_bad:
            raise bad
        self.samples[number] = None
        self.skipped[f"{bad.shard}: {bad.reason}"] += 1

    def rows_of(self, number: int, epoch: int, pair: int | None = None) -> range | None:
        """The rows of a sample's images; None if it is bad and bad ones are skipped.

        Random transforms draw anew in each epoch, the same for all texts of an image. As the false image of a pair it
        is a row of its own, drawn for that pair. Both are then the same however pairs are shared out.
        """
        transform, pairs = self.maker.transform, () if pair is None else (pair,)
        place = (number, epoch, *pairs) if transform.random else (number,)
        if place in self.image_rows:
            return self.image_rows[place]
        sample = self.sample(number)
        if sample is None:
            return None
        rng = draws.generator(self.maker.seed, "augment", epoch, number, *pairs) if transform.random else None
        try:
            pixels = [transform(data, rng) for data in sample.images.values()]
        except UNDECODABLE as error:
            message = f"{sample.shard}: the image of sample '{sample.key}' cannot be decoded: {error}"
            self._drop(number, BadSample(message, sample.shard, "image cannot be decoded"))
            return None
        first = len(self.images)
        self.images += pixels
        return self.image_rows.setdefault(place, range(first, len(self.images)))

    def pair_images(self) -> np.ndarray:
        """(pairs, images of a sample) rows of the images of each pair; (pairs, 1) of -1 where samples have none."""
        sizes = sorted({len(rows) for rows in self.own_rows})
        if len(sizes) > 1:
            raise DataError(f"data sets with {sizes[0]} and with {sizes[1]} images a sample cannot be mixed")
        if sizes == [0]:
            return np.full((len(self.own_rows), 1), -1)
        return np.array([list(rows) for rows in self.own_rows], np.int64)

    def pair_texts(self) -> tuple[np.ndarray, list[dict[str, Any]]]:
        """(pairs,) rows of the texts, -1 without a text field, and the entries of the pairs."""
        owners = self.owners.tolist()
        if self.maker.text_field is None:
            return np.full(len(owners), -1), [self.sample(owner).info for owner in owners]
        texts = [self.entry(pair, owner) for pair, owner in zip(self.pairs.tolist(), owners, strict=True)]
        return np.array([self.text_row(text) for text, _ in texts]), [entry for _, entry in texts]

    def entry(self, pair: int, owner: int) -> tuple[str | tuple[str, str], dict[str, Any]]:
        """The text of a pair, or its two segments, and its entry in the json."""
        maker = self.maker
        entry = self.sample(owner).info[maker.text_field][pair - int(maker.index.first[owner])]
        inner = maker.shards.text_fields[maker.text_field]
        if inner is None:
            return entry, {"text": entry}
        return (entry[inner], entry["text_pair"]) if "text_pair" in entry else entry[inner], entry

    def texts_of(self, owner: int) -> set[str | tuple[str, str]]:
        """All texts of a sample."""
        first = int(self.maker.index.first[owner])
        return {self.entry(first + i, owner)[0] for i in range(len(self.sample(owner).info[self.maker.text_field]))}

    def text_row(self, text: str | tuple[str, str]) -> int:
        return self.text_rows.setdefault(text, len(self.text_rows))

    def uniform(self, purpose: str, n: int) -> np.ndarray:
        return draws.uniforms(self.maker.seed, purpose, self.epochs, self.pairs, n)

    def draw_pairs(self, purpose: str, wanted: np.ndarray, usable: Callable[[int, int, int], bool]) -> np.ndarray:
        """Pairs of the split, uniform over those that are usable; -1 where `wanted` (pairs, n) is False.

        usable: called with the row of a pair, and the pair and the sample drawn for it; where it says no, the draw is
        repeated.
        """
        index, columns = self.maker.index, wanted.shape[1]
        drawn = np.full(wanted.shape, -1, np.int64)
        missing = wanted.copy()
        for attempt in range(_TRIES):
            if not missing.any():
                return drawn
            u = draws.uniforms(self.maker.seed, purpose, self.epochs, self.pairs, columns, first=attempt * columns)
            candidates = index.pair_at((u * index.size).astype(np.int64))
            owners = index.sample_of(candidates)
            fits = missing.copy()
            for place in zip(*np.nonzero(fits), strict=True):
                fits[place] = usable(int(place[0]), int(candidates[place]), int(owners[place]))
            drawn[fits] = candidates[fits]
            missing &= ~fits
        raise DataError(
            f"no usable {purpose.replace('_', ' ')} was found in {_TRIES} draws: too few images, too many bad ones, or "
            "too few different texts"
        )

    # The official code may draw the true image as the false one, or another text of it (base_dataset.py).

    def false_image_rows(self) -> np.ndarray:
        """(pairs,) image rows for the pairs that do not match, -1 elsewhere; never the pair's own image."""
        rows = np.full(len(self.pairs), -1, np.int64)

        def read(at: int, _: int, sample: int) -> bool:
            if sample == self.owners[at]:
                return False
            found = self.rows_of(sample, int(self.epochs[at]), int(self.pairs[at]))
            rows[at] = found[0] if found else -1
            return bool(found)

        self.draw_pairs("false_image", ~self.match[:, None] & self.maker.false_images, read)
        return rows

    def false_text_rows(self) -> np.ndarray:
        """(pairs, false_texts) text rows; never a text of the pair's image nor its equal, unless any will do."""
        if not self.maker.false_texts:
            return np.empty((len(self.pairs), 0), np.int64)
        own = [set() if self.maker.any_texts else self.texts_of(owner) for owner in self.owners.tolist()]

        def false(at: int, pair: int, sample: int) -> bool:
            return self.sample(sample) is not None and self.entry(pair, sample)[0] not in own[at]

        wanted = np.ones((len(self.pairs), self.maker.false_texts), bool)
        drawn = self.draw_pairs("false_text", wanted, false)
        owners = self.maker.index.sample_of(drawn)
        rows = [
            self.text_row(self.entry(pair, owner)[0])
            for pair, owner in zip(drawn.ravel().tolist(), owners.ravel().tolist(), strict=True)
        ]
        return np.array(rows, np.int64).reshape(wanted.shape)

    def batch(self) -> Batch:
        texts, entries = self.pair_texts()
        images = self.pair_images()
        pairs = np.stack([images[:, 0], texts], axis=1).astype(np.int64)
        false_images, false_texts = self.false_image_rows(), self.false_text_rows()
        samples = [sample for (sample, *_), rows in self.image_rows.items() for _ in rows]
        image_ids = np.array(samples, np.int64)
        tokenizer, unique = self.maker.tokenizer, list(self.text_rows)
        lengths = self.maker.max_text_len, self.maker.text_multiple
        tokens = tokenizer.batch(unique, *lengths)
        draft = Draft(
            texts=tokens,
            entries=entries,
            pairs=pairs,
            image_ids=image_ids,
            pair_ids=self.pairs,
            match=self.match,
            false_image_rows=false_images,
            false_text_rows=false_texts,
            max_text_len=self.maker.max_text_len,
            word_starts=lambda: tokenizer.word_starts(unique, *lengths),
            uniform=self.uniform,
        )
        return Batch(
            images=self.maker.transform.stack(self.images),
            texts=tokens,
            pairs=torch.from_numpy(pairs),
            image_ids=torch.from_numpy(image_ids),
            pair_ids=torch.from_numpy(self.pairs),
            second_images=torch.from_numpy(images[:, 1].copy()) if images.shape[1] == 2 else None,
            targets={name: make(draft) for name, make in self.maker.targets.items()},
            keys=[self.samples[sample].key for sample in samples],
            entries=entries,
            skipped=dict(self.skipped),
        )
