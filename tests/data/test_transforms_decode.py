import io
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

from bt.data.transforms import UNDECODABLE, decode, make_transform

# torchvision hands its decoders over to TorchCodec; the version that is pinned has them.
pytestmark = pytest.mark.filterwarnings("ignore:The image decoding and encoding capabilities:DeprecationWarning")

PHOTO = (Path(matplotlib.get_data_path()) / "sample_data/grace_hopper.jpg").read_bytes()  # 512 x 600


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def photo() -> Image.Image:
    return decode(PHOTO).resize((60, 60))


def plain(data: bytes, channels: int = 3, kind: str = "pil") -> np.ndarray:
    """The pixels of a 60 x 60 image, which no transform resizes."""
    return make_transform("blip", 60, channels, resize=kind)(data).permute(1, 2, 0).numpy()


GREY = np.asarray(photo().convert("L"))
FILES = {
    "rgb": (encoded(photo()), np.asarray(photo())),
    "grey": (encoded(photo().convert("L")), GREY),
    "palette": (encoded(photo().quantize(8)), np.asarray(photo().quantize(8).convert("RGB"))),
    "one bit": (encoded(photo().convert("1")), np.asarray(photo().convert("1")) * np.uint8(255)),
    "grey of 16 bits": (encoded(Image.fromarray(GREY.astype(np.uint16) * 257)), GREY),
    "grey of 16 bits, big-endian": (encoded(Image.fromarray(GREY.astype(np.uint16) * 256 + 99)), GREY),
    "grey of 16 bits, pgm": (b"P5 60 60 65535 " + (GREY.astype(">u2") * 257).tobytes(), GREY),
    "cmyk": (encoded(photo().convert("CMYK"), "TIFF"), np.asarray(photo())),
    "opaque alpha": (encoded(photo().convert("RGBA")), np.asarray(photo())),
    "grey and alpha": (encoded(photo().convert("LA")), GREY),
    "animated": (encoded(photo(), "WEBP", lossless=True, save_all=True, append_images=[Image.new("RGB", (60, 60))]),
                 np.asarray(photo())),
    "png sequence": (encoded(photo(), save_all=True, append_images=[Image.new("RGB", (60, 60))]), np.asarray(photo())),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", ["pil", "fast"])
def test_every_kind_of_file_becomes_rgb_and_grey(name, kind):
    data, pixels = FILES[name]
    if pixels.ndim == 2:
        assert np.array_equal(plain(data, 1, kind)[..., 0], pixels)
        pixels = np.repeat(pixels[..., None], 3, 2)
    assert np.array_equal(plain(data, 3, kind), pixels)
    assert np.array_equal(plain(data, 1, kind)[..., 0], Image.fromarray(pixels).convert("L"))


@pytest.mark.parametrize("kind", ["pil", "fast"])
def test_cmyk_and_grey_jpeg(kind):
    for mode, most in (("CMYK", 3), ("L", 0), ("RGB", 0)):
        data = encoded(photo().convert(mode), "JPEG", quality=95, subsampling=0)
        truth = np.asarray(decode(data).convert("RGB")).astype(int)
        assert np.array_equal(plain(data, 3, kind), truth)
        assert np.array_equal(plain(data, 1, kind)[..., 0], decode(data).convert("RGB").convert("L"))
        assert np.abs(truth - np.asarray(photo().convert(mode).convert("RGB"))).mean() < 3 + most


@pytest.mark.parametrize("kind", ["pil", "fast"])
def test_transparent_palettes_and_grey(kind):
    """The transparent left half is black with clip and shows its colour with blip."""
    image = Image.new("LA", (60, 60), (90, 255))
    image.paste((90, 0), (0, 0, 30, 60))
    palette = Image.new("P", (60, 60), 1)
    palette.putpalette([90, 90, 90, 90, 90, 90])
    palette.paste(0, (0, 0, 30, 60))
    for data in (encoded(image), encoded(palette, transparency=0)):
        clip, blip = (make_transform(name, 30, resize=kind)(data) for name in ("clip", "blip"))
        assert clip[:, 5, 2].tolist() == [0, 0, 0] and clip[:, 5, 27].tolist() == [90, 90, 90]
        assert blip[:, 5, 2].tolist() == [90, 90, 90]


@pytest.mark.parametrize("kind", ["pil", "fast"])
def test_exif_rotation_is_ignored(kind):
    exif = Image.Exif()
    exif[0x0112] = 6
    turned, straight = (encoded(photo(), "JPEG", exif=e) for e in (exif, Image.Exif()))
    assert decode(turned).getexif()[0x0112] == 6
    assert np.array_equal(plain(turned, 3, kind), plain(straight, 3, kind))


@pytest.mark.parametrize("name", ["clip", "blip", "blip_randaug"])
def test_encoded_and_decoded_are_the_same(name):
    """Also where torchvision decodes the JPEG."""
    for kind in ("pil", "fast"):
        transform = make_transform(name, 96, resize=kind)
        for seed in range(3):
            data, image = (transform(x, np.random.default_rng(seed)) for x in (PHOTO, decode(PHOTO)))
            assert torch.equal(data, image)


@pytest.mark.parametrize("kind", ["pil", "fast"])
@pytest.mark.parametrize("cut", [0, 1, 100, 3000, len(PHOTO) // 2, len(PHOTO) - 2])
def test_cut_files_raise_what_is_caught(kind, cut):
    with pytest.raises(UNDECODABLE):
        make_transform("blip", 60, resize=kind)(PHOTO[:cut])


def test_jpeg_at_reduced_scale():
    """512 x 600: half is enough up to 256, an eighth up to 64; what needs more is not reduced."""

    def both(name: str, size: int, seed: int = 0, **options) -> list[torch.Tensor]:
        transforms = [make_transform(name, size, **options), make_transform(name, size, decode_draft=True, **options)]
        return [transform(PHOTO, np.random.default_rng(seed)).float() for transform in transforms]

    for kind in ("pil", "fast"):
        whole, reduced = both("clip", 257, resize=kind)
        assert torch.equal(whole, reduced)
        whole, reduced = both("clip", 256, resize=kind)
        assert 0.3 < (whole - reduced).abs().mean() < 6
    half = Image.open(io.BytesIO(PHOTO))
    half.draft(None, (256, 300))
    assert half.size == (256, 300)
    assert torch.equal(both("clip", 256)[1], make_transform("clip", 256)(half).float())
    changed = 0
    for seed in range(12):  # crops: the same part of the image, reduced only where it is large enough
        whole, reduced = both("blip_randaug_wohf", 220, seed)
        changed += not torch.equal(whole, reduced)
    assert 3 <= changed <= 11
    crop = [both("blip_randaug", 60, seed) for seed in range(6)]
    assert max((whole - reduced).abs().mean() for whole, reduced in crop) < 12
    png = encoded(decode(PHOTO))
    assert torch.equal(make_transform("clip", 60, decode_draft=True)(png), make_transform("clip", 60)(png))


def test_damaged_avif_raises_what_is_caught():
    """Its reader raises RuntimeError, some of the damage when it opens a file, some when it reads the pixels."""
    whole = bytearray(encoded(photo(), "AVIF"))
    transform, at = make_transform("clip", 30), []
    for place in range(len(whole)):
        data = whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :]
        try:
            Image.open(io.BytesIO(data)).load()
        except RuntimeError:
            at.append(place)
            with pytest.raises(OSError):
                transform(bytes(data))
        except UNDECODABLE:
            pass
    assert len(at) > 10
