import errno
import hashlib
import io
import json
import shutil
import tarfile
from pathlib import Path

import pytest

from bt.data.rules import CaptionRules
from bt.data.shards import ShardSet, _member
from bt.data.sources.base import RawSample, Source
from bt.data.sources.easy_vqa import EasyVQA
from bt.data.verify import verify
from bt.data.write import Limits, convert
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


class Listed(Source):
    """What a test lists, on one image."""

    def __init__(self, samples: list[tuple[str, dict]], text_fields: dict, image: Path | None = None):
        super().__init__()
        self.name, self.text_fields = "listed", text_fields
        self._samples, self._image = samples, image

    def options(self):
        return {}

    def samples(self, skip):
        for key, info in self._samples:
            if "skip" in info:
                skip(info["skip"])
            else:
                yield RawSample("train", key, {} if self._image is None else {"": self._image}, info)


CAPTIONS = {"captions": None}


def written(folder: Path, field: str = "captions") -> list[list]:
    data = ShardSet(folder, "train")
    return [data.read(number).info[field] for number in range(len(data))]


def test_caption_rules(tmp_path):
    texts = ["a red dog", "a dog", "a red dog", " a  red dog ", "dog", "a dog", "a very big red dog"]
    samples = [("a", {"captions": texts, "n": 7}), ("b", {"captions": ["dog"]}), ("c", {"captions": ["a dog"]})]
    source = Listed(samples, CAPTIONS)
    convert(source, tmp_path / "default")
    assert written(tmp_path / "default") == [["a red dog", "a dog", " a  red dog ", *texts[4::2]], ["dog"], ["a dog"]]
    index, _ = convert(source, tmp_path / "bounded", captions=CaptionRules(min_words=2, max_words=3))
    assert written(tmp_path / "bounded") == [["a red dog", "a dog", " a  red dog "], ["a dog"]]
    assert index.skipped == {
        "duplicate text (captions)": 2,
        "no text": 1,
        "too few words (captions)": 2,
        "too many words (captions)": 1,
    }
    assert index.options["captions"] == {"deduplicate": True, "min_words": 2, "max_words": 3}
    convert(source, tmp_path / "all", captions=CaptionRules(deduplicate=False))
    assert written(tmp_path / "all") == [texts, ["dog"], ["a dog"]]
    with pytest.raises(DataError, match=r"another data set \(captions.min_words=2, .*asked: captions.min_words=null"):
        convert(source, tmp_path / "bounded")


def test_rules_leave_entries_alone(tmp_path):
    asked = [{"question": "what?", "id": 1}, {"question": "what?", "id": 2}]
    source = Listed([("a", {"questions": asked})], {"questions": "question"})
    convert(source, tmp_path / "out", captions=CaptionRules(min_words=2))
    assert written(tmp_path / "out", "questions") == [asked]


def test_labelled_images_without_texts(small_raw, tmp_path):
    image = small_raw / "data/train/images/3.png"
    source = Listed([("a", {"label": 1}), ("b", {"label": 0})], {}, image)
    source.labels = lambda: {"classes": ["cat", "dog"]}
    index, _ = convert(source, tmp_path / "out")
    assert index.skipped == {} and index.texts("train") == {} and verify(str(tmp_path / "out")) == []
    data = ShardSet(tmp_path / "out", "train")
    assert [data.read(number).info for number in range(len(data))] == [{"label": 1}, {"label": 0}]
    assert data.read(1).images == {"image": image.read_bytes()}
    assert data.labels == {"classes": ["cat", "dog"]} and list(data.all_texts()) == []


def test_texts_without_images(tmp_path):
    entries = [[{"text": "it rains", "text_pair": "it is wet", "label": 1}], [{"text": "so?", "label": 0}]]
    source = Listed([(str(i), {"sentences": e}) for i, e in enumerate(entries)], {"sentences": "text"})
    convert(source, tmp_path / "out", workers=1)
    assert written(tmp_path / "out", "sentences") == entries and verify(str(tmp_path / "out")) == []
    assert ShardSet(tmp_path / "out", "train").read(0).images == {}


def test_texts_that_no_utf8_can_hold(tmp_path):
    samples = [
        ("a", {"captions": ["half \ud83d"]}),
        ("b", {"captions": ["whole \U0001f600"]}),
        ("c", {"captions": [None]}),
    ]
    index, _ = convert(Listed(samples, CAPTIONS), tmp_path / "out")
    assert index.skipped == {"empty text (captions)": 1, "no text": 1, "text is not unicode": 1}
    assert written(tmp_path / "out") == [["whole \U0001f600"]]


def test_the_first_bad_sample_stops_where_that_is_asked_for(small_raw, tmp_path):
    message = "damaged: sample 'a' of train: duplicate key .*on_bad_sample=skip"
    with pytest.raises(DataError, match=message) as caught:
        convert(Damaged(small_raw, tmp_path), tmp_path / "out", limits=Limits("fail"))
    assert "\n" not in str(caught.value) and list((tmp_path / "out").iterdir()) == []
    broken = Listed([("a", {"captions": ["x"]}), ("b", {"skip": "line is not json"})], CAPTIONS)
    with pytest.raises(DataError, match="listed: line is not json; on_bad_sample=skip"):
        convert(broken, tmp_path / "out", limits=Limits("fail"))
    unwanted = Listed([("a", {"captions": ["x"]}), ("b", {"skip": "not wanted"})], CAPTIONS)
    assert convert(unwanted, tmp_path / "out", limits=Limits("fail"))[0].skipped == {"not wanted": 1}


def test_too_large_a_share_of_bad_samples_stops(small_raw, tmp_path):
    """Damaged: 4 of 7 samples are bad; a text that is left out and a sample without any are not."""
    source = Damaged(small_raw, tmp_path)
    message = "4 of 7 samples are bad, more than max_bad_share=0.57: duplicate key 1, .*; first duplicate key: a"
    with pytest.raises(DataError, match=message):
        convert(source, tmp_path / "out", limits=Limits(max_bad_share=0.57))
    assert not (tmp_path / "out/index.json").exists()
    convert(source, tmp_path / "out", limits=Limits(max_bad_share=0.58))  # the limits are not of the data set
    assert (tmp_path / "out/index.json").exists()
    lines = Listed([("a", {"captions": ["x"]}), *[("b", {"skip": "line is not utf-8"})] * 3], CAPTIONS)
    with pytest.raises(DataError, match="3 of 4 samples are bad, .*line is not utf-8 3"):
        convert(lines, tmp_path / "lines", limits=Limits(max_bad_share=0.7))


def test_a_split_is_judged_long_before_the_end(tmp_path):
    source = Listed([(str(n), {"captions": ["x"]}) for n in range(5000)], CAPTIONS, tmp_path / "nowhere.png")
    message = "1,000 of 1,000 samples of train are bad, .*missing image 1,000; first missing image: .*/nowhere.png"
    with pytest.raises(DataError, match=message):
        convert(source, tmp_path / "out")


def test_raw_files_that_cannot_be_read_are_one_line(tmp_path):
    source = Listed([], CAPTIONS)
    source.samples = lambda skip: (tmp_path.read_bytes() for _ in range(1))
    with pytest.raises(DataError, match="cannot read the raw files of listed: .*Is a directory: "):
        convert(source, tmp_path / "out")


def test_an_option_of_a_source_must_not_hide_the_converters(tmp_path):
    source = Listed([("a", {"captions": ["x"]})], CAPTIONS)
    source.options = lambda: {"images": "all"}
    with pytest.raises(DataError, match="its option 'images' has the name of one of the converter"):
        convert(source, tmp_path / "out")


@pytest.mark.parametrize("size", [0, 1, 511, 512, 513, 100_000])
def test_members_are_those_of_tarfile(size):
    info = tarfile.TarInfo("COCO_val2014_000000391895.left.jpg")
    info.size, info.mode = size, 0o644
    data = bytes(range(256)) * (size // 256 + 1)
    member = _member(info.name, data[:size])
    assert member[:512] == info.tobuf(tarfile.USTAR_FORMAT) and len(member) % 512 == 0
    with tarfile.open(fileobj=io.BytesIO(member + bytes(1024))) as tar:
        assert tar.extractfile(info.name).read() == data[:size]
