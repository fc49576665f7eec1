import io
import json
import os
import pickle
import re
import tarfile
import tracemalloc
import zlib

import numpy as np
import pytest
import webdataset
from PIL import Image

from bt.data import shards as shards_module
from bt.data.shards import BadSample, ShardSet, ShardWriter
from bt.errors import DataError
from tests.data.helpers import flip_byte, truncate


def edit_index(folder, change) -> None:
    path = folder / "index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


def test_samples_are_the_raw_files(train_set, raw):
    questions = json.loads((raw / "train" / "questions.json").read_text())
    assert len(train_set) == 3600
    for number in (0, 499, 500, 3599):  # both sides of a border between shards
        sample = train_set.read(number)
        image = int(sample.key.removeprefix("train-"))
        assert sample.key == train_set.key(number)
        assert sample.images == {"image": (raw / "train" / "images" / f"{image}.png").read_bytes()}
        asked = [[q["question"], *q["answers"], image] for q in sample.info["questions"]]
        assert asked == [q for q in questions if q[2] == image]
        assert all(questions[q["id"]] == line for q, line in zip(sample.info["questions"], asked, strict=True))


def test_counts_are_those_of_the_json(train_set):
    captions, questions = train_set.counts("captions"), train_set.counts("questions")
    assert (captions.sum(), questions.sum()) == (11279, 34676)
    for number in range(0, 3600, 97):
        info = train_set.read(number).info
        assert (captions[number], questions[number]) == (len(info["captions"]), len(info["questions"]))
    with pytest.raises(DataError, match="'statements' is not in .*: known are captions, questions"):
        train_set.counts("statements")


def test_webdataset_reads_the_shards(data_dir, train_set):
    urls = [str(data_dir / f"train-{number:06d}.tar") for number in (0, 7)]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode("pil"))
    assert [s["__key__"] for s in samples] == [train_set.key(i) for i in [*range(500), *range(3500, 3600)]]
    ours = train_set.read(3)
    assert samples[3]["json"] == ours.info
    assert np.array_equal(samples[3]["png"], Image.open(io.BytesIO(ours.images["image"])).convert("RGB"))


def test_tar_headers_hold_nothing_that_changes(data_dir):
    with tarfile.open(data_dir / "val-000000.tar") as tar:
        members = tar.getmembers()
    assert len(members) == 800
    assert {(m.mtime, m.uid, m.gid, m.uname, m.mode) for m in members} == {(0, 0, 0, "", 0o644)}


def test_images_with_names_and_any_bytes(tmp_path):
    writer = ShardWriter(tmp_path, "dev", ["captions"], 2)
    images = {"left.jpg": bytes(range(256)) * 3, "right.png": b""}
    writer.add("a-1", images, {"captions": ["ünï", "b"]})
    writer.add("a-2", {"jpg": b"x" * 512}, {"captions": []})
    writer.add("a-3", {}, {"captions": ["text only"]})
    writer.close()
    assert [(s.name, s.samples, s.texts) for s in writer.shards] == [
        ("dev-000000.tar", 2, {"captions": 2}),
        ("dev-000001.tar", 1, {"captions": 1}),
    ]
    with tarfile.open(tmp_path / "dev-000000.tar") as tar:
        assert tar.getnames() == ["a-1.json", "a-1.left.jpg", "a-1.right.png", "a-2.json", "a-2.jpg"]
    with open(tmp_path / "dev-000000.tar", "rb") as file:
        row = np.load(tmp_path / "dev-000000.npy")[0]
        members = shards_module._members(file.read(int(row["size"])))
    assert members["a-1.left.jpg"] == images["left.jpg"] and members["a-1.right.png"] == b""
    assert json.loads(members["a-1.json"]) == {"captions": ["ünï", "b"]}


@pytest.mark.parametrize("key", ["a.b", "a/b", "", "é", "x" * 65])
def test_keys_that_webdataset_would_split_are_refused(tmp_path, key):
    with pytest.raises(DataError, match="sample key"):
        ShardWriter(tmp_path, "train", ["captions"], 2).add(key, {}, {"captions": ["x"]})


def test_a_flipped_byte_is_found_on_reading(small_dir):
    row = np.load(small_dir / "train-000001.npy")[4]
    flip_byte(small_dir / "train-000001.tar", int(row["offset"]) + 1500)
    data = ShardSet(small_dir, "train")
    for number in range(len(data)):
        if number != 14:
            data.read(number)
    message = f"train-000001.tar: the bytes of sample '{row['key'].decode()}' differ from the index (CRC-32)"
    with pytest.raises(BadSample, match=re.escape(message)) as caught:
        data.read(14)
    assert "\n" not in str(caught.value)
    assert (caught.value.shard, caught.value.reason) == ("train-000001.tar", "bytes differ from the index")


def test_damage_is_found_when_opening(small_dir):
    def fails(pattern: str) -> None:
        with pytest.raises(DataError, match=pattern) as caught:
            ShardSet(small_dir, "train")
        assert "\n" not in str(caught.value)

    shard, table = small_dir / "train-000002.tar", small_dir / "train-000002.npy"
    whole, size = shard.read_bytes(), shard.stat().st_size
    truncate(shard, 700)
    fails(rf"truncated file: .*train-000002.tar has {size - 700} bytes, the index says {size}")
    shard.write_bytes(whole + b"x")
    fails(rf"train-000002.tar differs from the index: it has {size + 1} bytes")
    shard.unlink()
    fails("missing file: .*train-000002.tar")
    shard.write_bytes(whole)
    rows = table.read_bytes()
    truncate(table, 10)
    fails("truncated file: .*train-000002.npy")
    table.write_bytes(bytes(len(rows)))
    fails("train-000002.npy is not a table")
    table.write_bytes(rows)
    ShardSet(small_dir, "train")


def test_the_table_of_another_shard_is_found_on_reading(small_dir):
    """Opening cannot tell: tables of shards with as many samples have the same size."""
    first, second = small_dir / "train-000002.npy", small_dir / "train-000003.npy"
    one, other = first.read_bytes(), second.read_bytes()
    first.write_bytes(other)
    second.write_bytes(one)
    data = ShardSet(small_dir, "train")
    for number in range(len(data)):
        if 20 <= number < 40:
            with pytest.raises(BadSample, match=r"differ from the index \(CRC-32\)"):
                data.read(number)
        else:
            data.read(number)


@pytest.mark.parametrize(
    "span",
    [
        shards_module._member("x.png", b"pixels"),
        shards_module._member("x.json", b"{not json"),
        shards_module._member("x.json", b"[1]"),
        shards_module._member("x.json", b"\xff\xfe"),
        shards_module._member("x.json", b"[" + b"1," * 400)[:1024],
        bytes(1024),
        b"",
    ],
    ids=["no json file", "no json", "no object", "no text", "cut", "zeros", "empty"],
)
def test_malformed_samples_are_bad_samples(small_dir, span):
    """Their bytes are those of the index, so that it was written by something else."""
    path = small_dir / "train-000001.npy"
    table = np.load(path)
    shard = small_dir / "train-000001.tar"
    data = bytearray(shard.read_bytes())
    offset = int(table["offset"][4])
    data[offset : offset + len(span)] = span
    shard.write_bytes(data)
    table["size"][4], table["crc32"][4] = len(span), zlib.crc32(span)
    np.save(path, table, allow_pickle=False)
    opened = ShardSet(small_dir, "train")
    with pytest.raises(BadSample, match="train-000001.tar: sample '.*' is not a .json followed by") as caught:
        opened.read(14)
    assert (caught.value.shard, caught.value.reason) == ("train-000001.tar", "malformed sample")
    assert opened.read(15).key == opened.key(15)


def test_a_table_of_other_data_is_refused(small_dir):
    def one_more(index):
        index["splits"]["train"]["shards"][0]["samples"] += 1

    edit_index(small_dir, one_more)
    with pytest.raises(DataError, match="train-000000.npy does not belong to the index"):
        ShardSet(small_dir, "train")


def test_bad_indexes(small_dir, tmp_path):
    with pytest.raises(DataError, match="no data set in .*nowhere.*index.json is missing"):
        ShardSet(tmp_path / "nowhere", "train")
    with pytest.raises(DataError, match="no split 'dev': .*shards has train, val, test"):
        ShardSet(small_dir, "dev")
    whole = (small_dir / "index.json").read_text()
    edit_index(small_dir, lambda index: index.update(version=99))
    with pytest.raises(DataError, match="index.json has version 99, this program reads version 1"):
        ShardSet(small_dir, "train")
    (small_dir / "index.json").write_text(whole[:500])
    with pytest.raises(DataError, match="index.json is not an index"):
        ShardSet(small_dir, "train")
    (small_dir / "index.json").write_text(whole.replace("train-000001.tar", "../train-000001.tar"))
    with pytest.raises(DataError, match="index.json is damaged"):
        ShardSet(small_dir, "train")
    (small_dir / "index.json").write_text(whole.replace('"sha256"', '"sha"'))
    with pytest.raises(DataError, match="index.json is damaged"):
        ShardSet(small_dir, "train")


def test_several_data_sets_are_one(small_dir, data_dir):
    both = ShardSet([small_dir, data_dir], "val")
    first, second = ShardSet(small_dir, "val"), ShardSet(data_dir, "val")
    assert len(both) == 6 + 400
    assert both.counts("captions").tolist() == [*first.counts("captions"), *second.counts("captions")]
    assert both.read(5) == first.read(5) and both.read(6) == second.read(0)
    edit_index(small_dir, lambda index: index["labels"].update(answers=["yes", "no"]))
    with pytest.raises(DataError, match="labels 'answers' differ"):
        ShardSet([small_dir, data_dir], "val")


def test_open_files_are_bounded(small_dir, monkeypatch):
    monkeypatch.setattr(shards_module, "_OPEN_FILES", 2)
    data = ShardSet(small_dir, "train")
    before = len(os.listdir("/proc/self/fd"))
    keys = [data.read(number).key for number in [*range(len(data)), *range(0, len(data), 10)]]
    assert len(os.listdir("/proc/self/fd")) <= before + 2
    assert keys[-1] == data.key(50)


def test_a_copy_in_another_process_reads_the_same(small_dir):
    data = ShardSet(small_dir, "train")
    data.read(0)
    copy = pickle.loads(pickle.dumps(data))
    assert copy.read(17) == data.read(17)


def test_reading_everything_holds_tables_alone(data_dir):
    data = ShardSet(data_dir, "train")
    tracemalloc.start()
    size = sum(len(data.read(number).images["image"]) for number in range(len(data)))
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert size > 1e6
    assert kept < 100_000 and peak < 200_000
