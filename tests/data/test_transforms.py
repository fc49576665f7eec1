from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torchvision.transforms import RandomResizedCrop

from bt.data.randaugment import to_pixels
from bt.data.transforms import TRANSFORMS, UNDECODABLE, decode, make_transform, random_box, resize, stack_images
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
    assert pixels.dtype == torch.uint8 and pixels.permute(1, 2, 0).is_contiguous()
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


@pytest.mark.parametrize("name", ["clip", "blip"])
def test_grey_is_one_channel_of_three_equal_ones(name):
    image = photo(90, 70, 1)
    assert image.mode == "L"
    grey, colour = make_transform(name, 48, 1)(image), make_transform(name, 48, 3)(image)
    assert grey.shape == (1, 48, 48)
    assert torch.equal(grey.expand(3, -1, -1), colour)


def test_unknown_names_and_options():
    with pytest.raises(ConfigError, match="data.train_transform, .*'crop' is unknown: allowed are albef, .*, clip, "):
        make_transform("crop", 64)
    with pytest.raises(ConfigError, match="encoder.vision.channels=4: "):
        make_transform("clip", 64, 4)
    with pytest.raises(ConfigError, match="data.resize=best is not one of: pil, fast"):
        make_transform("clip", 64, resize="best")
    with pytest.raises(ConfigError, match="data.randaug=none is not one of: official, torchvision"):
        make_transform("clip", 64, randaug="none")


@pytest.mark.parametrize("name", ["clip", "blip"])
@pytest.mark.parametrize("size", [(640, 480), (300, 500), (90, 700)])
def test_fast_resizing_is_within_two_levels(name, size):
    image = photo(*size)
    exact, fast = (make_transform(name, 128, resize=kind)(image).int() for kind in ("pil", "fast"))
    difference = (exact - fast).abs()
    assert 0 < difference.max() <= 2 and difference.float().mean() < 0.02
    small = photo(64, 64)  # nothing to resize
    assert torch.equal(make_transform(name, 64, resize="fast")(small), make_transform(name, 64)(small))


@pytest.mark.parametrize("kind", ["pil", "fast"])
def test_imagenet_and_vit_are_the_centre_with_hidden_colours_shown(kind):
    image = photo(100, 70)
    assert torch.equal(make_transform("vit", 48, resize=kind)(image), make_transform("clip", 48, resize=kind)(image))
    hidden = Image.new("RGBA", (80, 80), (200, 100, 50, 0))
    assert make_transform("imagenet", 40, resize=kind)(hidden)[:, 20, 5].tolist() == [200, 100, 50]
    assert make_transform("clip", 40, resize=kind)(hidden)[:, 20, 5].tolist() == [0, 0, 0]


class TorchDraws:
    """A generator with torch's draws, as torchvision makes them."""

    def uniform(self, low, high):
        return torch.empty(1).uniform_(low, high).item()

    def integers(self, high):
        return torch.randint(0, high, (1,)).item()


@pytest.mark.parametrize("size", [(640, 480), (50, 400), (900, 30)])
def test_crops_are_those_of_torchvision(size):
    image, seen = Image.new("RGB", size), set()
    for seed in range(40):
        torch.manual_seed(seed)
        top, left, height, width = RandomResizedCrop.get_params(image, [0.5, 1.0], [3 / 4, 4 / 3])
        torch.manual_seed(seed)
        # torchvision draws the ratio's logarithm in float32
        assert random_box(size, 0.5, TorchDraws()) == pytest.approx((left, top, left + width, top + height), abs=1)
        seen.add((left, top, width, height))
    assert len(seen) == (40 if size == (640, 480) else 1)  # too long images have one crop


def test_random_transforms_do_what_their_draws_say():
    """Crop, exact resize and flip by hand; operations that do nothing at level 5 leave it so."""
    image, plain, flipped = photo(120, 90), 0, 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        box = random_box(image.size, 0.5, rng)
        wanted = to_pixels(resize(image.crop(box), 64, 64))
        flip = rng.random() < 0.5
        got = make_transform("blip_randaug", 64)(image, np.random.default_rng(seed)).permute(1, 2, 0).numpy()
        wanted = wanted[:, ::-1] if flip else wanted
        plain, flipped = plain + np.array_equal(got, wanted), flipped + flip
        area = (box[2] - box[0]) * (box[3] - box[1]) / (120 * 90)
        assert 0.48 < area <= 1 and 0.73 < (box[2] - box[0]) / (box[3] - box[1]) < 1.36
    assert 10 <= plain <= 24 and 12 <= flipped <= 28  # 42 % of samples are not augmented


@pytest.mark.parametrize("name", sorted(TRANSFORMS))
@pytest.mark.parametrize("randaug", ["official", "torchvision"])
def test_every_transform_is_a_function_of_image_and_draws(name, randaug):
    transform, image = make_transform(name, 32, randaug=randaug), photo(70, 50)
    state = torch.get_rng_state()
    views = [transform(image, np.random.default_rng(seed)) for seed in (1, 1, 2, 3, 4)]
    assert all(view.shape == (3, 32, 32) and view.permute(1, 2, 0).is_contiguous() for view in views)
    assert torch.equal(views[0], views[1])
    assert transform.random == ("randaug" in name)
    assert transform.random == any(not torch.equal(views[0], view) for view in views[2:])
    assert torch.equal(torch.get_rng_state(), state)  # the global generator is left alone
    if not transform.random:
        assert torch.equal(transform(image), views[0])
    assert make_transform(name, 32, 1, randaug=randaug)(image, np.random.default_rng(1)).shape == (1, 32, 32)


def test_fast_and_exact_draw_the_same():
    image = photo(160, 120)
    for seed in range(12):
        views = [
            make_transform("blip_randaug_wohf", 64, resize=kind)(image, np.random.default_rng(seed)).float()
            for kind in ("pil", "fast")
        ]
        assert (views[0] - views[1]).abs().mean() < 0.5  # equalising multiplies single levels


def test_images_are_stacked_as_they_are():
    images = [make_transform("blip", 16)(photo(20 + i, 20)) for i in range(3)]
    stacked = stack_images(images)
    assert stacked.shape == (3, 3, 16, 16) and stacked.is_contiguous(memory_format=torch.channels_last)
    assert all(torch.equal(stacked[i], images[i]) for i in range(3))


@pytest.mark.parametrize("cut", [0, 30, 300])
def test_damaged_images_raise_what_is_caught(cut):
    with pytest.raises(UNDECODABLE):
        decode((GOLDEN / "image_0.png").read_bytes()[:cut])
