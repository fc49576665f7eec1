"""Mixing data sets by weight: every step takes a fixed share of its pairs from each of them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from bt.data import draws
from bt.data.plan import Cut, PairIndex, TrainPlan


class MixedPlan:
    """A plan (see TrainPlan) whose steps are mixed from one endless stream of pairs for each data set.

    Up to step s, data set d has given round(s * G * its cumulative share) pairs, less those of the sets before it, so
    that all steps have exactly G pairs and the shares are exact in the long run. A data set that is used up begins its
    next epoch, while others go on with theirs. Runs of texts of one image that lie together in a stream are shuffled
    among those of other data sets, so that all ranks and micro-batches get a like mixture.

    index: of all pairs together. An epoch counts as many pairs as all data sets have.
    plans: one for each data set, of the whole step (one rank, no accumulation); weights: one for each, above 0.
    """

    def __init__(
        self,
        index: PairIndex,
        plans: Sequence[TrainPlan],
        weights: Sequence[float],
        *,
        seed: int,
        global_batch: int,
        world: int = 1,
        rank: int = 0,
        accumulation: int = 1,
    ):
        self.index, self.plans, self.seed = index, list(plans), seed
        self.global_batch, self.world, self.rank, self.accumulation = global_batch, world, rank, accumulation
        self.shares = np.cumsum(weights) / np.sum(weights)
        self.shares[-1] = 1.0

    @property
    def pairs_per_epoch(self) -> int:
        return self.index.size

    def steps(self, epochs: float) -> int:
        return math.ceil(epochs * self.pairs_per_epoch / self.global_batch)

    def given(self, step: int) -> np.ndarray:
        """(data sets,) how many pairs each has given before a step."""
        return np.diff(np.round(step * self.global_batch * self.shares).astype(np.int64), prepend=0)

    def cut(self, position: int) -> Cut:
        step, micro = divmod(position, self.accumulation)
        before, after = self.given(step), self.given(step + 1)
        parts = [plan.span(*span) for plan, span in zip(self.plans, zip(before, after, strict=True), strict=True)]
        pairs, epochs = (np.concatenate(column) for column in zip(*parts, strict=True))
        order = self._shuffled_runs(pairs, step)
        match = draws.generator(self.seed, "match", step).permutation(self.global_batch) < self.global_batch // 2
        size = self.global_batch // (self.world * self.accumulation)
        offset = (self.rank * self.accumulation + micro) * size
        mine = slice(offset, offset + size)
        return Cut(pairs[order][mine], epochs[order][mine], match[mine])

    def _shuffled_runs(self, pairs: np.ndarray, step: int) -> np.ndarray:
        """Positions of the pairs, runs of pairs of the same sample in a new order."""
        owners = self.index.sample_of(pairs)
        run = np.cumsum(np.diff(owners, prepend=-1) != 0) - 1
        place = draws.generator(self.seed, "mix", step).permutation(run[-1] + 1)
        return np.argsort(place[run], kind="stable")
