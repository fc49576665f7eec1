import pytest

from bt.data.sources.sbu import SBU
from bt.data.write import convert
from bt.errors import DataError
from tests.data.helpers import truncate
from tests.data.sources.raw_trees import (
    first_batch,
    img2dataset_sample,
    img2dataset_shard,
    jpeg,
    put,
    samples_of,
    words,
)


def caption(number: int) -> str:
    return words(number, 1)[0]


def test_official_layout_from_raw_files_to_a_batch(tmp_path):
    names = {3: "4385058960_b0f291553e.jpg", 1: "red tea-pot.JPG", 2: "gone.jpg", 5: "5.jpg", 6: "6.png"}
    urls = [f"http://static.flickr.com/2723/{name}" for name in names.values()]
    captions = [caption(number) for number in names]
    put(tmp_path / "raw/sbu-captions-all.json", {"image_urls": [*urls, urls[3]], "captions": [*captions, "the later"]})
    for number, name in names.items():
        if number != 2:
            put(tmp_path / "raw/SBU" / name, jpeg(number))
    put(tmp_path / "raw/SBU/9.jpg", jpeg(9))  # nobody asks for it
    source = SBU(str(tmp_path / "raw"))
    assert source.count() == 5
    index, _ = convert(source, tmp_path / "out")
    assert index.skipped == {"dead link": 1, "file name listed before": 1}
    samples = samples_of(tmp_path / "out", "train")
    assert [key.split("-")[0] for key in samples] == ["4385058960_b0f291553e", "red_tea", "5", "6_png"]
    assert [list(sample.images.values()) for sample in samples.values()] == [[jpeg(number)] for number in (3, 1, 5, 6)]
    assert [sample.info for sample in samples.values()] == [
        {"captions": [text]} for text in (caption(3), caption(1), "the later", caption(6))
    ]
    assert {entry["text"] for entry in first_batch(tmp_path / "out", "train", "captions").entries} == {
        caption(3), caption(1), "the later", caption(6)
    }  # fmt: skip


def test_vilts_layout(tmp_path):
    put(
        tmp_path / "raw/annot.json",
        [
            ["images_train/0000/0000001", caption(1)],
            ["http://x.org/a/0001002", caption(2)],
            ["0000003", caption(3)],
            [4],
        ],
    )
    put(tmp_path / "raw/images_train/0000/0000001", jpeg(1))  # these have no ending
    put(tmp_path / "raw/images_train/0001/0001002", jpeg(2))
    index, _ = convert(SBU(str(tmp_path / "raw")), tmp_path / "out")
    assert index.skipped == {"dead link": 1, "malformed entry": 1}
    samples = samples_of(tmp_path / "out", "train")
    assert {key: sample.info["captions"] for key, sample in samples.items()} == {
        "0000001": [caption(1)],
        "0001002": [caption(2)],
    }
    assert samples["0001002"].images["image"] == jpeg(2)


def test_img2dataset_shards(tmp_path):
    samples = {f"00000000{number}": img2dataset_sample(number) for number in (0, 1, 2)}
    samples["000000001"].pop("txt")
    samples["000000003"] = {"txt": b"no image", "json": b"{}"}
    samples["000000004"] = {**img2dataset_sample(4), "txt": b"\xff\xfe"}
    img2dataset_shard(tmp_path / "raw/00000.tar", samples, failed=3)
    more = {f"00001000{number}": img2dataset_sample(number) for number in (5, 6)}
    more["000010006"]["webp"] = more["000010006"].pop("jpg")
    img2dataset_shard(tmp_path / "raw/00001.tar", more, failed=1)
    img2dataset_shard(tmp_path / "raw/cc3m-validation-0000.tar", more)  # nobody says what this is
    source = SBU(str(tmp_path / "raw"))
    assert source.count() == 5 + 2
    index, _ = convert(source, tmp_path / "out")
    assert index.skipped == {
        "dead link": 4,
        "malformed sample: no caption in the shard": 1,
        "malformed sample: no image in the shard": 1,
        "text is not unicode": 1,
    }
    found = samples_of(tmp_path / "out", "train")
    assert {key: (sample.images["image"], sample.info["captions"]) for key, sample in found.items()} == {
        "00000-000000000": (jpeg(0), [caption(0)]),
        "00000-000000002": (jpeg(2), [caption(2)]),
        "00001-000010005": (jpeg(5), [caption(5)]),
        "00001-000010006": (jpeg(6), [caption(6)]),
    }


def test_a_shard_that_ends_early_gives_what_it_has(tmp_path):
    keys = range(4)
    shard = img2dataset_shard(tmp_path / "raw/00000.tar", {str(number): img2dataset_sample(number) for number in keys})
    put(tmp_path / "raw/00001.tar", b"")
    put(tmp_path / "raw/00002.tar", b"<html>not here</html>" * 100)
    whole = img2dataset_shard(tmp_path / "raw/00003.tar", {"9": img2dataset_sample(9)})
    truncate(shard, shard.stat().st_size - shard.read_bytes().index(jpeg(2)) - 100)
    whole.with_name("00003_stats.json").unlink()
    source = SBU(str(tmp_path / "raw"))
    assert source.count() is None
    index, _ = convert(source, tmp_path / "out")
    assert index.skipped == {f"malformed shard 0000{number}.tar": 1 for number in range(3)}
    assert list(samples_of(tmp_path / "out", "train")) == ["00000-0", "00000-1", "00003-9"]


def test_nothing_there_is_one_line(tmp_path):
    raw = tmp_path / "raw"
    with pytest.raises(DataError, match="missing raw folder: .*raw$"):
        next(SBU(str(raw)).samples(print))
    put(raw / "sbu-captions-all.json", {"captions": [], "image_urls": ["x"]})
    with pytest.raises(DataError, match="sbu: .* neither sbu-captions-all.json with images in SBU/, nor annot.json"):
        next(SBU(str(raw)).samples(print))
    (raw / "SBU").mkdir()
    with pytest.raises(DataError, match="must hold the lists 'captions' and 'image_urls' of one length"):
        next(SBU(str(raw)).samples(print))
    (raw / "sbu-captions-all.json").unlink()
    put(raw / "annot.json", [])
    with pytest.raises(DataError, match="missing raw folder: .*images_train"):
        next(SBU(str(raw)).samples(print))
