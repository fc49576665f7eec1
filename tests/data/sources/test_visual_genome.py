import json

import pytest

from bt.data.sources.visual_genome import VisualGenome
from bt.data.write import convert
from bt.errors import DataError
from tests.data.sources.raw_trees import first_batch, jpeg, put, samples_of, words

# Visual Genome's id -> COCO's, as image_data.json says. 20 is in Karpathy's val, 30 in test, 40 in train.
COCO_ID = {10: None, 20: 1234, 30: 391895, 40: 9, 50: None}


@pytest.fixture
def raw(tmp_path):
    raw = tmp_path / "vg"
    for number in COCO_ID:
        put(raw / "images" / ("VG_100K" if number < 30 else "VG_100K_2") / f"{number}.jpg", jpeg(number))
    regions = [{"id": number, "regions": [region(number, text) for text in words(number, 4)]} for number in COCO_ID]
    regions[0]["regions"].append(region(50, "a clock"))  # a region that names another image
    put(raw / "annotations/region_descriptions.json", regions)
    put(raw / "image_data.json", [{"image_id": n, "coco_id": coco, "url": ""} for n, coco in COCO_ID.items()])
    put(raw / "coco_splits/karpathy_val_images.txt", "val2014/COCO_val2014_000000001234.jpg 1234\n")
    put(raw / "coco_splits/karpathy_test_images.txt", "val2014/COCO_val2014_000000391895.jpg 391895\n\n")
    return raw


def region(image: int, phrase: str) -> dict:
    return {"region_id": 1, "image_id": image, "phrase": phrase, "x": 3, "y": 4, "width": 5, "height": 6}


def test_from_raw_files_to_a_batch(raw, tmp_path):
    source = VisualGenome(str(raw))
    assert source.count() == 3
    index, _ = convert(source, tmp_path / "out")
    assert index.skipped == {"in karpathy val of coco": 1, "in karpathy test of coco": 1}
    samples = samples_of(tmp_path / "out", "train")
    assert list(samples) == ["10", "50", "40"]  # by where an image is first named
    assert samples["10"].info == {"captions": words(10, 4), "image_id": 10}
    assert samples["50"].info["captions"] == ["a clock", *words(50, 4)]
    assert {int(key): sample.images["image"] for key, sample in samples.items()} == {n: jpeg(n) for n in (10, 40, 50)}
    batch = first_batch(tmp_path / "out", "train", "captions")
    assert {entry["text"] for entry in batch.entries} <= {*words(10, 4), *words(40, 4), *words(50, 4), "a clock"}


def test_images_of_karpathys_evaluation_can_be_kept(raw, tmp_path):
    for name in ("image_data.json", "coco_splits/karpathy_val_images.txt", "coco_splits/karpathy_test_images.txt"):
        (raw / name).unlink()  # not read then
        with pytest.raises(DataError, match=f"missing raw file: .*; .*{'keep_karpathy_eval=true'}"):
            next(VisualGenome(str(raw)).samples(print))
    source = VisualGenome(str(raw), keep_karpathy_eval=True)
    index, _ = convert(source, tmp_path / "out")
    assert source.count() is None and index.samples("train") == 5 and index.skipped == {}
    assert index.options["keep_karpathy_eval"] is True
    assert samples_of(tmp_path / "out", "train")["30"].info["captions"] == words(30, 4)


def test_damage_is_counted(raw, tmp_path):
    good = {"regions": [region(10, "a clock")]}
    bad = [{"regions": [region(10, None), region("10", "x"), 5]}, {"regions": []}, {"id": 3}]
    put(raw / "annotations/region_descriptions.json", [good, *bad, {"regions": [region(60, "no such image")]}])
    index, _ = convert(VisualGenome(str(raw)), tmp_path / "out")
    assert index.skipped == {"malformed region": 3, "no region": 1, "malformed entry": 1, "missing image": 1}
    assert index.texts("train") == {"captions": 1}


def test_broken_lists_are_one_line(raw):
    put(raw / "coco_splits/karpathy_val_images.txt", "<html>\n")
    with pytest.raises(DataError, match="karpathy_val_images.txt: each line must name an image"):
        next(VisualGenome(str(raw)).samples(print))
    put(raw / "coco_splits/karpathy_val_images.txt", "COCO_val2014_000000001234.jpg")
    put(raw / "image_data.json", [{"id": 3}])
    with pytest.raises(DataError, match="image_data.json is not a list of"):
        next(VisualGenome(str(raw)).samples(print))


def test_a_large_list_is_read_in_parts(raw):
    """Entries, numbers and letters of several bytes that the borders of parts cut."""
    phrases = [f"{text} — Übergröße {number}" for number, text in enumerate(words(10, 4) * 9000)]
    entries = [{"regions": [region(10, text) for text in phrases[i : i + 50]]} for i in range(0, len(phrases), 50)]
    path = put(raw / "annotations/region_descriptions.json", json.dumps(entries, ensure_ascii=False))
    assert path.stat().st_size > 3 << 20
    (sample,) = VisualGenome(str(raw)).samples(print)
    assert sample.info["captions"] == phrases
