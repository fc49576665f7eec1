import io
import json
import shutil
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from bt.data.sources.nlvr2 import NLVR2
from bt.errors import DataError
from tests.data.sources.labelled import converted, nlvr2_tree, picture, write_lines


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return nlvr2_tree(tmp_path_factory.mktemp("nlvr2"))


def raw(tree, name):
    return [json.loads(line) for line in (tree / "nlvr/nlvr2/data" / f"{name}.json").read_text().splitlines()]


def test_pairs_and_statements(tree, tmp_path):
    samples, skipped, data = converted(NLVR2(str(tree)), tmp_path / "out", "train")
    assert list(samples) == [f"train-{n}-0" for n in range(0, 20, 2)] and skipped == {}
    assert data.labels == {"classes": ["False", "True"]}
    for key, sample in samples.items():
        number = int(key.split("-")[1])
        for side, name in enumerate(("left", "right")):
            pixels = np.array(Image.open(io.BytesIO(sample.images[name])))
            assert np.array_equal(pixels, np.array(picture(number + side)))
    entries = [entry for sample in samples.values() for entry in sample.info["statements"]]
    assert entries == [
        {"id": line["identifier"], "text": line["sentence"], "label": int(line["label"] == "True")}
        for line in raw(tree, "train")
    ]
    assert len(entries) > len(samples) and {entry["label"] for entry in entries} == {0, 1}
    assert list(data.all_texts()) == [line["sentence"] for line in raw(tree, "train")]


def test_splits(tree):
    """Without a word train, dev and test1; the parts of dev take their images from dev."""
    source = NLVR2(str(tree))
    samples = list(source.samples(print))
    assert Counter(sample.split for sample in samples) == {"train": 10, "dev": 3, "test1": 3}
    assert source.count() == 16
    (balanced,) = NLVR2(str(tree), "balanced_dev").samples(print)
    (unbalanced,) = NLVR2(str(tree / "nlvr"), ["unbalanced_dev"]).samples(print)
    assert balanced.images["right"] == tree / "nlvr/dev/dev-2-0-img1.png" and balanced.images["left"].is_file()
    assert unbalanced.images["left"] == tree / "nlvr/dev/dev-4-0-img0.png" and unbalanced.images["right"].is_file()
    with pytest.raises(DataError, match="missing raw file: .*nlvr2/data/balanced/balanced_test1.json"):
        next(NLVR2(str(tree), ["train", "balanced_test1"]).samples(print))


def test_damaged_lines_and_images(tree, tmp_path):
    copy = nlvr2_tree(tmp_path)
    lines = raw(copy, "dev")
    lines[1]["label"] = "maybe"
    odd = [
        "{",
        b'{"identifier": "dev-9-0-0", "sentence": "caf\xe9", "label": "True"}',
        '{"identifier": "dev-9-0-0"}',
        "[]",
        "",
    ]
    write_lines(copy / "nlvr/nlvr2/data/dev.json", [*odd, *lines])
    (copy / "nlvr/dev/dev-4-0-img1.png").unlink()
    samples, skipped, _ = converted(NLVR2(str(copy), ["dev"]), tmp_path / "out", "dev")
    assert list(samples) == ["dev-0-0", "dev-2-0"]
    assert [entry["id"] for entry in samples["dev-0-0"].info["statements"]] == ["dev-0-0-0"]
    assert skipped == {
        "line is not json": 1,
        "line is not utf-8": 1,
        "malformed line": 2,
        "missing image": 1,
        "unknown label": 1,
    }
    shutil.rmtree(copy / "nlvr/dev")
    with pytest.raises(DataError, match="missing raw folder: .*nlvr/dev"):
        next(NLVR2(str(copy), ["dev"]).samples(print))
