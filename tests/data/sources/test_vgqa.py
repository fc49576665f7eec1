import json
import random
from collections import Counter

import pytest

from bt.data.shards import ShardSet
from bt.data.sources.vgqa import VGQA, split_images
from bt.data.sources.vqav2 import VQAv2
from bt.data.write import convert
from bt.errors import ConfigError, DataError
from tests.data.sources.labelled import converted, vgqa_tree, vqav2_tree


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return vgqa_tree(vqav2_tree(tmp_path_factory.mktemp("vgqa")))


def test_the_official_split():
    """Against the steps of the official script with Python's global random numbers, at a size where they matter."""
    images = [(n, 2 * n if n % 5 < 2 else None) for n in range(25_000)]
    karpathy = {"train": set(range(0, 12_000)), "val": set(range(12_000, 20_000)), "test": set(range(20_000, 30_000))}
    remainder = [image for image, coco in images if not coco or coco >= 30_000]
    random.seed(0)
    random.shuffle(remainder)
    test = {image for image, coco in images if coco and coco in karpathy["test"]}
    val = {image for image, coco in images if coco and coco in karpathy["val"]}
    assert len(test) == 2000 and len(val) == 1600
    test |= set(remainder[-3000:])
    val |= set(remainder[-6400:-3000])
    splits = split_images(images, karpathy)
    assert splits["test"] == test and splits["val"] == val
    assert splits["train"] == set(range(25_000)) - test - val


def test_questions_answers_and_images(tree, tmp_path):
    entries = json.loads((tree / "vg/annotations/question_answers.json").read_text())
    raw = {qa["qa_id"]: qa for entry in entries for qa in entry["qas"]}
    samples, skipped, data = converted(VGQA(str(tree)), tmp_path / "all", "train")
    # 20 images: those outside COCO, few as they are, all go to test.
    assert list(samples) == [f"VG_{n}" for n in range(1009, 999, -1) if n != 1006]
    for key, sample in samples.items():
        folder = "VG_100K" if int(key[3:]) % 2 else "VG_100K_2"
        assert sample.images["image"] == (tree / f"vg/images/{folder}/{key[3:]}.jpg").read_bytes()
        for entry in sample.info["questions"]:
            answer = raw[entry["id"]]["answer"].lower().strip(".").removeprefix("a ")
            assert entry == {"id": entry["id"], "question": raw[entry["id"]]["question"], "answers": {answer: 1.0}}
            assert raw[entry["id"]]["image_id"] == sample.info["image_id"] == int(key[3:])
            assert answer in data.labels["answers"]
    twice = [entry for entry in samples["VG_1004"].info["questions"] if entry["question"] == "What is it?"]
    assert [entry["answers"] for entry in twice] == [{"circle": 1.0}]
    assert "What is it?" not in {entry["question"] for entry in samples["VG_1003"].info["questions"]}
    assert skipped["question with several answers"] == 2 and skipped["repeated question"] == 1
    assert skipped["image in no split"] == 1
    val = ShardSet(tmp_path / "all", "val")
    assert [val.key(n) for n in range(len(val))] == [f"VG_{n}" for n in range(1019, 1009, -1)]
    kept = sum(data.counts("questions")) + sum(val.counts("questions"))
    no_class = skipped["question without an answer among the classes"]
    unknown = len([qa for qa in raw.values() if qa["image_id"] == 1099])
    assert kept + no_class + 2 + 1 + unknown == len(raw)


def test_images_of_coco_alone(tree):
    skipped = Counter()
    samples = list(VGQA(str(tree), coco_only=True).samples(lambda why: skipped.update([why])))
    assert [sample.key for sample in samples if sample.split == "val"] == ["VG_1013", "VG_1012", "VG_1011", "VG_1010"]
    assert skipped["image in no split"] == 7


def test_it_can_be_mixed_with_vqav2(tree, tmp_path):
    convert(VQAv2(str(tree), ["train"]), tmp_path / "vqav2")
    convert(VGQA(str(tree)), tmp_path / "vgqa")
    both = ShardSet([str(tmp_path / "vqav2"), str(tmp_path / "vgqa")], "train")
    assert len(both) == 30 + 9 and both.labels == VQAv2(str(tree)).labels()


def test_where_the_raw_files_are(tree, tmp_path):
    annotations = tree / "mscoco_flickr30k_vqav2_snli_ve/vqav2"
    source = VGQA(str(tree / "vg"), vqav2_dir=str(annotations))
    assert source.labels() == VGQA(str(tree)).labels() == VGQA(str(tree / "vg")).labels()
    assert source.options() == VGQA(str(tree)).options()  # places make no other data set
    with pytest.raises(DataError, match="missing raw file: .*v2_mscoco_train2014_annotations.json"):
        VGQA(str(tree / "vg"), vqav2_dir=str(tmp_path)).labels()
    with pytest.raises(DataError, match="missing raw file: .*vg/annotations/question_answers.json"):
        next(VGQA(str(tmp_path)).samples(print))
    with pytest.raises(ConfigError, match="source.answers.normalise=none: allowed are official, fixed"):
        VGQA(str(tree), answers={"normalise": "none"})
