import errno
import hashlib
import json
import shutil
from pathlib import Path

import pytest

from bt.data.shards import ShardSet
from bt.data.sources.base import RawSample, Source
from bt.data.sources.easy_vqa import EasyVQA
from bt.data.write import convert
from bt.errors import DataError


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_the_same_input_gives_the_same_bytes(small_dir, small_raw, tmp_path):
    shutil.copytree(small_raw, tmp_path / "raw")  # another place, other file times
    convert(EasyVQA(str(tmp_path / "raw")), tmp_path / "again", shard_size=10)
    assert digests(tmp_path / "again") == digests(small_dir)
    assert len(digests(small_dir)) == 2 * 13 + 1


def test_finished_data_is_left_alone_and_other_data_refused(small_dir, small_raw):
    before = {path: path.stat().st_mtime_ns for path in small_dir.iterdir()}
    index, written = convert(EasyVQA(str(small_raw)), small_dir, shard_size=10)
    assert not written and index.samples("train") == 54
    with pytest.raises(DataError, match=r"holds another data set \(shard_size=10, asked: shard_size=20\)"):
        convert(EasyVQA(str(small_raw)), small_dir, shard_size=20)
    assert before == {path: path.stat().st_mtime_ns for path in small_dir.iterdir()}


def test_a_folder_with_something_else_is_refused(small_raw, tmp_path):
    (tmp_path / "letter.txt").write_text("x")
    with pytest.raises(DataError, match="is not empty and holds no index.json"):
        convert(EasyVQA(str(small_raw)), tmp_path)
    with pytest.raises(DataError, match="cannot write to"):
        convert(EasyVQA(str(small_raw)), tmp_path / "letter.txt")


def test_a_broken_off_conversion_is_no_data_set_and_goes_on(small_raw, small_dir, tmp_path):
    out = tmp_path / "out"

    def stop_after_25(samples):
        for number, sample in enumerate(samples):
            if number == 25:
                raise KeyboardInterrupt
            yield sample

    with pytest.raises(KeyboardInterrupt):
        convert(EasyVQA(str(small_raw)), out, 10, stop_after_25)
    assert {p.name for p in out.glob("*.tar")} == {"train-000000.tar", "train-000001.tar"}
    with pytest.raises(DataError, match="no data set in"):
        ShardSet(out, "train")
    with pytest.raises(DataError, match="holds an unfinished data set"):
        convert(EasyVQA(str(small_raw)), out, 11)
    convert(EasyVQA(str(small_raw)), out, 10)
    assert digests(out) == digests(small_dir)


def test_a_full_disk_is_one_line_and_leaves_no_half_shard(small_raw, tmp_path, monkeypatch):
    calls = iter(range(100))

    def fsync(handle):
        if next(calls) > 5:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", fsync)
    with pytest.raises(DataError, match="cannot write to .*No space left") as caught:
        convert(EasyVQA(str(small_raw)), tmp_path / "out", 10)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out/index.json").exists()
    assert {path.name for path in (tmp_path / "out").glob("*.tar")} == {"train-000000.tar"}


class Damaged(Source):
    """Samples with everything that can be wrong with one."""

    def __init__(self, raw: Path, folder: Path):
        super().__init__()
        self.name, self.text_fields = "damaged", {"captions": None, "questions": "question"}
        self._image, self._folder = raw / "data/train/images/3.png", folder

    def options(self):
        return {}

    def samples(self, skip):
        (self._folder / "cut.png").write_bytes(self._image.read_bytes()[:-60])
        (self._folder / "zero.png").write_bytes(b"")
        good = {"": self._image}
        ask = {"question": "what?", "answers": {}}
        yield RawSample("train", "a", good, {"captions": ["x", "", "  ", "y"], "questions": [ask, {"question": " "}]})
        yield RawSample("train", "a", good, {"captions": ["x"]})
        yield RawSample("train", "b", {"": self._folder / "cut.png"}, {"captions": ["x"]})
        yield RawSample("train", "c", {"": self._folder / "zero.png"}, {"captions": ["x"]})
        yield RawSample("train", "d", {"": self._folder / "gone.png"}, {"captions": ["x"]})
        yield RawSample("train", "e", good, {"captions": [""]})
        yield RawSample("val", "a", good, {"captions": ["z"], "split": "restval"})
        skip("no annotation")


def test_what_is_bad_is_left_out_and_counted(small_raw, tmp_path):
    index, _ = convert(Damaged(small_raw, tmp_path), tmp_path / "out")
    assert index.skipped == {
        "duplicate key": 1,
        "empty text (captions)": 3,
        "empty text (questions)": 1,
        "image cannot be decoded": 2,
        "missing image": 1,
        "no annotation": 1,
        "no text": 1,
    }
    assert json.loads((tmp_path / "out/index.json").read_text())["skipped"] == index.skipped
    data = ShardSet(tmp_path / "out", "train")
    assert len(data) == 1 and data.read(0).info["captions"] == ["x", "y"]
    assert data.counts("questions").tolist() == [1]
    assert ShardSet(tmp_path / "out", "val").read(0).info["split"] == "restval"


def test_nothing_usable_is_an_error(small_raw, tmp_path):
    shutil.copytree(small_raw, tmp_path / "raw")
    for part in ("train", "test"):
        shutil.rmtree(tmp_path / "raw/data" / part / "images")
    with pytest.raises(DataError, match="nothing to convert from easy_vqa: missing image 120"):
        convert(EasyVQA(str(tmp_path / "raw")), tmp_path / "out")
    assert not (tmp_path / "out/index.json").exists()
