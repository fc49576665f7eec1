"""What becomes of raw images: read, checked, named by their real format and, if asked for, written anew."""

import io
import struct
import zlib
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image

from bt.data.decode import convert
from bt.data.images import BadImage, load_images, prepare
from bt.data.rules import ImageRules
from bt.data.sources.base import Blob, Slice
from tests.data.helpers import RAW

PHOTO = Path(matplotlib.get_data_path()) / "sample_data/grace_hopper.jpg"


def encode(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    """96 x 128 pixels of a face."""
    face = Image.open(PHOTO).convert("RGB").crop((200, 60, 392, 316)).resize((96, 128))
    face.info.clear()
    return face


@pytest.fixture(scope="module")
def odd(photo) -> dict[str, bytes]:
    """The photograph in formats and modes that are not plain RGB, and plain ones."""
    grey = np.array(photo.convert("L"))
    levels = (grey.astype(np.uint16) << 8) + 77
    alpha = photo.copy()
    alpha.putalpha(Image.fromarray(255 - grey))
    turned = Image.Exif()
    turned[0x0112] = 6
    return {
        "jpeg": encode(photo, "JPEG"),
        "progressive": encode(photo, "JPEG", progressive=True),
        "cmyk": encode(photo.convert("CMYK"), "JPEG"),
        "grey": encode(photo.convert("L"), "JPEG"),
        "turned": encode(photo, "JPEG", exif=turned.tobytes()),
        "png": encode(photo, "PNG"),
        "palette": encode(photo.quantize(32), "PNG"),
        "16-bit": encode(Image.fromarray(levels), "PNG"),
        "one-bit": encode(photo.convert("1"), "PNG"),
        "alpha": encode(alpha, "PNG"),
        "webp": encode(photo, "WEBP"),
        "bmp": encode(photo, "BMP"),
        "tiff": encode(photo, "TIFF"),
        "animated": encode(photo, "GIF", save_all=True, append_images=[photo.rotate(180)]),
        "mpo": encode(photo, "MPO", save_all=True, append_images=[photo.rotate(180)]),
    }


ENDINGS = {
    "jpeg": "jpg",
    "progressive": "jpg",
    "cmyk": "jpg",
    "grey": "jpg",
    "turned": "jpg",
    "png": "png",
    "palette": "png",
    "16-bit": "png",
    "one-bit": "png",
    "alpha": "png",
    "webp": "webp",
    "bmp": "bmp",
    "tiff": "tif",
    "animated": "gif",
    "mpo": "jpg",
}


@pytest.mark.parametrize("kind", ENDINGS)
def test_original_bytes_under_the_real_format(odd, kind):
    for rules in (ImageRules(), ImageRules(check="header")):
        for ending in ("", "xyz", "png" if ENDINGS[kind] != "png" else "jpg"):
            assert prepare(odd[kind], ending, rules) == (odd[kind], ENDINGS[kind])
    assert prepare(odd[kind], ENDINGS[kind], ImageRules()) == (odd[kind], ENDINGS[kind])


def test_an_ending_that_does_not_lie_stays(odd, tmp_path):
    assert prepare(odd["jpeg"], "jpeg", ImageRules())[1] == "jpeg"
    (tmp_path / "A.JPEG").write_bytes(odd["jpeg"])
    (tmp_path / "b").write_bytes(odd["png"])
    images = {"left": tmp_path / "A.JPEG", "right": tmp_path / "b"}
    assert load_images(images, ImageRules()) == {"left.jpeg": odd["jpeg"], "right.png": odd["png"]}


def test_images_in_memory_and_in_larger_files(odd, tmp_path):
    (tmp_path / "all.tar").write_bytes(b"head" + odd["webp"] + b"tail")
    inside = Slice(tmp_path / "all.tar", 4, len(odd["webp"]), "webp")
    assert load_images({"": inside}, ImageRules()) == {"webp": odd["webp"]}
    assert load_images({"": Blob(odd["png"], "jpg")}, ImageRules()) == {"png": odd["png"]}
    beyond = Slice(tmp_path / "all.tar", 4, len(odd["webp"]) + 5, "webp")
    assert load_images({"": beyond}, ImageRules()).reason == "image cannot be read"


def bad(data: bytes | None, tmp_path, rules: ImageRules | None = None) -> BadImage | dict:
    path = tmp_path / "x.jpg"
    if data is not None:
        path.write_bytes(data)
    loaded = load_images({"": path}, rules or ImageRules())
    if isinstance(loaded, BadImage):
        assert str(path) in loaded.where
    return loaded


def test_bad_images_by_reason(odd, tmp_path):
    assert bad(None, tmp_path).reason == "missing image"
    for kind in ENDINGS:
        assert bad(odd[kind][: len(odd[kind]) // 3], tmp_path).reason == "image cannot be decoded", kind
    assert bad(b"", tmp_path).reason == "image cannot be decoded"
    assert bad(b"<html>404 Not Found</html>", tmp_path).reason == "image cannot be decoded"
    assert load_images({"": tmp_path}, ImageRules()).reason == "image cannot be read"
    assert load_images({"": tmp_path / "x.jpg/y.jpg"}, ImageRules()).reason == "missing image"


def test_only_a_full_check_sees_damage_behind_the_header(odd, tmp_path):
    half = odd["jpeg"][: len(odd["jpeg"]) // 2]
    assert bad(half, tmp_path).reason == "image cannot be decoded"
    assert bad(half, tmp_path, ImageRules(check="header")) == {"jpg": half}
    assert bad(half[:200], tmp_path, ImageRules(check="header")).reason == "image cannot be decoded"
    assert bad(half, tmp_path, ImageRules(check="header", max_side=50)).reason == "image cannot be decoded"


@pytest.mark.parametrize("kind", ["jpeg", "progressive", "cmyk", "grey"])
def test_the_quick_check_of_jpeg_finds_what_decoding_finds(odd, kind):
    data = odd[kind]
    random = np.random.default_rng(0)
    found = 0
    for cut in [*range(len(data) - 12, len(data)), *random.integers(0, len(data), 60)]:
        damaged = bytearray(data[:cut] if cut % 2 else data)
        damaged[random.integers(0, len(damaged) or 1) : 1] = b"?" if damaged else b""
        try:
            Image.open(io.BytesIO(damaged)).load()
        except Exception:
            found += 1
            with pytest.raises(Exception):  # noqa: B017 - Pillow's of any kind
                prepare(bytes(damaged), "jpg", ImageRules())
        else:
            assert prepare(bytes(damaged), "jpg", ImageRules()) == (bytes(damaged), "jpg")
    assert found > 20


def test_a_decompression_bomb_is_not_unpacked(tmp_path):
    png = (RAW / "train/images/3.png").read_bytes()
    header = b"IHDR" + struct.pack(">II", 20000, 20000) + png[24:29]
    bomb = png[:12] + header + struct.pack(">I", zlib.crc32(header)) + png[33:]
    assert bad(bomb, tmp_path).reason == "image too large"
    large = b"IHDR" + struct.pack(">II", 10000, 10000) + png[24:29]
    bomb = png[:12] + large + struct.pack(">I", zlib.crc32(large)) + png[33:]
    assert bad(bomb, tmp_path, ImageRules(check="header")) == {"png": bomb}  # Pillow only warns; here without a word


def pixels(data: bytes, mode: str = "RGB") -> np.ndarray:
    return np.array(convert(Image.open(io.BytesIO(data)), mode)).astype(int)


def test_written_anew_in_eight_bits(odd, photo):
    """`max_side` of one pixel less than the image has; PNG stays without loss, so its pixels tell."""

    def shrunk(image: Image.Image) -> np.ndarray:
        image = image.copy()
        image.thumbnail((127, 127), Image.Resampling.BICUBIC, reducing_gap=None)
        return np.array(image).astype(int)

    rules = ImageRules(max_side=127)
    whole, grey = shrunk(photo), shrunk(photo.convert("L"))
    for kind in ("png", "bmp", "tiff"):
        data, ending = prepare(odd[kind], "", rules)
        assert ending == "png" and np.array_equal(pixels(data), whole)
    data, _ = prepare(odd["16-bit"], "", rules)
    assert Image.open(io.BytesIO(data)).mode == "L" and np.array_equal(pixels(data, "L"), grey)
    palette, _ = prepare(odd["palette"], "", rules)
    assert np.array_equal(pixels(palette), shrunk(photo.quantize(32).convert("RGB")))
    alpha = Image.open(io.BytesIO(prepare(odd["alpha"], "", rules)[0]))
    assert (alpha.mode, alpha.size) == ("RGBA", (95, 127))
    animated, ending = prepare(odd["animated"], "gif", rules)
    assert ending == "png" and np.abs(pixels(animated) - whole).mean() < 12  # the first frame, in 256 colours
    for kind in ("jpeg", "progressive", "cmyk", "grey", "mpo"):
        data, ending = prepare(odd[kind], "", rules)
        mode = "L" if kind == "grey" else "RGB"
        assert ending == "jpg" and Image.open(io.BytesIO(data)).mode == mode
        expected = shrunk(Image.open(io.BytesIO(odd[kind])).convert(mode))
        assert np.abs(pixels(data, mode) - expected).mean() < 3, kind


def test_smaller_images_keep_their_bytes(odd):
    assert prepare(odd["jpeg"], "jpg", ImageRules(max_side=128)) == (odd["jpeg"], "jpg")


def test_reencode(odd, photo):
    data, ending = prepare(odd["png"], "png", ImageRules(reencode=60))
    assert (data, ending) == (encode(photo, "JPEG", quality=60), "jpg")
    assert prepare(odd["alpha"], "png", ImageRules(reencode=60))[1] == "png"


def test_exif_orientation_is_ignored_or_applied(odd):
    """6: to be turned clockwise by a quarter."""
    assert prepare(odd["turned"], "jpg", ImageRules()) == (odd["turned"], "jpg")
    assert prepare(odd["jpeg"], "jpg", ImageRules(exif="apply")) == (odd["jpeg"], "jpg")
    data, ending = prepare(odd["turned"], "jpg", ImageRules(exif="apply"))
    assert ending == "jpg" and not Image.open(io.BytesIO(data)).getexif()
    upright = np.rot90(pixels(odd["jpeg"]), -1)
    assert pixels(data).shape == (96, 128, 3) and np.abs(pixels(data) - upright).mean() < 3
    small, _ = prepare(odd["turned"], "jpg", ImageRules(max_side=64))
    assert Image.open(io.BytesIO(small)).size == (48, 64) and not Image.open(io.BytesIO(small)).getexif()
    both, _ = prepare(odd["turned"], "jpg", ImageRules(max_side=64, exif="apply"))
    assert Image.open(io.BytesIO(both)).size == (64, 48)
