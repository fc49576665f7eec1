"""Data sets mixed by weight, and splits that count as one."""

import numpy as np
import pytest
import torch

from bt.assemble import Data
from bt.data.mix import MixedPlan
from bt.data.plan import PairIndex, TrainPlan
from bt.data.shards import ShardSet
from bt.data.sources.easy_vqa import EasyVQA
from bt.data.write import convert
from bt.engine.distributed import World
from bt.errors import DataError
from tests.test_config import composed

COUNTS = np.array([3, 1, 4] * 10 + [2, 2, 5] * 20)  # 30 samples with 80 pairs, then 60 with 180
SPLIT = 30


def mixed(world=1, rank=0, accumulation=1, weights=(3, 1), batch=24) -> MixedPlan:
    index = PairIndex(COUNTS)
    plans = [
        TrainPlan(PairIndex(COUNTS, part), np.array([0, 90]), seed=5, global_batch=batch, texts_per_image=2)
        for part in (np.arange(SPLIT), np.arange(SPLIT, len(COUNTS)))
    ]
    return MixedPlan(
        index, plans, weights, seed=5, global_batch=batch, world=world, rank=rank, accumulation=accumulation
    )


def test_every_step_has_its_share_of_each_data_set():
    plan = mixed()
    for step in range(12):
        owners = plan.index.sample_of(plan.cut(step).pairs)
        assert len(owners) == 24 and (owners < SPLIT).sum() == 18
    uneven = mixed(weights=(0.3, 0.45))
    given = np.array([(uneven.index.sample_of(uneven.cut(step).pairs) < SPLIT).sum() for step in range(100)])
    assert set(given) == {9, 10} and given.sum() == round(2400 * 0.4)


def test_each_data_set_goes_through_its_own_epochs():
    """80 pairs at 18 a step: the small set's first epoch ends within step 4, the large one goes on with its own."""
    plan = mixed()
    seen = {0: [], 1: []}
    for step in range(5):
        cut = plan.cut(step)
        small = plan.index.sample_of(cut.pairs) < SPLIT
        for epoch in (0, 1):
            seen[epoch] += cut.pairs[small & (cut.epochs == epoch)].tolist()
        assert not cut.epochs[~small].any()
    assert sorted(seen[0]) == list(range(80)) and len(seen[1]) == 5 * 18 - 80


def test_ranks_and_micro_batches_share_one_step():
    alone = mixed()
    for step in (0, 4, 17):
        whole = alone.cut(step)
        parts = [mixed(3, rank, 2).cut(step * 2 + micro) for rank in range(3) for micro in range(2)]
        for name in ("pairs", "epochs", "match"):
            assert np.array_equal(np.concatenate([getattr(part, name) for part in parts]), getattr(whole, name))
        assert whole.match.sum() == 12


def test_texts_of_an_image_stay_together_and_data_sets_are_shuffled():
    cut = mixed().cut(2)
    owners = mixed().index.sample_of(cut.pairs)
    runs = owners[np.diff(owners, prepend=-1) != 0]
    assert len(runs) < 20  # pairs of two texts of an image lie side by side
    kinds = runs < SPLIT
    assert np.count_nonzero(kinds[1:] != kinds[:-1]) > 2


def test_several_splits_count_as_one(data_dir):
    both = ShardSet(str(data_dir), ["train", "val"])
    val = ShardSet(str(data_dir), "val")
    assert len(both) == 4000 and both.parts.tolist() == [0, 4000]
    assert both.key(3600) == val.key(0) and both.read(3999).info == val.read(399).info


def test_a_split_that_no_data_set_has_is_named(few_dir, data_dir, caplog):
    shards = ShardSet([str(few_dir), str(data_dir)], ["train", "vla", "test"])
    assert shards.parts[-1] == len(shards) and "no data set has (vla)" in caplog.text
    caplog.clear()
    assert len(ShardSet(str(data_dir), ["train", "val"])) == 4000 and caplog.text == ""


def test_data_sets_without_the_split(few_dir, small_raw, tmp_path):
    convert(EasyVQA(str(small_raw), ["test"]), tmp_path / "test_only")
    places = [str(tmp_path / "test_only"), str(few_dir)]
    with pytest.raises(DataError, match="no split 'val': .*test_only has test$"):
        ShardSet(places, "val")
    there = ShardSet(places, "val", each=False)
    assert there.parts.tolist() == [0, 0, 6] and there.key(0) == ShardSet(str(few_dir), "val").key(0)
    with pytest.raises(DataError, match="no split 'dev': .*test_only has test; .*shards has train, val, test$"):
        ShardSet(places, "dev", each=False)


@pytest.mark.parametrize(("weights", "shares"), [("[3,1]", (18, 6)), ("[1,5]", (4, 20)), ("null", None)])
def test_the_configuration_says_how_data_sets_are_mixed(few_dir, data_dir, tmp_path, weights, shares):
    """Of each step of 24 pairs, those whose sample is of the first data set; without weights as many as it has."""
    places = [str(few_dir), str(data_dir)]
    options = [f"data.dir=[{','.join(places)}]", f"data.weights={weights}", "task=pretrain", "global_batch=24"]
    cfg, shards = composed(*options), ShardSet(places, "train")
    plan = Data(cfg, World(0, 1, torch.device("cpu")), None, None).plan(shards)
    owners = [plan.index.sample_of(plan.cut(step).pairs) for step in range(60)]
    first = np.array([np.count_nonzero(of_step < shards.parts[1]) for of_step in owners])
    if shares is None:
        pairs = ShardSet(few_dir, "train").counts("captions").sum() / shards.counts("captions").sum()
        assert abs(first.mean() - 24 * pairs) < 0.3 and isinstance(plan, TrainPlan)
    else:
        assert set(first) == {shares[0]} and {len(of_step) for of_step in owners} == {sum(shares)}
