import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from bt.data import inspect as inspect_module
from bt.data.inspect import contact_sheet, inspect
from bt.data.sources.base import Blob, RawSample, Source
from bt.data.write import convert
from bt.errors import DataError
from tests.data.helpers import RAW


class Pairs(Source):
    """Two images of easy-VQA a sample, in two sizes, with a labelled statement; every third has images alone."""

    def __init__(self, labels: list):
        super().__init__()
        self.name, self.text_fields = "pairs", {"statements": "text"}
        self._labels = labels

    def options(self):
        return {}

    def labels(self):
        return {"classes": ["False", "True"]}

    def samples(self, skip):
        left = Blob((RAW / "train/images/3.png").read_bytes(), "png")
        right = RAW / "train/images/4.png"
        for number, label in enumerate(self._labels):
            entry = {"id": number, "text": "$one$ of the two" + " very" * number + " red", "label": label}
            yield RawSample("dev", str(number), {"left": left, "right": right}, {"statements": [entry]})


def test_numbers_are_those_of_the_raw_files(small_dir):
    index, lines = inspect(str(small_dir))
    assert list(lines) == list(index.splits) == ["train", "val", "test"]
    questions = [q for q in json.loads((RAW / "test/questions.json").read_text()) if q[2] < 60]
    words = sorted(len(question.split()) for question, _, _ in questions)
    per_image = Counter(image for _, _, image in questions).values()
    answers = Counter(answer for _, answer, _ in questions)
    captions, asked, images, labels = lines["test"]
    assert captions.startswith("captions: ")
    low, high, mean = min(per_image), max(per_image), len(questions) / 60
    assert asked.startswith(f"questions: {low} to {high} a sample, {mean:.1f} on average; words: min {words[0]}, ")
    median, most = words[round(0.5 * (len(words) - 1))], words[round(0.95 * (len(words) - 1))]
    assert asked.endswith(f"median {median}, 95 % {most}, max {words[-1]}")
    assert images == "images: width 64 to 64, median 64; height 64 to 64, median 64; PNG RGB 60"
    first, share = labels.removeprefix("answers: ").split(", ")[0].rsplit(" ", 2)[:2]
    assert (first, float(share)) == (
        answers.most_common(1)[0][0],
        round(100 * max(answers.values()) / len(questions), 1),
    )
    assert labels.endswith(f", {len(answers) - 10} more")


def test_labels_and_several_images(tmp_path):
    convert(Pairs([1, 0, 1, 1, 0.5]), tmp_path / "out")
    _, lines = inspect(str(tmp_path / "out"))
    assert lines["dev"] == [
        "statements: 1 to 1 a sample, 1.0 on average; words: min 5, median 7, 95 % 9, max 9",
        "left: width 64 to 64, median 64; height 64 to 64, median 64; PNG RGB 5",
        "right: width 64 to 64, median 64; height 64 to 64, median 64; PNG RGB 5",
        "labels: True 60.0 %, False 20.0 %, about 0 20.0 %",
    ]


def test_a_large_set_is_sampled_evenly(small_dir, monkeypatch):
    monkeypatch.setattr(inspect_module, "MOST", 7)
    _, lines = inspect(str(small_dir))
    assert lines["train"][-1] == "(words, images and labels of 7 of 54 samples, evenly spread)"
    assert lines["train"][2].endswith("PNG RGB 7") and "evenly" not in lines["val"][-1]
    assert inspect_module._spread(54, 7) == [0, 9, 18, 26, 35, 44, 53]


def test_the_contact_sheet_shows_the_images(tmp_path):
    convert(Pairs([1, 0, 1]), tmp_path / "out")
    contact_sheet(str(tmp_path / "out"), tmp_path / "sheet.png")
    sheet = np.array(Image.open(tmp_path / "sheet.png").convert("RGB")).reshape(-1, 3)
    colours = Counter(map(tuple, sheet.tolist()))
    for number in (3, 4):  # the background fills most of each image
        pixel = Image.open(RAW / f"train/images/{number}.png").convert("RGB").getpixel((0, 0))
        assert colours[pixel] > 3 * 2000
    assert 0.5 < colours[(255, 255, 255)] / len(sheet) < 0.95


def test_a_sheet_of_texts_alone(tmp_path):
    class Texts(Pairs):
        def samples(self, skip):
            for raw in super().samples(skip):
                yield RawSample(raw.split, raw.key, {}, raw.info)

    convert(Texts([1, 0]), tmp_path / "out")
    _, lines = inspect(str(tmp_path / "out"))
    assert lines["dev"][1:] == ["labels: True 50.0 %, False 50.0 %"]
    contact_sheet(str(tmp_path / "out"), tmp_path / "sheet.png")
    assert np.array(Image.open(tmp_path / "sheet.png").convert("L")).min() < 100


def test_what_cannot_be_shown_or_written(small_dir, tmp_path):
    with pytest.raises(DataError, match="no data set in .*/nowhere"):
        inspect(str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="cannot write .*/nowhere/x.png: No such file or directory"):
        contact_sheet(str(small_dir), tmp_path / "nowhere/x.png")
