import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from bt.data.collate import BatchMaker
from bt.data.draft import Draft, Needs
from bt.data.plan import Cut, PairIndex, TrainPlan
from bt.data.shards import BadSample, ShardSet
from bt.data.sources.easy_vqa import EasyVQA
from bt.data.transforms import make_transform
from bt.data.write import convert
from bt.errors import ConfigError, DataError
from tests.data.helpers import flip_byte


def maker_of(shards, tokenizer, field="questions", **options) -> BatchMaker:
    index = PairIndex(shards.counts(field))
    return BatchMaker(
        shards,
        index,
        text_field=field,
        tokenizer=tokenizer,
        transform=make_transform("clip", 64),
        **{"seed": 5, "max_text_len": 20, **options},
    )


class Keep:
    """A target maker that shows the draft."""

    def __call__(self, draft: Draft) -> dict:
        self.draft = draft
        return {"marks": torch.from_numpy(draft.uniform("marks", 2))}


def cut_of(pairs, match=None, epochs=None) -> Cut:
    pairs = np.array(pairs)
    match = np.ones(len(pairs), bool) if match is None else np.array(match)
    return Cut(pairs, np.zeros(len(pairs), np.int64) if epochs is None else epochs, match)


def test_a_batch_holds_the_raw_data(train_set, tokenizer, raw):
    questions = json.loads((raw / "train" / "questions.json").read_text())
    plan = TrainPlan(PairIndex(train_set.counts("questions")), train_set.starts, seed=1, global_batch=64)
    batch = maker_of(train_set, tokenizer)(plan.cut(3))
    assert len(batch.pairs) == len(batch.entries) == 64
    assert 5 <= len(batch.images) == len(set(batch.keys)) < 20  # an image's questions stay together
    for row, key in enumerate(batch.keys):
        pixels = Image.open(raw / "train" / "images" / f"{int(key[6:])}.png").convert("RGB")
        assert np.array_equal(batch.images[row].permute(1, 2, 0), pixels)
        assert train_set.key(int(batch.image_ids[row])) == key
    for (image, text), entry in zip(batch.pairs.tolist(), batch.entries, strict=True):
        question, answer, number = questions[entry["id"]]
        assert number == int(batch.keys[image][6:])
        assert entry["question"] == question and entry["answers"] == {answer: 1.0}
        ids = batch.texts.ids[text][batch.texts.mask[text]].tolist()
        assert ids == tokenizer.encode([question], 20)[0]
    assert len({tuple(row) for row in batch.texts.ids.tolist()}) == len(batch.texts.ids)  # each text once
    assert batch.texts.mask.any(0).all()  # as long as the longest
    assert torch.equal(batch.pair_ids, torch.from_numpy(plan.cut(3).pairs))


def test_captions_are_strings_in_entries(train_set, tokenizer):
    batch = maker_of(train_set, tokenizer, "captions")(cut_of([0, 1]))
    captions = train_set.read(0).info["captions"]
    assert batch.entries == [{"text": caption} for caption in captions]
    assert batch.pairs[:, 0].tolist() == [0, 0] and len(batch.images) == 1


def test_false_images_are_those_of_other_samples(train_set, tokenizer):
    keep = Keep()
    maker = maker_of(train_set, tokenizer, "captions", targets={"itm": keep}, needs=[Needs(), Needs(false_images=True)])
    pairs = np.arange(100, 400)
    match = np.arange(300) % 3 == 0
    batch = maker(cut_of(pairs, match))
    rows = keep.draft.false_image_rows
    assert (rows[match] == -1).all() and (rows[~match] >= 0).all()
    true = maker.index.sample_of(pairs)
    false = batch.image_ids.numpy()[rows[~match]]
    assert (false != true[~match]).all()
    assert len(set(false.tolist())) > 180 and abs(false.mean() - 1800) < 250  # over the whole split
    number = int(np.nonzero(~match)[0][7])
    image = Image.open(io.BytesIO(train_set.read(int(batch.image_ids[rows[number]])).images["image"])).convert("RGB")
    assert np.array_equal(batch.images[rows[number]].permute(1, 2, 0), image)


def test_a_draw_of_the_true_image_is_repeated(small_dir, tokenizer):
    keep = Keep()
    maker = maker_of(ShardSet(small_dir, "val"), tokenizer, targets={"itm": keep}, needs=[Needs(false_images=True)])
    batch = maker(cut_of(np.arange(maker.index.size), np.zeros(maker.index.size, bool)))
    false = batch.image_ids.numpy()[keep.draft.false_image_rows]
    true = maker.index.sample_of(np.arange(maker.index.size))
    assert (false != true).all() and set(false.tolist()) == set(range(6))


def test_false_texts_are_those_of_other_samples(train_set, tokenizer):
    keep = Keep()
    maker = maker_of(train_set, tokenizer, "captions", targets={"x": keep}, needs=[Needs(false_texts=3)])
    batch = maker(cut_of(np.arange(40)))
    rows = keep.draft.false_text_rows
    assert rows.shape == (40, 3) and rows.min() >= 0
    drawn = {tokenizer.decode(batch.texts.ids[row].tolist()) for row in rows.ravel()}
    assert drawn <= set(train_set.all_texts()) and len(drawn) > 60
    assert len(batch.images) == len(set(maker.index.sample_of(np.arange(40))))  # their images are not read


@pytest.mark.parametrize("any_texts", [False, True])
def test_false_texts_are_false_unless_any_will_do(train_set, tokenizer, any_texts):
    """easy-VQA's captions are few sentences, so that other images often have an own caption's words."""
    keep, index = Keep(), PairIndex(train_set.counts("captions"), np.arange(24))
    maker = maker_of(
        train_set, tokenizer, "captions", targets={"x": keep}, needs=[Needs(false_texts=15, any_texts=any_texts)]
    )
    maker.index = index
    pairs = index.pair_at(np.arange(index.size))
    batch = maker(cut_of(pairs))
    captions = {number: train_set.read(number).info["captions"] for number in range(24)}
    own = [set(captions[owner]) for owner in index.sample_of(pairs).tolist()]
    everything = [text for texts in captions.values() for text in texts]
    string = {tuple(tokenizer.encode([text], 20)[0]): text for text in everything}
    texts = [string[tuple(ids[mask].tolist())] for ids, mask in zip(batch.texts.ids, batch.texts.mask, strict=True)]
    rows = keep.draft.false_text_rows
    assert rows.shape == (len(pairs), 15)
    true = np.array([[texts[row] in mine for row in drawn] for drawn, mine in zip(rows, own, strict=True)])
    share = np.mean([[text in mine for text in everything] for mine in own])
    assert share > 2 / 24, "some are of other images"
    if any_texts:
        assert true.mean() == pytest.approx(share, rel=0.15)
    else:
        assert not true.any() and len(set(rows.ravel())) > 0.8 * len(set(everything))


def test_draws_do_not_depend_on_the_slicing(train_set, tokenizer):
    """One rank, or three with two micro-batches each: each pair gets the same marks, labels and false image."""

    def drawn(world: int, accumulation: int) -> dict[tuple[int, int], tuple]:
        found = {}
        for rank in range(world):
            index = PairIndex(train_set.counts("captions"))
            plan = TrainPlan(
                index, train_set.starts, seed=2, global_batch=48, world=world, rank=rank, accumulation=accumulation
            )
            keep = Keep()
            maker = maker_of(train_set, tokenizer, "captions", targets={"x": keep}, needs=[Needs(false_images=True)])
            for micro in range(accumulation):
                cut = plan.cut(234 * accumulation + micro)  # this step crosses the end of epoch 0
                batch = maker(cut)
                rows = keep.draft.false_image_rows
                for i in range(len(cut.pairs)):
                    false = int(batch.image_ids[rows[i]]) if rows[i] >= 0 else -1
                    marks = tuple(batch.targets["x"]["marks"][i].tolist())
                    found[int(cut.epochs[i]), int(cut.pairs[i])] = (false, bool(cut.match[i]), marks)
        return found

    alone = drawn(1, 1)
    assert len(alone) == 48 and {epoch for epoch, _ in alone} == {0, 1}
    assert drawn(3, 2) == alone
    assert sum(match for _, match, _ in alone.values()) == 24


def test_augmented_images_do_not_depend_on_the_slicing(train_set, tokenizer):
    """One rank, or three with two micro-batches: each pair has the same image, and the same false one, drawn anew in
    each epoch and for each false image; all texts of an image share one."""

    def drawn(world: int, accumulation: int) -> dict[tuple[int, int], tuple]:
        found = {}
        for rank in range(world):
            index = PairIndex(train_set.counts("captions"), np.arange(12))
            plan = TrainPlan(
                index, train_set.starts, seed=2, global_batch=48, world=world, rank=rank, accumulation=accumulation
            )
            keep = Keep()
            maker = BatchMaker(
                train_set,
                index,
                text_field="captions",
                tokenizer=tokenizer,
                transform=make_transform("blip_randaug", 32),
                seed=5,
                targets={"x": keep},
                needs=[Needs(false_images=True)],
            )
            step = index.size // 48  # the end of epoch 0 is in this step
            for micro in range(accumulation):
                cut = plan.cut(step * accumulation + micro)
                batch = maker(cut)
                assert len(batch.keys) == len(batch.image_ids) == len(batch.images)
                for i in range(len(cut.pairs)):
                    own, false = int(batch.pairs[i, 0]), int(keep.draft.false_image_rows[i])
                    assert batch.image_ids[own] == index.sample_of(cut.pairs[i : i + 1])[0]
                    images = [batch.images[row].numpy().tobytes() for row in (own, false) if row >= 0]
                    found[int(cut.epochs[i]), int(cut.pairs[i])] = (int(batch.image_ids[own]), *images)
        return found

    alone = drawn(1, 1)
    assert len(alone) == 48 and {epoch for epoch, _ in alone} == {0, 1}
    assert drawn(3, 2) == alone
    own = {(epoch, image): pixels for (epoch, _), (image, pixels, *_) in alone.items()}
    assert all(own[epoch, image] == pixels for (epoch, _), (image, pixels, *_) in alone.items())
    both = {image for _, image in own if (0, image) in own and (1, image) in own}
    assert both and all(own[0, image] != own[1, image] for image in both)
    false = [rest[0] for _, _, *rest in alone.values() if rest]
    assert len(set(false)) == 24 and not set(false) & set(own.values())


def test_draws_change_with_epoch_and_seed(train_set, tokenizer):
    marks = []
    for seed, epoch in ((5, 0), (5, 1), (6, 0)):
        maker = maker_of(train_set, tokenizer, seed=seed, targets={"x": Keep()})
        marks.append(maker(cut_of([3], epochs=np.array([epoch]))).targets["x"]["marks"][0, 0].item())
    assert len(set(marks)) == 3


@pytest.fixture
def damaged(small_dir):
    """Sample 3 of the validation split has wrong bytes."""
    row = np.load(small_dir / "val-000000.npy")[3]
    flip_byte(small_dir / "val-000000.tar", int(row["offset"]) + 600)
    return ShardSet(small_dir, "val")


def test_bad_samples_stop_or_are_left_out(damaged, tokenizer):
    index = PairIndex(damaged.counts("questions"))
    everything = cut_of(np.arange(index.size), np.arange(index.size) % 2 == 0)
    with pytest.raises(BadSample, match="val-000000.tar: the bytes of sample 'val-000030' differ"):
        maker_of(damaged, tokenizer)(everything)
    keep = Keep()
    skipping = maker_of(
        damaged, tokenizer, on_bad_sample="skip", targets={"x": keep}, needs=[Needs(false_images=True, false_texts=1)]
    )
    batch = skipping(everything)
    assert batch.skipped == {"val-000000.tar: bytes differ from the index": 1}
    good = [pair for pair in range(index.size) if index.sample_of(np.array([pair]))[0] != 3]
    assert batch.pair_ids.tolist() == good and len(batch.entries) == len(good)
    assert keep.draft.match.tolist() == [pair % 2 == 0 for pair in good]
    assert 3 not in batch.image_ids.tolist()
    assert "val-000030" not in batch.keys
    whole = maker_of(damaged, tokenizer, targets={"x": Keep()})(cut_of(good))
    assert torch.equal(whole.targets["x"]["marks"], batch.targets["x"]["marks"])  # the rest is not shifted
    bad = np.nonzero(index.sample_of(np.arange(index.size)) == 3)[0]
    with pytest.raises(DataError, match="all samples of a batch are bad: val-000000.tar"):
        skipping(cut_of(bad))
    training = maker_of(damaged, tokenizer, on_bad_sample="skip", substitute=True)
    drawn, again = training(cut_of(bad)), training(cut_of(bad[:1]))
    assert len(drawn.pairs) == 1 and 3 not in drawn.image_ids.tolist() and drawn.skipped == batch.skipped
    assert torch.equal(drawn.pair_ids, again.pair_ids) and torch.equal(drawn.images, again.images)


def test_an_undecodable_image_is_a_bad_sample(small_dir, tokenizer, monkeypatch):
    data = ShardSet(small_dir, "val")
    read = data.read

    def with_half_an_image(number):
        sample = read(number)
        if number == 1:
            sample.images["image"] = sample.images["image"][:90]
        return sample

    monkeypatch.setattr(data, "read", with_half_an_image)
    with pytest.raises(BadSample, match="the image of sample 'val-000010' cannot be decoded"):
        maker_of(data, tokenizer)(cut_of(np.arange(20)))
    batch = maker_of(data, tokenizer, on_bad_sample="skip")(cut_of(np.arange(20)))
    assert batch.skipped == {"val-000000.tar: image cannot be decoded": 1}


def test_what_cannot_work_is_said_at_once(train_set, tokenizer, small_raw, tmp_path):
    with pytest.raises(ConfigError, match="on_bad_sample=ignore: allowed are fail, skip"):
        maker_of(train_set, tokenizer, on_bad_sample="ignore")
    index = PairIndex(train_set.counts("captions"), np.array([4]))
    with pytest.raises(DataError, match="need at least two images"):
        BatchMaker(
            train_set,
            index,
            text_field="captions",
            tokenizer=tokenizer,
            transform=make_transform("clip", 64),
            seed=0,
            needs=[Needs(false_images=True)],
        )


def test_grey_images(small_raw, tokenizer, tmp_path):
    convert(EasyVQA(str(small_raw)), tmp_path / "grey")
    data = ShardSet(tmp_path / "grey", "val")
    index = PairIndex(data.counts("questions"))
    grey = BatchMaker(
        data, index, text_field="questions", tokenizer=tokenizer, transform=make_transform("clip", 32, 1), seed=0
    )
    assert grey(cut_of([0, 20])).images.shape == (2, 1, 32, 32)
