import multiprocessing

import pytest

from bt.data import index as index_file
from bt.data.shards import ShardSet
from bt.data.verify import verify
from bt.errors import ConfigError, DataError
from bt.samples.offline import NAMES, offline_shards

SPLITS = {
    "coco_karpathy": ["train", "restval", "val", "test"],
    "flickr30k_karpathy": ["train", "val", "test"],
    "visual_genome": ["train"],
    "sbu": ["train"],
    "cc3m": ["train", "val"],
    "vqav2": ["train", "val", "test", "test-dev"],
    "vgqa": ["train", "val"],
    "nlvr2": ["train", "dev", "test1"],
    "snli_ve": ["train", "dev", "test"],
    "cifar10": ["train", "test"],
    "cifar100": ["train", "test"],
    "glue_mnli": ["train", "dev_matched", "dev_mismatched", "test_matched", "test_mismatched"],
    "glue_stsb": ["train", "dev", "test"],
    "easy_vqa": ["train", "val", "test"],
}
FIELD = {"coco_karpathy": "captions", "vqav2": "questions", "nlvr2": "statements", "snli_ve": "hypotheses"}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("offline")
    return {name: offline_shards(name, folder) for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_all_splits_and_whole_shards(made, name):
    assert made[name].name == name and verify(made[name]) == []
    index = index_file.parse((made[name] / index_file.NAME).read_text(), name)
    assert list(index.splits) == SPLITS.get(name, ["train", "val", "test"] if "csv" in name else SPLITS["glue_stsb"])
    assert all(index.samples(split) >= 2 for split in index.splits) and index.source == name
    assert index.samples("train") <= 64
    train = ShardSet(made[name], "train")
    if name in FIELD:
        assert sum(train.counts(FIELD[name])) >= 20
    assert set(train.read(0).images) == (
        {"left", "right"} if name == "nlvr2" else set() if "glue" in name else {"image"}
    )


def test_classes(made):
    labels = {name: ShardSet(made[name], "train").labels for name in NAMES}
    assert len(labels["cifar10"]["classes"]) == 10 and len(set(labels["cifar100"]["classes"])) == 100
    assert {"yes", "no", "triangle", "3"} <= set(labels["vqav2"]["answers"])
    assert labels["vgqa"]["answers"] == labels["vqav2"]["answers"]
    types = {entry["type"] for n in range(16) for entry in ShardSet(made["vqav2"], "train").read(n).info["questions"]}
    assert types == {"yes/no", "number", "other"}


def test_made_once(made, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in made["nlvr2"].iterdir()}
    assert offline_shards("nlvr2", made["nlvr2"].parent) == made["nlvr2"]
    assert {path: path.stat().st_mtime_ns for path in made["nlvr2"].iterdir()} == before
    assert [path.name for path in made["nlvr2"].parent.iterdir() if path.name.startswith(".")] == []


def test_several_processes_at_once(tmp_path):
    """Whoever is later finds the shards of the first, whole."""
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=offline_shards, args=("nlvr2", tmp_path)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert verify(tmp_path / "nlvr2") == [] and [path.name for path in tmp_path.iterdir()] == ["nlvr2"]


def test_mistakes_are_one_line(tmp_path):
    with pytest.raises(
        ConfigError, match="no offline samples of imagenet: there are coco_karpathy, flickr30k_karpathy"
    ):
        offline_shards("imagenet", tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot make samples of sbu in .*file: Not a directory"):
        offline_shards("sbu", tmp_path / "file")
