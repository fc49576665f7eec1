import pytest

from bt.data.sources.cc3m import CC3M
from bt.data.write import convert
from bt.errors import DataError
from tests.data.sources.raw_trees import (
    first_batch,
    img2dataset_sample,
    img2dataset_shard,
    jpeg,
    put,
    samples_of,
    words,
)

# As pandas reads them: quotes are taken off, blank lines are no rows, a quoted caption may span lines.
ROWS = b"""a red circle\thttp://example.org/0
caf\xc3\xa9 in the "old" town\thttp://example.org/1
"a sign , ""stop"" , in red"\thttp://example.org/2

\x20\x20
\xff broken\thttp://example.org/3
"two
lines"\thttp://example.org/4
never downloaded\thttp://example.org/5
listed only\thttp://example.org/6
as png\thttp://example.org/7
"""


@pytest.fixture
def raw(tmp_path):
    raw = tmp_path / "cc"
    put(raw / "utils/Train_GCC-training.tsv", ROWS)
    put(raw / "utils/Validation_GCC-1.1.0-Validation.tsv", f"{words(12, 1)[0]}\thttp://example.org/v\n")
    names = ["7.png", "0.jpg", "1.jpg", "2.jpg", "3.jpg", "4.jpg", "6.jpg", "11.jpg", "0.png", "index.html"]
    put(raw / "train_image_exist.txt", "".join(f"/data/cc/train_image/{name}\n" for name in names))
    put(raw / "val_image_exist.txt", "val_image/0.jpg\n")
    for name in set(names) - {"6.jpg", "index.html"}:
        put(raw / "train_image" / name, jpeg(int(name.split(".")[0])))
    put(raw / "val_image/0.jpg", jpeg(12))
    return raw


def test_official_layout_from_raw_files_to_a_batch(raw, tmp_path):
    source = CC3M(str(raw))
    assert source.count() == 8 + 1
    index, _ = convert(source, tmp_path / "out")
    assert index.skipped == {
        "dead link": 1,
        "missing image": 1,
        "line is not utf-8": 1,
        "line of the image list beyond the table": 1,
        "line of the image list without a number": 1,
        "row listed before": 1,
    }
    train = samples_of(tmp_path / "out", "train")
    captions = {
        0: "a red circle",
        1: 'café in the "old" town',
        2: 'a sign , "stop" , in red',
        4: "two\nlines",
        7: "as png",
    }
    assert [sample.info["captions"] for sample in train.values()] == [[text] for text in captions.values()]
    assert [sample.images["image"] for sample in train.values()] == [jpeg(number) for number in captions]
    assert list(train)[:4] == ["0", "1", "2", "4"]
    val = samples_of(tmp_path / "out", "val")
    assert val["0"].info["captions"] == words(12, 1) and val["0"].images["image"] == jpeg(12)
    batch = first_batch(tmp_path / "out", "train", "captions")
    assert {entry["text"] for entry in batch.entries} <= set(captions.values())


def test_missing_files_are_one_line(raw):
    (raw / "train_image_exist.txt").unlink()
    with pytest.raises(DataError, match="missing raw file: .*train_image_exist.txt, which names the downloaded images"):
        next(CC3M(str(raw), "train").samples(print))
    assert len(list(CC3M(str(raw), "val").samples(print))) == 1
    (raw / "val_image/0.jpg").unlink()
    (raw / "val_image").rmdir()
    with pytest.raises(DataError, match="missing raw folder: .*val_image"):
        next(CC3M(str(raw), "val").samples(print))


def test_a_lone_quotation_mark_is_not_read_for_ever(raw):
    put(raw / "utils/Train_GCC-training.tsv", '"a red circle\thttp://example.org/0\n' + "word \n" * 30_000)
    with pytest.raises(DataError, match="Train_GCC-training.tsv: line [0-9]+: .*quotation mark without its partner"):
        list(CC3M(str(raw), "train").samples(print))


def test_img2dataset_and_vilts_layouts_by_split(tmp_path):
    raw = tmp_path / "raw"
    img2dataset_shard(raw / "00000.tar", {"000000001": img2dataset_sample(1)}, failed=2)
    source = CC3M(str(raw))
    assert [sample.split for sample in source.samples(print)] == ["train"] and source.count() == 1
    with pytest.raises(DataError, match=r"nothing of split val: neither utils/.*val_annot.json .*\(val/\*.tar\)"):
        next(CC3M(str(raw), ["train", "val"]).samples(print))
    put(raw / "val_annot.json", [["images_val/0000/0000002", words(2, 1)[0]]])
    put(raw / "images_val/0000/0000002", jpeg(2))
    index, _ = convert(CC3M(str(raw), ["train", "val"]), tmp_path / "out")
    assert index.skipped == {"dead link": 2}
    assert samples_of(tmp_path / "out", "train")["00000-000000001"].info["captions"] == words(1, 1)
    assert samples_of(tmp_path / "out", "val")["0000002"].images["image"] == jpeg(2)
