"""Batches of the data sets that are not one image with texts: two images, texts alone, images alone."""

import json

import numpy as np
import pytest
import torch

from bt.data.dataset import train_loader
from bt.data.plan import PairIndex, TrainPlan
from bt.data.shards import ShardSet
from bt.data.sources.cifar import CIFAR10
from bt.data.sources.glue import GLUE
from bt.data.sources.nlvr2 import NLVR2
from bt.data.sources.snli_ve import SNLIVE
from bt.data.text import train_tokenizer
from bt.data.write import convert
from bt.errors import DataError
from tests.data.sources.labelled import nlvr2_tree, picture, snli_ve_tree
from tests.data.sources.test_cifar import cifar10_tree, pixels
from tests.data.sources.test_glue import tree as glue_tree
from tests.data.sources.test_glue import tsv
from tests.data.test_collate import maker_of


def batches(data: ShardSet, tokenizer, field: str | None, size: int, **options) -> list:
    plan = TrainPlan(PairIndex(data.counts(field)), data.starts, seed=3, global_batch=size, texts_per_image=1)
    return list(
        train_loader(plan, maker_of(data, tokenizer, field, **options), start_step=0, total_steps=plan.steps(1))
    )


def opened(source, out, split="train") -> ShardSet:
    convert(source, out)
    return ShardSet(str(out), split)


def test_two_images_of_a_statement(tmp_path):
    """Each pair's rows hold the raw left and right images; both sides belong to one sample."""
    data = opened(NLVR2(str(nlvr2_tree(tmp_path / "raw"))), tmp_path / "out")
    found = {}
    for batch in batches(data, train_tokenizer(data.all_texts()), "statements", 5):
        assert len(batch.images) == 2 * len(set(batch.keys)) and len(batch.second_images) == len(batch.pairs)
        for (left, text), right, entry in zip(
            batch.pairs.tolist(), batch.second_images.tolist(), batch.entries, strict=True
        ):
            number = int(batch.keys[left].split("-")[1])
            assert batch.keys[right] == batch.keys[left] and batch.image_ids[right] == batch.image_ids[left]
            for row, side in ((left, 0), (right, 1)):
                assert np.array_equal(batch.images[row].permute(1, 2, 0), np.array(picture(number + side)))
            assert batch.texts.mask[text].sum() == len(entry["text"].replace("?", " ?").split()) + 2
            found[entry["id"]] = entry["label"]
    lines = map(json.loads, (tmp_path / "raw/nlvr/nlvr2/data/train.json").read_text().splitlines())
    assert found == {line["identifier"]: int(line["label"] == "True") for line in lines}


def test_texts_of_two_segments_alone(tmp_path):
    glue_tree(tmp_path / "raw", "QNLI")
    data = opened(GLUE(str(tmp_path / "raw/QNLI"), task="qnli"), tmp_path / "out")
    _, rows = tsv("QNLI", False)
    assert list(data.all_texts()) == [text for one, two, _ in rows for text in (one, two)]
    tokenizer = train_tokenizer(data.all_texts())
    found = []
    for batch in batches(data, tokenizer, "sentences", 3):
        assert batch.images.shape == (0, 3, 64, 64) and batch.second_images is None
        assert (batch.pairs[:, 0] == -1).all() and batch.keys == []
        for row, entry in zip(batch.pairs[:, 1].tolist(), batch.entries, strict=True):
            one, two = (tokenizer.encode([entry[name]], 60)[0] for name in ("text", "text_pair"))
            joined = (one + [tokenizer.eos_id] + two[1:])[:20]  # <s> one </s> </s> two </s>
            whole = len(one) + len(two) <= 20
            assert batch.texts.ids[row][batch.texts.mask[row]].tolist() == (joined if whole else [*joined[:19], 2])
            found.append((entry["id"], entry["label"]))
    assert sorted(found) == [(n, int(label == "not_entailment")) for n, (_, _, label) in enumerate(rows)]


def test_labelled_images_alone(tmp_path):
    data = opened(CIFAR10(str(cifar10_tree(tmp_path / "raw"))), tmp_path / "out")
    tokenizer = train_tokenizer(["nothing"])
    seen = []
    for batch in batches(data, tokenizer, None, 8):
        assert batch.texts.ids.shape == (0, 0) and (batch.pairs[:, 1] == -1).all()
        for row, entry in zip(batch.pairs[:, 0].tolist(), batch.entries, strict=True):
            number = int(batch.keys[row].split("-")[1])
            raw = torch.from_numpy(pixels([number])[0]).float()
            # 32 pixels shown at 64: averages of four are the pixels but for the bicubic overshoot
            halved = batch.images[row].float().unfold(1, 2, 2).unfold(2, 2, 2).mean((-1, -2)).permute(1, 2, 0)
            assert (halved - raw).abs().mean() < 4 and entry == {"label": number % 10}
            seen.append(number)
    assert sorted(seen[:20]) == list(range(20))


def test_hypotheses_with_their_image(tmp_path):
    data = opened(SNLIVE(str(snli_ve_tree(tmp_path / "raw"))), tmp_path / "out")
    (batch,) = batches(data, train_tokenizer(data.all_texts()), "hypotheses", PairIndex(data.counts("hypotheses")).size)
    lines = (tmp_path / "raw/mscoco_flickr30k_vqav2_snli_ve/snli_ve/snli_ve_train.jsonl").read_text().splitlines()
    raw = [json.loads(line) for line in lines]
    names = ["contradiction", "neutral", "entailment"]
    wanted = sorted(
        (line["Flickr30K_ID"], line["sentence2"].strip(), names.index(line["gold_label"]))
        for line in raw
        if line["gold_label"] != "-"
    )
    keys = [batch.keys[row] for row in batch.pairs[:, 0].tolist()]
    assert sorted((key, e["text"], e["label"]) for key, e in zip(keys, batch.entries, strict=True)) == wanted


def test_one_and_two_images_do_not_mix(tmp_path, few_dir):
    nlvr2 = opened(NLVR2(str(nlvr2_tree(tmp_path / "raw"))), tmp_path / "two")
    both = ShardSet([str(few_dir), str(tmp_path / "two")], "train")
    tokenizer = train_tokenizer(nlvr2.all_texts())
    with pytest.raises(DataError, match="with 1 and with 2 images a sample cannot be mixed"):
        batches(both, tokenizer, None, len(both))
