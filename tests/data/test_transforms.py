from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from bt.data.transforms import UNDECODABLE, decode, make_transform, resize
from bt.errors import ConfigError

GOLDEN = Path(__file__).parents[1] / "golden/bridgetower/transforms"
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)


@pytest.mark.parametrize("name", ["clip", "blip"])
@pytest.mark.parametrize("number", [0, 1])
def test_equal_to_the_official_transforms(name, number):
    expected = load_file(GOLDEN / "outputs.safetensors")
    image = decode((GOLDEN / f"image_{number}.png").read_bytes())
    assert np.array_equal(np.asarray(image), expected[f"pixels_{number}"])
    pixels = make_transform(name, 64)(image)
    assert pixels.dtype == torch.uint8 and pixels.is_contiguous()
    wanted = expected[f"{name}_{number}"]
    assert torch.equal(pixels, (wanted * STD + MEAN).mul(255).round().to(torch.uint8))
    assert ((pixels / 255 - MEAN) / STD - wanted).abs().max() < 1e-6


def photo(width: int, height: int, bands: int = 3) -> Image.Image:
    """Edges and noise, which show every difference in resampling."""
    grid = np.indices((height, width)).sum(0)[..., None] // np.arange(5, 5 + bands) % 2 * 200
    noise = np.random.default_rng(0).integers(0, 55, (height, width, bands))
    return Image.fromarray((grid + noise).astype(np.uint8).squeeze())


def test_portrait_images_are_resized_horizontally_first():
    image = photo(120, 300)
    wide_first = image.resize((64, 300), Image.Resampling.BICUBIC).resize((64, 64), Image.Resampling.BICUBIC)
    high_first = image.resize((120, 64), Image.Resampling.BICUBIC).resize((64, 64), Image.Resampling.BICUBIC)
    got = np.asarray(resize(image, 64, 64))
    assert np.array_equal(got, wide_first) and not np.array_equal(got, high_first)
    assert np.array_equal(make_transform("blip", 64)(image).permute(1, 2, 0), wide_first)


def test_clip_takes_the_centre():
    pixels = torch.from_numpy(np.array(photo(70, 64))).permute(2, 0, 1)
    assert torch.equal(make_transform("clip", 64)(photo(70, 64)), pixels[:, :, 3:67])
    # An odd margin: official code rounds half to even, (67 - 64) / 2 -> 2 and (65 - 64) / 2 -> 0.
    pixels = torch.from_numpy(np.array(photo(64, 67))).permute(2, 0, 1)
    assert torch.equal(make_transform("clip", 64)(photo(64, 67)), pixels[:, 2:66])
    pixels = torch.from_numpy(np.array(photo(64, 65))).permute(2, 0, 1)
    assert torch.equal(make_transform("clip", 64)(photo(64, 65)), pixels[:, :64])


def test_an_opaque_alpha_channel_changes_nothing():
    image = photo(100, 90)
    for mode in ("RGBA", "RGBa"):
        assert torch.equal(make_transform("clip", 48)(image.convert(mode)), make_transform("clip", 48)(image))


def test_transparent_areas_are_black_in_clip_and_shown_in_blip():
    image = Image.new("RGBA", (80, 80), (200, 100, 50, 255))
    image.paste((200, 100, 50, 0), (0, 0, 40, 80))
    clip, blip = make_transform("clip", 40)(image), make_transform("blip", 40)(image)
    assert clip[:, 20, 5].tolist() == [0, 0, 0] and clip[:, 20, 35].tolist() == [200, 100, 50]
    assert blip[:, 20, 5].tolist() == [200, 100, 50]


@pytest.mark.parametrize("mode", ["P", "1", "CMYK", "LA", "I;16"])
def test_every_mode_becomes_rgb(mode):
    image = photo(60, 60, 1).convert("L") if mode == "I;16" else photo(60, 60)
    pixels = make_transform("clip", 32)(image.convert(mode))
    assert pixels.shape == (3, 32, 32) and pixels.float().std() > 5


@pytest.mark.parametrize("name", ["clip", "blip"])
def test_grey_is_one_channel_of_three_equal_ones(name):
    image = photo(90, 70, 1)
    assert image.mode == "L"
    grey, colour = make_transform(name, 48, 1)(image), make_transform(name, 48, 3)(image)
    assert grey.shape == (1, 48, 48)
    assert torch.equal(grey.expand(3, -1, -1), colour)


def test_unknown_names_and_channels():
    with pytest.raises(ConfigError, match="transform 'crop' is unknown: allowed are blip, clip"):
        make_transform("crop", 64)
    with pytest.raises(ConfigError, match="channels: 4"):
        make_transform("clip", 64, 4)


@pytest.mark.parametrize("cut", [0, 30, 300])
def test_damaged_images_raise_what_is_caught(cut):
    with pytest.raises(UNDECODABLE):
        decode((GOLDEN / "image_0.png").read_bytes()[:cut])
