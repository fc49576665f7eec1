import json
from collections import Counter

import pytest

from bt.data.sources.snli_ve import SNLIVE
from bt.errors import DataError
from tests.data.sources.labelled import FOLDER, LABELS, converted, snli_ve_tree, write_lines


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return snli_ve_tree(tmp_path_factory.mktemp("snli_ve"))


def raw(tree, split):
    return [json.loads(line) for line in (tree / FOLDER / f"snli_ve/snli_ve_{split}.jsonl").read_text().splitlines()]


def test_hypotheses_labels_and_images(tree, tmp_path):
    lines = raw(tree, "train")
    samples, skipped, data = converted(SNLIVE(str(tree)), tmp_path / "out", "train")
    assert list(samples) == list(dict.fromkeys(line["Flickr30K_ID"] for line in lines)) and len(samples) == 12
    for key, sample in samples.items():
        assert sample.images["image"] == (tree / FOLDER / f"flickr30k-images/{key}.jpg").read_bytes()
        assert sample.info["hypotheses"] == [
            {"id": line["pairID"], "text": line["sentence2"].strip(), "label": LABELS.index(line["gold_label"])}
            for line in lines
            if line["Flickr30K_ID"] == key and line["gold_label"] != "-"
        ]
    assert data.labels == {"classes": ["contradiction", "neutral", "entailment"]}
    assert skipped == {"no_gold_label": 3}  # one a split
    labels = Counter(entry["label"] for sample in samples.values() for entry in sample.info["hypotheses"])
    assert labels == Counter(n % 3 for n in range(len(lines)) if n != 2)
    source = SNLIVE(str(tree / FOLDER), "dev")
    assert len(list(source.samples(lambda _: None))) == source.count() == 3


def test_damaged_lines(tree, tmp_path):
    line = raw(tree, "dev")[0]
    lines = [
        line | {"gold_label": "-"},
        line | {"gold_label": "perhaps"},
        line | {"gold_label": ["neutral"]},
        {"sentence2": "no image", "gold_label": "neutral"},
        line | {"sentence2": None},
        '{"Flickr30K_ID": ',
        json.dumps(line | {"sentence2": "café"}, ensure_ascii=False).encode("latin1"),
        line | {"sentence2": " "},
        {key: value for key, value in line.items() if key != "pairID"},
    ]
    copy = snli_ve_tree(tmp_path)
    write_lines(copy / FOLDER / "snli_ve/snli_ve_dev.jsonl", lines)
    samples, skipped, _ = converted(SNLIVE(str(copy), ["dev"]), tmp_path / "out", "dev")
    entry = {"id": 8, "text": line["sentence2"].strip(), "label": 0}
    assert [sample.info["hypotheses"] for sample in samples.values()] == [[entry]]
    assert skipped == {
        "empty text (hypotheses)": 1,
        "line is not json": 1,
        "line is not utf-8": 1,
        "malformed line": 2,
        "no_gold_label": 1,
        "unknown label": 2,
    }


def test_missing_files(tree, tmp_path):
    with pytest.raises(DataError, match="missing raw file: .*snli_ve/snli_ve_train.jsonl"):
        next(SNLIVE(str(tmp_path)).samples(print))
    copy = snli_ve_tree(tmp_path)
    (copy / FOLDER / "flickr30k-images").rename(copy / "elsewhere")
    with pytest.raises(DataError, match="missing raw folder: .*flickr30k-images"):
        next(SNLIVE(str(copy)).samples(print))
