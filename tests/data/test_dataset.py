import dataclasses
import os

import numpy as np
import pytest
import torch

from bt.data.batch import Batch
from bt.data.collate import BatchMaker
from bt.data.dataset import eval_loader, train_loader
from bt.data.draft import Needs
from bt.data.plan import EvalPlan, PairIndex, TrainPlan
from bt.data.shards import ShardSet
from bt.data.transforms import make_transform
from bt.errors import DataError
from tests.data.helpers import flip_byte


def marks(draft):
    """Stands for an objective's targets; a function of the module, so that any worker can get it."""
    return {
        "marks": torch.from_numpy(draft.uniform("marks", 3)),
        "false": torch.from_numpy(draft.false_image_rows),
        "pid": torch.tensor([os.getpid()]),
    }


def maker_of(shards, tokenizer, index=None, **options) -> BatchMaker:
    return BatchMaker(
        shards,
        index or PairIndex(shards.counts("captions")),
        text_field="captions",
        tokenizer=tokenizer,
        transform=make_transform("clip", 64),
        seed=9,
        targets={"x": marks},
        needs=[Needs(false_images=True)],
        **options,
    )


def plan_of(shards, **options) -> TrainPlan:
    return TrainPlan(PairIndex(shards.counts("captions")), shards.starts, **{"seed": 9, "global_batch": 60, **options})


def same(a: Batch, b: Batch) -> None:
    assert (a.keys, a.entries, a.skipped) == (b.keys, b.entries, b.skipped)
    for name in ("images", "pairs", "image_ids", "pair_ids"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    assert torch.equal(a.texts.ids, b.texts.ids) and torch.equal(a.texts.mask, b.texts.mask)
    for name in ("marks", "false"):
        assert torch.equal(a.targets["x"][name], b.targets["x"][name])


@pytest.fixture(scope="module")
def expected(train_set, tokenizer) -> list[Batch]:
    """Steps 360-366, where epoch 0 ends in step 362, two micro-batches each."""
    plan = plan_of(train_set, accumulation=2)
    return list(train_loader(plan, maker_of(train_set, tokenizer), start_step=360, total_steps=367))


def test_batches_are_those_of_the_plan(train_set, tokenizer, expected):
    plan = plan_of(train_set)
    assert len(expected) == 14
    for step in range(7):
        pairs = torch.cat([expected[2 * step].pair_ids, expected[2 * step + 1].pair_ids])
        assert pairs.tolist() == plan.cut(360 + step).pairs.tolist()


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than this machine has cores
@pytest.mark.parametrize("workers", [1, 3])
def test_workers_change_nothing(train_set, tokenizer, expected, workers):
    plan = plan_of(train_set, accumulation=2)
    loader = train_loader(
        plan, maker_of(train_set, tokenizer), start_step=360, total_steps=367, workers=workers, prefetch=2
    )
    batches = list(loader)
    assert len(loader) == len(batches) == 14
    for batch, wanted in zip(batches, expected, strict=True):
        same(batch, wanted)
    pids = {int(batch.targets["x"]["pid"]) for batch in batches}
    assert len(pids) == workers and os.getpid() not in pids


@pytest.mark.parametrize("workers", [0, 1])
def test_going_on_at_a_step_gives_the_same_batches(train_set, tokenizer, expected, workers):
    plan = plan_of(train_set, accumulation=2)
    loader = train_loader(
        plan, maker_of(train_set, tokenizer), start_step=363, total_steps=367, workers=workers, prefetch=1
    )
    batches = list(loader)
    assert len(batches) == 8
    for batch, wanted in zip(batches, expected[6:], strict=True):
        same(batch, wanted)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [(0, 3), (1, 0), (3, 1)])
@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("order", ["global", "shards"])
def test_stopped_and_continued_with_other_workers(few_dir, tokenizer, order, ranks, workers):
    """Stopped after two of six steps, with batches read ahead; all ranks together give what one alone does."""
    data = ShardSet(few_dir, "train")
    how = {"order": order, "shuffle_shards": 2, "texts_per_image": 2, "global_batch": 24}
    pairs = []
    for rank in range(ranks):
        plan, maker = plan_of(data, world=ranks, rank=rank, **how), maker_of(data, tokenizer)
        whole = list(train_loader(plan, maker, start_step=0, total_steps=6))
        stopped = iter(train_loader(plan, maker, start_step=0, total_steps=6, workers=workers[0], prefetch=2))
        batches = [next(stopped), next(stopped)]
        del stopped
        batches += train_loader(plan, maker, start_step=2, total_steps=6, workers=workers[1], prefetch=2)
        for batch, wanted in zip(batches, whole, strict=True):
            same(batch, wanted)
        pairs.append(torch.stack([batch.pair_ids for batch in batches]))
    alone = plan_of(data, **how)
    assert torch.cat(pairs, dim=1).tolist() == [alone.cut(step).pairs.tolist() for step in range(6)]


def test_loading_leaves_the_random_state_alone(train_set, tokenizer):
    before = torch.get_rng_state()
    np.random.seed(3)
    numpy_before = np.random.get_state()[1].copy()
    for workers in (0, 1):
        list(
            train_loader(
                plan_of(train_set), maker_of(train_set, tokenizer), start_step=0, total_steps=1, workers=workers
            )
        )
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], numpy_before)


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_reads_every_pair_once(small_dir, tokenizer, workers):
    data = ShardSet(small_dir, "test")
    index = PairIndex(data.counts("captions"))
    seen = []
    for rank in range(3):
        plan = EvalPlan(index, seed=0, batch=50, world=3, rank=rank)
        loader = eval_loader(plan, maker_of(data, tokenizer), workers=workers)
        seen += [(rank, batch) for batch in loader]
        assert [len(batch.pairs) for batch in loader] == [len(batch.pairs) for r, batch in seen if r == rank]
    assert sorted(i for _, batch in seen for i in batch.pair_ids.tolist()) == list(range(index.size))
    assert len(seen) == -(-index.size // 50)
    captions = [c for i in range(len(data)) for c in data.read(i).info["captions"]]
    texts = {i: e["text"] for _, batch in seen for i, e in zip(batch.pair_ids.tolist(), batch.entries, strict=True)}
    assert [texts[i] for i in range(index.size)] == captions


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_in_a_worker_is_one_line(small_dir, tokenizer, workers):
    row = np.load(small_dir / "train-000002.npy")[1]
    flip_byte(small_dir / "train-000002.tar", int(row["offset"]) + 600)
    data = ShardSet(small_dir, "train")
    plan = plan_of(data, global_batch=10)
    loader = train_loader(plan, maker_of(data, tokenizer), start_step=0, total_steps=plan.steps(1), workers=workers)
    with pytest.raises(DataError, match=r"train-000002.tar: the bytes of sample '\S+' differ") as caught:
        list(loader)
    assert "\n" not in str(caught.value) and "Traceback" not in str(caught.value)
    assert type(caught.value) is DataError


def test_a_shard_that_vanishes_while_training_is_one_line(small_dir, tokenizer):
    data = ShardSet(small_dir, "train")
    plan = plan_of(data, global_batch=10)
    (small_dir / "train-000001.tar").unlink()
    with pytest.raises(DataError, match="missing file: .*train-000001.tar"):
        list(train_loader(plan, maker_of(data, tokenizer), start_step=0, total_steps=plan.steps(1), workers=1))


def test_skipped_samples_come_with_the_batches(small_dir, tokenizer):
    row = np.load(small_dir / "val-000000.npy")[2]
    flip_byte(small_dir / "val-000000.tar", int(row["offset"]) + 600)
    data = ShardSet(small_dir, "val")
    plan = EvalPlan(PairIndex(data.counts("captions")), seed=0, batch=16)
    maker = maker_of(data, tokenizer, on_bad_sample="skip")
    batches = list(eval_loader(plan, maker, workers=1))
    assert sum(len(batch.pairs) for batch in batches) == plan.pairs - int(data.counts("captions")[2])
    assert {key for batch in batches for key in batch.skipped} == {"val-000000.tar: bytes differ from the index"}


def test_batches_move_as_a_whole(expected):
    moved = expected[0].map(lambda tensor: tensor.clone())
    same(moved, expected[0])
    assert dataclasses.asdict(moved).keys() == dataclasses.asdict(expected[0]).keys()
    assert moved.images is not expected[0].images
