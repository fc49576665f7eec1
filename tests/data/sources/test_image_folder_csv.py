import csv
import json

import pytest

from bt.data.sources.image_folder_csv import ImageFolderCSV
from bt.data.write import convert
from bt.errors import ConfigError, DataError
from tests.data.sources.raw_trees import asked, first_batch, jpeg, put, samples_of, words


@pytest.fixture
def raw(tmp_path):
    """Images 1 to 4; the tests add a table."""
    raw = tmp_path / "own"
    for number in range(1, 5):
        put(raw / f"photos/{number}.jpg", jpeg(number))
    return raw


def photo(number: int) -> str:
    return f"photos/{number}.jpg"


def write_csv(path, rows, delimiter=",", encoding="utf-8"):
    with open(path, "w", newline="", encoding=encoding) as file:
        csv.writer(file, delimiter=delimiter).writerows(rows)


def only_key(samples: dict, number: int):
    """The sample of an image."""
    (found,) = [sample for sample in samples.values() if sample.info["image_id"] == photo(number)]
    return found


def test_captions_from_csv_to_a_batch(raw, tmp_path):
    rows = [[text, "", "ignored", photo(number)] for number in (1, 2, 1) for text in words(number, 2)]
    rows += [['a "red", round\nshape', " val ", "", photo(3)], ["née ", "dev_2", "", photo(1)]]
    write_csv(raw / "table.csv", [["Caption", " split", "note", "IMAGE"], *rows], encoding="utf-8-sig")
    source = ImageFolderCSV(str(raw))
    index, _ = convert(source, tmp_path / "out")
    assert {split: index.texts(split)["captions"] for split in index.splits} == {"train": 4, "val": 1, "dev_2": 1}
    assert index.labels == {} and index.text_fields == {"captions": None}
    train = samples_of(tmp_path / "out", "train")
    assert [sample.info for sample in train.values()] == [
        {"captions": words(number, 2), "image_id": photo(number)} for number in (1, 2)
    ]
    assert only_key(train, 2).images["image"] == jpeg(2)
    assert only_key(samples_of(tmp_path / "out", "val"), 3).info["captions"] == ['a "red", round\nshape']
    assert only_key(samples_of(tmp_path / "out", "dev_2"), 1).info["captions"] == ["née"]
    batch = first_batch(tmp_path / "out", "train", "captions")
    assert {entry["text"] for entry in batch.entries} == {*words(1, 2), *words(2, 2)}
    (one,) = ImageFolderCSV(str(raw), split="val").samples(print)
    assert one.split == "val"
    with pytest.raises(DataError, match="split=test: .*table.csv has train, val, dev_2"):
        next(ImageFolderCSV(str(raw), split=["test"]).samples(print))


def test_questions_from_jsonl_to_a_batch(raw, tmp_path):
    rows = [
        {"image": photo(number), "question": question, "answer": answer}
        for number in (1, 2, 3)
        for question, answer in asked(number)
    ]
    counts = {
        answer: sum(row["answer"] == answer for row in rows) for answer in dict.fromkeys(r["answer"] for r in rows)
    }
    kept = [answer for answer, count in counts.items() if count > 2]
    assert 2 <= len(kept) < len(counts)
    tests = [
        {"image": photo(4), "question": "how many?", "answer": 3, "split": "test"},
        {"image": photo(4), "question": "where?", "answer": None, "split": "test"},
    ]
    more = [{"image": photo(1), "question": "and?", "answer": ""}, *tests]
    put(raw / "sub/own.jsonl", "\n".join(json.dumps(row) for row in [*rows, *more]))
    source = ImageFolderCSV(str(raw), file="sub/own.jsonl", min_answer_count=3)
    index, _ = convert(source, tmp_path / "out")
    rare = sum(row["answer"] not in kept for row in rows)
    assert index.labels == {"answers": kept}
    assert index.skipped == {"answer too rare": rare, "line without an answer": 1}
    train = samples_of(tmp_path / "out", "train")
    for number in (1, 2, 3):
        assert only_key(train, number).info["questions"] == [
            {"id": place, "question": row["question"], "answers": {row["answer"]: 1.0}}
            for place, row in enumerate(rows)
            if row["image"] == photo(number) and row["answer"] in kept
        ]
    assert only_key(samples_of(tmp_path / "out", "test"), 4).info["questions"] == [
        {"id": len(rows) + 1, "question": "how many?", "answers": {"3": 1.0}},
        {"id": len(rows) + 2, "question": "where?", "answers": {}},
    ]
    batch = first_batch(tmp_path / "out", "train", "questions")
    assert all(entry["question"] == rows[entry["id"]]["question"] for entry in batch.entries)


def test_labelled_texts_from_tsv(raw, tmp_path):
    rows = [(1, "entails"), (2, "neutral"), (1, "neutral"), (3, "")]
    lines = [[photo(number), words(number, 1)[0], label] for number, label in rows]
    write_csv(raw / "own.tsv", [["image", "text", "label"], *lines], delimiter="\t")
    index, _ = convert(ImageFolderCSV(str(raw)), tmp_path / "out")
    assert index.labels == {"classes": ["entails", "neutral"]} and index.text_fields == {"hypotheses": "text"}
    assert index.skipped == {"line without a label": 1}
    assert only_key(samples_of(tmp_path / "out", "train"), 1).info["hypotheses"] == [
        {"id": 0, "text": words(1, 1)[0], "label": 0},
        {"id": 2, "text": words(1, 1)[0], "label": 1},
    ]


@pytest.mark.parametrize(
    ("labels", "classes", "numbers"),
    [(["10", "9", "2"], ["2", "9", "10"], [2, 1, 0]), (["cat", "10", "ant"], ["cat", "10", "ant"], [0, 1, 2])],
)
def test_labelled_images(raw, tmp_path, labels, classes, numbers):
    rows = [[photo(number), label] for number, label in enumerate(labels, 1)]
    write_csv(raw / "own.csv", [["image", "label"], *rows, [photo(2), labels[0]]])
    index, _ = convert(ImageFolderCSV(str(raw)), tmp_path / "out")
    assert index.text_fields == {} and index.labels == {"classes": classes}
    samples = samples_of(tmp_path / "out", "train")
    assert [sample.info["label"] for sample in samples.values()] == numbers
    assert index.skipped == {"second label of an image": 1}
    assert only_key(samples, 3).images["image"] == jpeg(3)


def test_damaged_lines_are_counted(raw, tmp_path):
    lines = [
        b"image,text,split", b"photos/1.jpg,good,", b"photos/1.jpg", b"photos/1.jpg,a red, round shape,",
        b"photos/1.jpg,caf\xe9,", b",text,", b"photos/1.jpg,text,../up", b"", b"photos/9.jpg,text,", b"photos/1.jpg, ,",
    ]  # fmt: skip
    put(raw / "own.csv", b"\r\n".join(lines))
    index, _ = convert(ImageFolderCSV(str(raw)), tmp_path / "out")
    assert index.skipped == {
        "line has too few fields": 1,
        "line has too many fields": 1,
        "line is not utf-8": 1,
        "line without an image": 1,
        "line without a usable split": 1,
        "missing image": 1,
        "empty text (captions)": 1,
    }
    assert only_key(samples_of(tmp_path / "out", "train"), 1).info["captions"] == ["good"]


def test_damaged_json_lines_are_counted(raw):
    lines = [
        b'\xef\xbb\xbf{"image": "photos/1.jpg", "text": "good"}',
        b'{"image": "photos/1.jpg", "te',
        b"[1]",
        b'{"text": "x"}',
        b'{"image": "photos/1.jpg", "text": ["x"]}',
        b'{"image": "photos/1.jpg", "text": "caf\xe9"}',
        b'{"image": "photos/1.jpg", "text": "\\ud800"}',
    ]
    put(raw / "own.jsonl", b"\n".join(lines))
    skipped = []
    (sample,) = ImageFolderCSV(str(raw)).samples(skipped.append)
    assert sample.info["captions"] == ["good"]
    assert skipped == [
        "line is not json", "line is not a json object", "line has too few fields", "line has too few fields",
        "line is not utf-8", "line is not utf-8",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("image,caption_text,id", r"own.csv: its columns are caption_text, id, image; they must be image, question, "),
        ("file,text", r"its columns are file, text; they must be .*; image, text; image, label; each with or without"),
        ("image,text,question,answer", "its columns are answer, image, question, text; they must be"),
        ("image,text,Caption", r"own.csv has the column text twice \(caption is another name for text\)"),
        ("", "its columns are none; they must be"),
    ],
)
def test_wrong_columns_are_one_line(raw, header, message):
    put(raw / "own.csv", header + "\n1,2,3\n" if header else "")
    with pytest.raises(DataError, match=message) as caught:
        ImageFolderCSV(str(raw))
    assert "\n" not in str(caught.value)


def test_which_table_is_read(raw):
    with pytest.raises(DataError, match=r"must hold one .csv, .tsv or .jsonl file \(found: none\): give source.file"):
        ImageFolderCSV(str(raw))
    write_csv(raw / "a.csv", [["image", "text"], [photo(1), "a"]])
    write_csv(raw / "b.csv", [["image", "text"], [photo(1), "b"]])
    with pytest.raises(DataError, match=r"\(found: a.csv, b.csv\): give source.file"):
        ImageFolderCSV(str(raw))
    (sample,) = ImageFolderCSV(str(raw), file="b.csv").samples(print)
    assert sample.info["captions"] == ["b"]
    with pytest.raises(DataError, match="missing raw file: .*own/c.csv"):
        ImageFolderCSV(str(raw), file="c.csv")
    with pytest.raises(ConfigError, match="source.file=c.xlsx: must end in .csv, .tsv, .jsonl"):
        ImageFolderCSV(str(raw), file="c.xlsx")
    with pytest.raises(ConfigError, match="source.min_answer_count=0: must be at least 1"):
        ImageFolderCSV(str(raw), file="a.csv", min_answer_count=0)
    with pytest.raises(DataError, match="missing raw folder"):
        ImageFolderCSV(str(raw / "nowhere"))
