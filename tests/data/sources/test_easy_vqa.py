import json
import shutil

import pytest

from bt.data import index as index_file
from bt.data.shards import ShardSet
from bt.data.sources.easy_vqa import EasyVQA, statement
from bt.errors import DataError

# All 24 templates of the data set, with the statement that the rule must give; negated ones give none.
TEMPLATES = [
    ("is there a red shape in the image?", "yes", "yes/no", "there is a red shape in the image"),
    ("is there a circle in the image?", "yes", "yes/no", "there is a circle in the image"),
    ("is there a red shape?", "yes", "yes/no", "there is a red shape"),
    ("is there a circle?", "yes", "yes/no", "there is a circle"),
    ("is there not a red shape in the image?", "yes", "yes/no", None),
    ("is there not a circle in the image?", "yes", "yes/no", None),
    ("is there not a red shape?", "yes", "yes/no", None),
    ("is there not a circle?", "yes", "yes/no", None),
    ("does the image contain a red shape?", "yes", "yes/no", "the image contains a red shape"),
    ("does the image contain a circle?", "yes", "yes/no", "the image contains a circle"),
    ("does the image not contain a red shape?", "yes", "yes/no", None),
    ("does the image not contain a circle?", "yes", "yes/no", None),
    ("is a red shape present?", "yes", "yes/no", "a red shape is present"),
    ("is a circle present?", "yes", "yes/no", "a circle is present"),
    ("is no red shape present?", "yes", "yes/no", None),
    ("is no circle present?", "yes", "yes/no", None),
    ("what color is the circle?", "teal", "color", "the circle is teal"),
    ("what color is the shape?", "teal", "color", "the shape is teal"),
    ("what is the color of the circle?", "teal", "color", "the color of the circle is teal"),
    ("what is the color of the shape?", "teal", "color", "the color of the shape is teal"),
    ("what is the red shape?", "circle", "shape", "the red shape is a circle"),
    ("what shape does the image contain?", "circle", "shape", "the image contains a circle"),
    ("what shape is in the image?", "circle", "shape", "a circle is in the image"),
    ("what shape is present?", "circle", "shape", "a circle is present"),
]


@pytest.mark.parametrize(("question", "answer", "kind", "sentence"), TEMPLATES)
def test_statements(question, answer, kind, sentence):
    assert statement(question, answer) == (kind, sentence)
    if kind == "yes/no":
        assert statement(question, "no") == (kind, None)


@pytest.mark.parametrize("pair", [("how many shapes?", "one"), ("is there a circle?", "maybe")])
def test_an_unknown_question_is_an_error(pair):
    with pytest.raises(DataError, match="fits none of the known templates"):
        statement(*pair)


def test_counts_labels_and_held_out_images(data_dir, raw):
    index = index_file.parse((data_dir / "index.json").read_text(), str(data_dir))
    assert {split: index.samples(split) for split in index.splits} == {"train": 3600, "val": 400, "test": 1000}
    texts = {split: index.texts(split)["questions"] for split in index.splits}
    assert texts["train"] + texts["val"] == 38_575 and texts["test"] == 9_673
    assert index.labels["answers"] == (raw / "answers.txt").read_text().split()
    assert len(index.labels["answers"]) == 13 and index.labels["question_types"] == ["yes/no", "color", "shape"]
    assert index.skipped == {}
    val = ShardSet(data_dir, "val")
    assert [int(val.key(i)[4:]) for i in range(len(val))] == list(range(0, 4000, 10))


@pytest.mark.parametrize(("split", "part"), [("val", "train"), ("test", "test")])
def test_captions_are_the_true_statements(data_dir, raw, split, part):
    """Against an independent reading of the raw questions: what they say of shape and colour must hold."""
    questions = json.loads((raw / part / "questions.json").read_text())
    truths: dict[int, set[str]] = {}
    for _, answer, image in questions:
        if answer not in ("yes", "no"):
            truths.setdefault(image, set()).add(answer)
    data = ShardSet(data_dir, split)
    vocabulary = {"circle", "rectangle", "triangle", "red", "green", "gray", "teal", "black", "yellow", "brown", "blue"}
    checked = without = 0
    for number in range(len(data)):
        sample = data.read(number)
        image = int(sample.key.rpartition("-")[2])
        captions = sample.info["captions"]
        assert len(set(captions)) == len(captions)
        without += not captions
        if number < 40:
            own = [(question, answer) for question, answer, i in questions if i == image and answer != "no"]
            true = [question for question, _ in own if not {"not", "no"} & set(question.split())]
            assert bool(true) == bool(captions) and len(captions) <= len(true)
        for caption in captions:
            named = vocabulary & set(caption.split())
            assert not {"not", "no"} & set(caption.split())
            if len(truths.get(image, ())) == 2:  # both colour and shape are known
                assert named <= truths[image]
                checked += 1
    assert checked > 900
    assert without == {"val": 6, "test": 34}[split]


def test_missing_or_broken_raw_files(small_raw, tmp_path, monkeypatch):
    with pytest.raises(DataError, match="missing raw file: .*nowhere/data/train/questions.json"):
        list(EasyVQA(str(tmp_path / "nowhere")).samples(print))
    with pytest.raises(DataError, match="missing raw file: .*answers.txt"):
        EasyVQA(str(tmp_path / "nowhere")).labels()
    shutil.copytree(small_raw, tmp_path / "raw")
    broken = tmp_path / "raw/data/test/questions.json"
    broken.write_text(broken.read_text()[:1000])
    with pytest.raises(DataError, match="cannot read the raw file .*test/questions.json"):
        list(EasyVQA(str(tmp_path / "raw")).samples(print))
    broken.write_text('{"questions": 3}')
    with pytest.raises(DataError, match="test/questions.json is not a list of"):
        list(EasyVQA(str(tmp_path / "raw")).samples(print))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DataError, match="pip install easy-vqa==1.0"):
        EasyVQA().labels()
