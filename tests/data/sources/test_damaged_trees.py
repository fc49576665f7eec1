"""Official trees full of damaged and odd images: what is left out is counted by hand, all else is read."""

import io
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bt.data.write import convert
from bt.errors import DataError
from bt.samples.easy_vqa import easy_vqa
from bt.samples.offline import source_of
from bt.samples.trees import write_tree
from tests.data.sources.test_official_trees import FIELDS, HOME, batches_of

# Source -> pattern of the images of `train`, one for each sample; their order is that of the numbers in their names.
IMAGES = {
    "coco_karpathy": "train2014/*",
    "flickr30k_karpathy": "flickr30k-images/*",
    "visual_genome": "images/*/*",
    "sbu": "SBU/*",
    "cc3m": "train_image/*",
    "vqav2": f"{HOME}/train2014/*",
    "vgqa": "vg/images/*/*",
    "nlvr2": "nlvr/images/train/0/*-img1.png",
    "snli_ve": f"{HOME}/flickr30k-images/*",
    "image_folder_csv": "train/*",
}


def saved(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def bomb() -> bytes:
    """A whole PNG that says it has 30,000 x 30,000 pixels."""
    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")]
    parts = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def rotated(image: Image.Image) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return saved(image, "JPEG", exif=exif)


def odd_files(image: Image.Image) -> list[bytes]:
    """The picture in the ways that official downloads have them, each a whole image."""
    grey = np.asarray(image.convert("L"))
    transparent = image.convert("RGBA")
    transparent.putalpha(image.convert("L"))
    return [
        saved(image.convert("CMYK"), "JPEG"),
        saved(image.convert("P"), "PNG", transparency=0),
        saved(Image.fromarray(grey.astype(np.uint16) * 257), "PNG"),
        saved(transparent, "PNG"),
        saved(image, "GIF", save_all=True, append_images=[image.rotate(90)]),
        rotated(image),
        saved(image, "JPEG", progressive=True),
        saved(image, "WEBP"),
    ]


def damage(files: list[Path], name: str) -> dict[str, int]:
    """Damage six images and make others odd; returns what should be left out, by reason."""
    whole = [file.read_bytes() for file in files]
    files[0].unlink()
    files[1].write_bytes(b"")
    files[2].write_bytes(saved(Image.open(io.BytesIO(whole[2])), "JPEG")[:-200])
    files[3].write_bytes(b"<html><body>404 Not Found</body></html>")
    files[4].unlink()
    files[4].mkdir()
    files[5].write_bytes(bomb())
    for number, data in enumerate(odd_files(Image.open(io.BytesIO(whole[6])).convert("RGB")), 6):
        files[number].write_bytes(data)
    missing = "dead link" if name == "sbu" else "missing image"
    return {missing: 1, "image cannot be decoded": 3, "image cannot be read": 1, "image too large": 1}


@pytest.fixture(scope="module")
def collection():
    return easy_vqa(60)


def number_in(path: Path) -> list[int]:
    return [int(part) for part in "".join(c if c.isdigit() else " " for c in path.name).split()]


@pytest.mark.parametrize("name", IMAGES)
def test_damaged_images_are_counted_and_odd_ones_read(name, collection, tmp_path):
    raw = write_tree(name, collection, tmp_path / "raw")
    before, _ = convert(source_of(name, raw), tmp_path / "before")
    files = sorted(raw.glob(IMAGES[name]), key=number_in)
    expected = damage(files, name)
    index, _ = convert(source_of(name, raw), tmp_path / "out", workers=2)
    assert index.skipped == dict(sorted((before.skipped | expected).items()))
    assert index.samples("train") == before.samples("train") - 6
    assert {s: index.samples(s) for s in index.splits if s != "train"} == {
        s: before.samples(s) for s in before.splits if s != "train"
    }
    shards, _, batches = batches_of(tmp_path / "out", "train", FIELDS.get(name, "captions"), 64)
    written = [data for n in range(len(shards)) for data in shards.read(n).images.values()]
    assert all(file.read_bytes() in written for file in files[6:14])
    assert sum(len(batch.pairs) for batch in batches) == sum(shards.counts(FIELDS.get(name, "captions")))
    assert all(not batch.skipped for batch in batches)


def test_nothing_usable_is_one_line(collection, tmp_path):
    raw = write_tree("flickr30k_karpathy", collection, tmp_path / "raw")
    for path in (raw / "flickr30k-images").iterdir():
        path.write_bytes(b"")
    with pytest.raises(DataError, match="nothing to convert from flickr30k_karpathy: image cannot be decoded 60"):
        convert(source_of("flickr30k_karpathy", raw), tmp_path / "out")
    shutil.rmtree(raw / "flickr30k-images")
    with pytest.raises(DataError, match="missing raw folder: .*raw/flickr30k-images"):
        convert(source_of("flickr30k_karpathy", raw), tmp_path / "out")
