import math

import numpy as np
import pytest

from bt.data.plan import EvalPlan, PairIndex, TrainPlan, choose_samples
from bt.errors import ConfigError, DataError

COUNTS = np.array([3, 0, 1, 7, 5, 2, 2, 9, 4, 1, 6, 5], np.int32)  # 45 pairs
STARTS = np.array([0, 3, 6, 9, 12])


def make(batch=12, **options) -> TrainPlan:
    return TrainPlan(PairIndex(COUNTS), STARTS, **{"seed": 3, "global_batch": batch, **options})


def stream(world: int, accumulation: int, steps: int, **options) -> list[np.ndarray]:
    """The pairs of each step, put together from all ranks and micro-batches."""
    plans = [make(world=world, rank=rank, accumulation=accumulation, **options) for rank in range(world)]
    return [
        np.concatenate([p.cut(step * accumulation + micro).pairs for p in plans for micro in range(accumulation)])
        for step in range(steps)
    ]


@pytest.mark.parametrize("order", ["global", "shards"])
@pytest.mark.parametrize("texts_per_image", [None, 1, 2])
@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_every_text_once_an_epoch(world, accumulation, texts_per_image, order):
    options = {"texts_per_image": texts_per_image, "order": order, "shuffle_shards": 2}
    steps = stream(world, accumulation, 15, **options)  # 180 pairs: four epochs, whose borders lie inside steps
    assert {len(step) for step in steps} == {12}
    flat = np.concatenate(steps)
    for epoch in range(4):
        assert sorted(flat[epoch * 45 : (epoch + 1) * 45]) == list(range(45))
    alone = stream(1, 1, 15, **options)
    assert np.array_equal(np.concatenate(alone), flat)


def test_epochs_are_per_pair():
    cut = make().cut(3)  # pairs 36-47 of the stream
    assert cut.epochs.tolist() == [0] * 9 + [1] * 3


def test_order_depends_on_seed_and_epoch_alone():
    fresh, used = make(), make(world=3, rank=2, accumulation=2)
    for epoch in (5, 0, 2, 1):
        used.epoch_order(epoch)
    assert np.array_equal(fresh.epoch_order(1), used.epoch_order(1))
    assert not np.array_equal(fresh.epoch_order(0), fresh.epoch_order(1))
    assert not np.array_equal(fresh.epoch_order(0), make(seed=4).epoch_order(0))
    assert len(used._orders) <= 2


def visits(order: np.ndarray, index: PairIndex, most: int) -> np.ndarray:
    """How often each sample comes: runs of its pairs, of at most `most` each (two of its units may be neighbours)."""
    owners = index.sample_of(order)
    borders = np.concatenate([[0], np.nonzero(np.diff(owners))[0] + 1, [len(owners)]])
    found = np.zeros(len(COUNTS), int)
    for begin, end in zip(borders, borders[1:], strict=False):
        found[owners[begin]] += math.ceil((end - begin) / most)
    return found


@pytest.mark.parametrize("most", [1, 2, 3, None])
def test_an_image_comes_once_for_each_group_of_texts(most):
    plan = make(texts_per_image=most)
    wanted = np.ceil(COUNTS / (most or 99)).astype(int)
    for epoch in range(3):
        assert visits(plan.epoch_order(epoch), plan.index, most or 99).tolist() == wanted.tolist()


def test_texts_are_dealt_anew_in_each_epoch():
    plan = TrainPlan(PairIndex(np.full(200, 4)), np.array([0, 200]), seed=0, global_batch=2, texts_per_image=2)
    groups = [{tuple(sorted(pair)) for pair in plan.epoch_order(epoch).reshape(-1, 2).tolist()} for epoch in (0, 1)]
    # A pairing of four texts is one of three, so about a third of the images keep theirs.
    assert 80 < len(groups[0] & groups[1]) < 190


def test_global_order_is_a_shuffle():
    plan = TrainPlan(PairIndex(np.ones(2000, np.int32)), np.array([0, 2000]), seed=0, global_batch=2)
    order = plan.epoch_order(0)
    assert abs(np.corrcoef(order, np.arange(2000))[0, 1]) < 0.08
    assert (np.abs(np.diff(order)) == 1).sum() < 12


def test_shard_order_shuffles_within_windows():
    starts = np.arange(0, 1001, 100)
    plan = TrainPlan(
        PairIndex(np.ones(1000, np.int32)), starts, seed=0, global_batch=2, order="shards", shuffle_shards=4
    )
    shards = plan.epoch_order(0) // 100
    windows = [set(shards[begin:end].tolist()) for begin, end in ((0, 400), (400, 800), (800, 1000))]
    assert [len(window) for window in windows] == [4, 4, 2]
    assert set.union(*windows) == set(range(10))
    assert (np.diff(shards[:400]) != 0).mean() > 0.6  # mixed, not shard after shard
    assert set((plan.epoch_order(1)[:400] // 100).tolist()) != windows[0]


@pytest.mark.parametrize("batch", [12, 18])
def test_half_of_a_step_matches_whatever_the_ranks(batch):
    alone = [make(batch).cut(step).match for step in range(4)]
    assert [int(match.sum()) for match in alone] == [batch // 2] * 4
    assert not np.array_equal(alone[0], alone[1])
    plans = [make(batch, world=3, rank=rank, accumulation=2) for rank in range(3)]
    for step, match in enumerate(alone):
        assert np.array_equal(np.concatenate([p.cut(step * 2 + m).match for p in plans for m in (0, 1)]), match)


def test_indivisible_batch_names_the_nearest():
    with pytest.raises(ConfigError, match="global_batch=20 .* 3 ranks x 2 .*: 18 or 24$"):
        make(20, world=3, accumulation=2)
    with pytest.raises(ConfigError, match="nearest that do: 6$"):
        make(4, world=3, accumulation=2)


def test_steps_cover_the_epochs():
    assert [make().steps(epochs) for epochs in (1, 2, 4)] == [4, 8, 15]  # 45, 90 and 180 pairs in twelves
    assert make(45).steps(1) == 1


def test_subset_is_nested_and_fixed():
    half, third, few = choose_samples(3000, 0.5), choose_samples(3000, 0.3), choose_samples(3000, 0.5, most=7)
    assert (len(half), len(third), len(few)) == (1500, 900, 7)
    assert set(few) < set(third) < set(half) < set(choose_samples(3000))
    assert few.tolist() == sorted(few.tolist()) == [2, 106, 246, 486, 1802, 2207, 2707]
    assert abs(half.mean() - 1500) < 60
    assert len(choose_samples(3000, 1e-9)) == 1


def test_a_subset_keeps_the_pair_numbers():
    index = PairIndex(COUNTS, np.array([2, 5, 7]))
    assert index.pair_at(np.arange(index.size)).tolist() == [3, 16, 17, *range(20, 29)]
    plan = TrainPlan(index, STARTS, seed=0, global_batch=4)
    assert sorted(plan.epoch_order(0).tolist()) == [3, 16, 17, *range(20, 29)]
    assert set(index.sample_of(plan.epoch_order(0))) == {2, 5, 7}


def test_samples_without_texts_alone_are_an_error():
    with pytest.raises(DataError, match="no texts"):
        PairIndex(COUNTS, np.array([1]))


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_evaluation_sees_every_pair_once(world):
    plans = [EvalPlan(PairIndex(COUNTS), seed=0, batch=7, world=world, rank=rank) for rank in range(world)]
    cuts = {position: plan.cut(position) for plan in plans for position in plan.positions}
    assert sum(len(plan.positions) for plan in plans) == len(cuts) == 7
    assert np.concatenate([cuts[p].pairs for p in sorted(cuts)]).tolist() == list(range(45))
    alone = EvalPlan(PairIndex(COUNTS), seed=0, batch=7)
    assert all(np.array_equal(cut.match, alone.cut(p).match) for p, cut in cuts.items())
    assert [int(cuts[p].match.sum()) for p in sorted(cuts)] == [3] * 6 + [1]


def test_a_million_pairs_take_little_time_and_memory():
    import time
    import tracemalloc

    plan = TrainPlan(PairIndex(np.full(200_000, 5, np.int32)), np.array([0, 200_000]), seed=0, global_batch=512)
    tracemalloc.start()
    begin = time.perf_counter()
    plan.cut(0)
    seconds = time.perf_counter() - begin
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept < 5e6  # the order: 4 bytes a pair
    assert peak < 70e6
    assert seconds < 5
