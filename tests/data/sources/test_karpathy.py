import json

import pytest

from bt.data.sources.karpathy import CocoKarpathy, Flickr30kKarpathy
from bt.data.write import Limits, convert
from bt.errors import ConfigError, DataError
from tests.data.sources.raw_trees import first_batch, jpeg, put, samples_of, words

# Split and folder of COCO's images 0, 1, ... in the order of the file: splits are mixed, as in the official one.
COCO = [("test", "val"), ("train", "train"), ("restval", "val"), ("val", "val"), ("train", "train"), ("restval", "val")]


def coco_name(number: int, folder: str) -> str:
    return f"COCO_{folder}2014_{number:012d}.jpg"


def entry(name: str, split: str, number: int, **more) -> dict:
    sentences = [{"raw": text, "tokens": text.split(), "sentid": i} for i, text in enumerate(words(number, 5))]
    return {"filename": name, "split": split, "imgid": number, "sentences": sentences, **more}


@pytest.fixture
def coco(tmp_path):
    raw = tmp_path / "coco"
    entries = []
    for number, (split, folder) in enumerate(COCO):
        name = coco_name(number, folder)
        put(raw / f"{folder}2014" / name, jpeg(number))
        entries.append(entry(name, split, number, filepath=f"{folder}2014", cocoid=number))
    put(raw / "karpathy/dataset_coco.json", {"images": entries, "dataset": "coco"})
    return raw


def test_coco_from_raw_files_to_a_batch(coco, tmp_path):
    source = CocoKarpathy(str(coco))
    assert source.count() == 6
    index, _ = convert(source, tmp_path / "out")
    assert {split: index.samples(split) for split in index.splits} == {"train": 2, "restval": 2, "val": 1, "test": 1}
    assert index.texts("restval") == {"captions": 10} and index.skipped == {}
    train = samples_of(tmp_path / "out", "train")
    assert list(train) == ["COCO_train2014_000000000001", "COCO_train2014_000000000004"]
    for number, sample in zip((1, 4), train.values(), strict=True):
        assert sample.images == {"image": jpeg(number)}  # the original bytes
        assert sample.info == {"captions": words(number, 5), "image_id": number}
    batch = first_batch(tmp_path / "out", "train", "captions")
    texts = {"COCO_train2014_000000000001": words(1, 5), "COCO_train2014_000000000004": words(4, 5)}
    assert len(batch.entries) == 4
    for (image, _), shown in zip(batch.pairs.tolist(), batch.entries, strict=True):
        assert shown["text"] in texts[batch.keys[image]]


def test_only_what_is_wanted_must_be_there(coco):
    for path in (coco / "train2014").iterdir():
        path.unlink()
    (coco / "train2014").rmdir()
    source = CocoKarpathy(str(coco), "test")
    (sample,) = source.samples(print)
    assert source.count() == 1 and sample.images[""].read_bytes() == jpeg(0)
    with pytest.raises(ConfigError, match="split=dev: coco_karpathy has train, restval, val, test"):
        CocoKarpathy(str(coco), "dev")


def test_flickr(tmp_path):
    entries = [
        entry(f"{number}.jpg", split, number) for number, split in [(36979, "train"), (7, "val"), (8, "train")][1:]
    ]
    entries.insert(0, {**entry("36979.jpg", "train", 3), "imgid": 0})
    for number, name in [(3, "36979.jpg"), (7, "7.jpg"), (8, "8.jpg")]:
        put(tmp_path / "raw/flickr30k-images" / name, jpeg(number))
    put(tmp_path / "raw/karpathy/dataset_flickr30k.json", {"dataset": "flickr30k", "images": entries})
    index, _ = convert(Flickr30kKarpathy(str(tmp_path / "raw")), tmp_path / "out")
    assert list(index.splits) == ["train", "val"]
    train = samples_of(tmp_path / "out", "train")
    assert list(train) == ["36979", "8"]
    assert train["36979"].info == {"captions": words(3, 5), "image_id": "36979"}
    assert train["36979"].images["image"] == jpeg(3)


def test_damage_is_counted(coco, tmp_path):
    path = coco / "karpathy/dataset_coco.json"
    data = json.loads(path.read_text())
    (coco / "train2014" / coco_name(1, "train")).unlink()
    broken = [
        {"filename": "x.jpg", "split": "train"},
        7,
        entry("y.jpg", "hidden", 3),
        entry(coco_name(4, "train"), "train", 5),
    ]
    data["images"] += [*broken, {**entry("z.jpg", "val", 1), "sentences": [{"raw": None}]}]
    path.write_text(json.dumps(data))
    index, _ = convert(CocoKarpathy(str(coco)), tmp_path / "out")
    assert index.skipped == {"malformed entry": 3, "unknown split": 1, "missing image": 1, "duplicate key": 1}
    assert samples_of(tmp_path / "out", "train")["COCO_train2014_000000000004"].info["captions"] == words(4, 5)


def test_a_byte_order_mark_says_nothing(coco):
    path = coco / "karpathy/dataset_coco.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert len(list(CocoKarpathy(str(coco)).samples(print))) == len(COCO)


def test_a_caption_that_is_not_utf_8_is_left_out_alone(coco, tmp_path):
    """Two of five captions of one image, all of another."""
    path = coco / "karpathy/dataset_coco.json"
    data = json.loads(path.read_text())
    for number in (0, 1):
        data["images"][4]["sentences"][number]["raw"] += " café"
    for sentence in data["images"][1]["sentences"]:
        sentence["raw"] += " café"
    data["images"][3]["sentences"][0]["raw"] += " ☕"
    path.write_bytes(json.dumps(data, ensure_ascii=False).encode().replace("é".encode(), b"\xe9"))
    index, _ = convert(CocoKarpathy(str(coco)), tmp_path / "out")
    assert index.skipped == {"text is not unicode": 1, "text is not unicode (captions)": 2}
    train = samples_of(tmp_path / "out", "train")
    assert {key: sample.info["captions"] for key, sample in train.items()} == {
        "COCO_train2014_000000000004": words(4, 5)[2:]
    }
    (val,) = samples_of(tmp_path / "out", "val").values()
    assert val.info["captions"][0] == words(3, 1)[0] + " ☕"
    with pytest.raises(DataError, match="sample 'COCO_train2014_000000000001' of train: text is not unicode"):
        convert(CocoKarpathy(str(coco)), tmp_path / "stops", limits=Limits("fail"))


@pytest.mark.parametrize("name", ["null\0.jpg", "half\ud800.jpg", "a/" * 3000 + "b.jpg", "a" * 300 + ".jpg"])
def test_names_that_no_file_can_have(coco, tmp_path, name):
    path = coco / "karpathy/dataset_coco.json"
    data = json.loads(path.read_text())
    data["images"].append(entry(name, "train", 5))
    path.write_text(json.dumps(data))
    index, _ = convert(CocoKarpathy(str(coco)), tmp_path / "out")
    assert index.skipped == {"image cannot be read" if len(name) > 200 else "missing image": 1}
    assert index.samples("train") == 2


def test_broken_files_are_one_line(coco):
    path = coco / "karpathy/dataset_coco.json"
    text = path.read_bytes()

    def message(content: bytes) -> str:
        path.write_bytes(content)
        with pytest.raises(DataError) as caught:
            next(CocoKarpathy(str(coco)).samples(print))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert f"cannot read the raw file {path}: Unterminated string" in message(text[:700])
    assert message(text[:-30]).startswith(f"cannot read the raw file {path}: ")
    assert f"{path}: expected {{ (character 0)" in message(b"[]")
    assert f"{path}: its object has no list 'images'" in message(b'{"dataset": "coco"}')
    assert f"{path}: its object has no list 'images'" in message(b" { } ")
    assert f"{path}: expected {{ (character 0)" in message(json.dumps({"images": []}).encode("utf-16"))
    path.unlink()
    with pytest.raises(DataError, match=f"missing raw file: {path}"):
        next(CocoKarpathy(str(coco)).samples(print))
    with pytest.raises(DataError, match="missing raw folder: .*nowhere/train2014 or .*nowhere/val2014"):
        next(CocoKarpathy(str(coco / "nowhere")).samples(print))
