"""Which pairs go where: pure arithmetic on (seed, epoch, step), the same on every rank and in every worker.

Training is one endless stream of (sample, text) pairs: all pairs of epoch 0 in that epoch's order, then those of
epoch 1 and so on. Step s takes the pairs [s * G, (s + 1) * G) of the stream, G being the global batch. So every step
has exactly G pairs, none is lost or doubled, and going on at step s needs no replay.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from bt.data import draws
from bt.errors import ConfigError, DataError


@dataclass(frozen=True)
class Cut:
    """The pairs of one micro-batch. pairs: (n,) pair numbers; epochs: (n,); match: (n,) bool, the ITM draw."""

    pairs: np.ndarray
    epochs: np.ndarray
    match: np.ndarray


def choose_samples(total: int, fraction: float = 1.0, most: int | None = None) -> np.ndarray:
    """Numbers of a fixed subset of `total` samples, ascending.

    Samples are ranked by a hash of their number, so a smaller subset is part of a larger one and no seed changes it.
    """
    wanted = min(total, max(1, round(total * fraction)), total if most is None else most)
    if wanted == total:
        return np.arange(total)
    rank = np.argsort(draws.words(0, "subset", 0, np.arange(total))[:, 0], kind="stable")
    return np.sort(rank[:wanted])


class PairIndex:
    """The pairs of one text field of a split: numbers <-> (sample, text).

    Pairs are numbered through the whole split, whatever subset is chosen, so a pair's number (and all that is drawn
    from it) does not depend on the subset.

    counts: (samples,) texts of each sample. chosen: samples in use, ascending; None for all.
    size: pairs of the chosen samples.
    """

    def __init__(self, counts: np.ndarray, chosen: np.ndarray | None = None):
        self.first = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        self.samples = np.arange(len(counts)) if chosen is None else chosen
        self.samples = self.samples[counts[self.samples] > 0]
        self.counts = counts[self.samples]
        self.before = np.concatenate([[0], np.cumsum(self.counts, dtype=np.int64)])
        self.size = int(self.before[-1])
        if self.size == 0:
            raise DataError("no texts: the chosen samples have none in the text field of the task")

    def sample_of(self, pairs: np.ndarray) -> np.ndarray:
        """Sample numbers of pairs."""
        return np.searchsorted(self.first, pairs, side="right") - 1

    def pair_at(self, positions: np.ndarray) -> np.ndarray:
        """Pair numbers at positions 0..size-1 of the chosen pairs in file order."""
        row = np.searchsorted(self.before, positions, side="right") - 1
        return self.first[self.samples[row]] + positions - self.before[row]


class TrainPlan:
    """The stream of training pairs and how ranks and micro-batches share it.

    texts_per_image: k: an epoch shuffles units of up to k texts of one image, so that an image with n texts comes in
    ceil(n / k) units (None: all its texts together). The texts of an image are dealt to units anew in each epoch.
    order: "global" shuffles all units; "shards" shuffles the shards and then the units within windows of
    `shuffle_shards` shards, which reads far less at random where shards are remote or on slow disks.
    starts: (shards + 1,) first sample of each shard.

    A position counts micro-batches of one rank: position = step * accumulation + micro.
    """

    def __init__(
        self,
        index: PairIndex,
        starts: np.ndarray,
        *,
        seed: int,
        global_batch: int,
        world: int = 1,
        rank: int = 0,
        accumulation: int = 1,
        texts_per_image: int | None = None,
        order: str = "global",
        shuffle_shards: int = 8,
    ):
        parts = world * accumulation
        if global_batch % parts:
            below = global_batch // parts * parts
            nearest = f"{below} or {below + parts}" if below else f"{parts}"
            raise ConfigError(
                f"global_batch={global_batch} does not divide by {world} ranks x {accumulation} micro-batches: "
                f"the nearest that do: {nearest}"
            )
        if order not in ("global", "shards"):
            raise ConfigError(f"data.order={order}: allowed are global, shards")
        self.index, self.starts, self.seed = index, starts, seed
        self.global_batch, self.world, self.rank, self.accumulation = global_batch, world, rank, accumulation
        self.texts_per_image, self.order, self.shuffle_shards = texts_per_image, order, shuffle_shards
        self._orders: dict[int, np.ndarray] = {}

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_orders": {}}

    @property
    def pairs_per_epoch(self) -> int:
        return self.index.size

    def steps(self, epochs: float) -> int:
        """Steps until every pair has been seen `epochs` times; the last one runs into the next epoch."""
        return math.ceil(epochs * self.pairs_per_epoch / self.global_batch)

    def cut(self, position: int) -> Cut:
        """This rank's pairs at a position. The slices of rank 0, all its micro-batches first, then rank 1 and so on,
        make up the step."""
        step, micro = divmod(position, self.accumulation)
        size = self.global_batch // (self.world * self.accumulation)
        offset = (self.rank * self.accumulation + micro) * size
        begin = step * self.global_batch + offset
        pairs, epochs = self.span(begin, begin + size)
        # Over the whole step, so that the labels do not depend on how ranks share it.
        match = draws.generator(self.seed, "match", step).permutation(self.global_batch) < self.global_batch // 2
        return Cut(pairs, epochs, match[offset : offset + size])

    def span(self, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """Pair numbers and epochs at the places [begin, end) of the stream."""
        epochs, places = np.divmod(np.arange(begin, end), self.pairs_per_epoch)
        pairs = np.empty(len(places), np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            pairs[here] = self.epoch_order(int(epoch))[places[here]]
        return pairs, epochs

    def epoch_order(self, epoch: int) -> np.ndarray:
        """(pairs_per_epoch,) pair numbers in the order of an epoch; the two last used are kept."""
        if epoch not in self._orders:
            for old in sorted(self._orders)[:-1]:
                del self._orders[old]
            self._orders[epoch] = self._make_order(epoch)
        return self._orders[epoch]

    def _make_order(self, epoch: int) -> np.ndarray:
        index = self.index
        dtype = np.int32 if index.first[-1] < 2**31 else np.int64  # millions of pairs: memory counts
        pairs = np.repeat((index.first[index.samples] - index.before[:-1]).astype(dtype), index.counts)
        pairs += np.arange(index.size, dtype=dtype)
        if index.counts.max() > 1:
            owner = np.repeat(np.arange(len(index.samples), dtype=np.uint32), index.counts)
            pairs = pairs[self._shuffled(owner, "texts", epoch, pairs)]
        begin, size, owner = self._units()
        shuffle = self._shuffled(self._windows(owner, epoch), "units", epoch, begin)
        begin, size = begin[shuffle], size[shuffle]
        if size.max() > 1:
            before = np.cumsum(size, dtype=np.int64) - size
            begin = np.repeat(begin - before, size) + np.arange(index.size)
        return pairs[begin]

    def _shuffled(self, group: np.ndarray, purpose: str, epoch: int, ids: np.ndarray) -> np.ndarray:
        """Positions ordered by group, and at random by (seed, purpose, epoch, id) within each."""
        key = draws.words(self.seed, purpose, epoch, ids)[:, 0]
        key >>= np.uint64(32)
        key |= group.astype(np.uint64) << np.uint64(32)
        return np.argsort(key, kind="stable")

    def _units(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Begin (in pairs sorted by sample), size and row of the sample of each unit, in file order."""
        index = self.index
        most = self.texts_per_image or int(index.counts.max())
        units = -(-index.counts // most)
        owner = np.repeat(np.arange(len(index.samples)), units)
        offset = (np.arange(len(owner)) - np.repeat(np.cumsum(units) - units, units)) * most
        return index.before[owner] + offset, np.minimum(most, index.counts[owner] - offset), owner

    def _windows(self, owner: np.ndarray, epoch: int) -> np.ndarray:
        """The window in which each unit is shuffled."""
        if self.order == "global":
            return np.zeros(len(owner), np.uint32)
        shards = len(self.starts) - 1
        place = np.empty(shards, np.uint32)
        place[draws.generator(self.seed, "shards", epoch).permutation(shards)] = np.arange(shards, dtype=np.uint32)
        shard = np.searchsorted(self.starts, self.index.samples, side="right") - 1
        return (place // self.shuffle_shards)[shard][owner]


class EvalPlan:
    """Every pair of a split exactly once, in file order, in fixed batches of `batch` pairs.

    Batches do not depend on the number of ranks: rank r takes the batches r, r + world, ... without padding, so ranks
    may have one batch more or less than others. A position is the number of a batch.
    """

    def __init__(self, index: PairIndex, *, seed: int, batch: int, world: int = 1, rank: int = 0):
        self.index, self.seed, self.batch, self.world, self.rank = index, seed, batch, world, rank

    @property
    def pairs(self) -> int:
        return self.index.size

    @property
    def positions(self) -> range:
        """The batches of this rank."""
        return range(self.rank, math.ceil(self.pairs / self.batch), self.world)

    def cut(self, position: int) -> Cut:
        pairs = self.index.pair_at(np.arange(position * self.batch, min((position + 1) * self.batch, self.pairs)))
        match = draws.generator(self.seed, "match of evaluation", position).permutation(len(pairs)) < len(pairs) // 2
        return Cut(pairs, np.zeros(len(pairs), np.int64), match)
