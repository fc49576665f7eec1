from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from bt.data.randaugment import (
    COLOUR_OPS,
    PLAIN_OPS,
    BlipRandAugment,
    PilRandAugment,
    TorchvisionRandAugment,
    blip_operation,
    pil_operation,
)

GOLDEN = load_file(Path(__file__).parents[1] / "golden/bridgetower/transforms/randaugment.safetensors")
IMAGE = GOLDEN["image"]


@pytest.mark.parametrize("name", PLAIN_OPS[1:] + COLOUR_OPS)
def test_blip_operations_equal_the_released_ones(name):
    """At level 5 (BridgeTower) and 7 (ManagerTower), with both signs."""
    wanted = {key: value for key, value in GOLDEN.items() if key.startswith("blip.") and f".{name}." in key}
    assert len(wanted) in (2, 4)
    for key, expected in wanted.items():
        _, level, _, sign = key.split(".")
        got = blip_operation(name, IMAGE.copy(), int(level), int(sign))
        difference = np.abs(got.astype(int) - expected)
        assert difference.max() <= (name == "Rotate") and (difference > 0).mean() < 0.002, key


def test_pil_operations_equal_the_released_ones():
    wanted = {key: value for key, value in GOLDEN.items() if key.startswith("pil.")}
    assert len(wanted) == 2 * (9 + 2 * 5)
    for key, expected in wanted.items():
        _, level, name, sign = key.split(".")
        assert np.array_equal(pil_operation(name, Image.fromarray(IMAGE), int(level), sign == "-1"), expected), key


def pixels(*rows: list[int]) -> np.ndarray:
    """Grey (height, width, 3) pixels."""
    return np.repeat(np.array(rows, np.uint8)[..., None], 3, 2)


def test_contrast_above_black_becomes_white():
    """The channel minimum is negated as a byte: stretched from 0, all white above it."""
    assert blip_operation("AutoContrast", pixels([0, 50, 85]), 5)[0, :, 0].tolist() == [0, 150, 255]
    assert blip_operation("AutoContrast", pixels([3, 50, 100]), 5)[0, :, 0].tolist() == [255, 255, 255]
    assert blip_operation("AutoContrast", pixels([3, 3, 3]), 5)[0, :, 0].tolist() == [3, 3, 3]
    mixed = np.stack([pixels([0, 50, 85])[..., 0], pixels([3, 50, 100])[..., 0], pixels([0, 9, 255])[..., 0]], -1)
    assert blip_operation("AutoContrast", mixed, 5).tolist() == [[[0, 255, 0], [150, 255, 9], [255, 255, 255]]]


def test_sharpening_wraps_around():
    spot = pixels([200, 200, 200, 200], [200, 255, 0, 200], [200, 200, 200, 200])
    # Neighbours' mean 189 and 204 - means of 13 weights: 255 + 0.36 * (255 - 206) = 272 -> 16; 0 - 0.36 * 127 -> 211.
    assert blip_operation("Sharpness", spot, 7)[1, :, 0].tolist() == [200, 16, 211, 200]
    assert np.array_equal(blip_operation("Sharpness", spot, 5), spot)


def test_red_and_blue_are_swapped_in_grey():
    """Pure red and blue at factor 1.36: the grey that is taken off has weight 0.114 for red and 0.299 for blue."""
    red_blue = np.array([[[200, 0, 0], [0, 0, 200]]], np.uint8)
    # red: 200 * 1.36 - 0.36 * 22.8 = 263 -> 255; blue: 200 * 1.36 - 0.36 * 59.8 = 250
    assert blip_operation("Color", red_blue, 7).tolist() == [[[255, 0, 0], [0, 0, 250]]]
    assert np.array_equal(blip_operation("Color", red_blue, 5), red_blue)


def test_two_bits_are_left():
    assert blip_operation("Posterize", pixels([63, 64, 130, 255]), 5)[0, :, 0].tolist() == [0, 64, 128, 192]
    one = pil_operation("Posterize", Image.fromarray(pixels([63, 127, 130, 255])), 9)
    assert np.asarray(one)[0, :, 0].tolist() == [0, 0, 128, 128]


def test_warps_move_about_the_corner_and_leave_grey():
    line = pixels(*[[10, 20, 30, 40]] * 3)
    sheared = blip_operation("ShearX", line, 10, -1)[..., 0]  # by 0, 10/32 and 19/32 of a pixel
    assert sheared.tolist() == [[10, 20, 30, 40], [13, 23, 33, 68], [16, 26, 36, 92]]
    assert blip_operation("TranslateX", line, 2, 1)[0, :, 0].tolist() == [30, 40, 128, 128]
    assert blip_operation("TranslateY", line, 2, -1)[:, 0, 0].tolist() == [128, 128, 10]


def share(policy, key, count: int = 2000) -> float:
    """How often the policy changes the image in the way that `key` tells."""
    return sum(key(policy(IMAGE, np.random.default_rng(i))) for i in range(count)) / count


def test_how_often_operations_come():
    def unchanged(out):
        return np.array_equal(out, IMAGE)

    # Two of ten operations with probability 1/2 each; identity, brightness and sharpness do nothing at level 5:
    # (1 - 0.7 / 2) ** 2 = 0.4225, without AutoContrast's own no-ops.
    assert share(BlipRandAugment(5), unchanged) == pytest.approx(0.4225, abs=0.035)
    assert share(PilRandAugment(9), unchanged, 300) == 0
    # White channels: AutoContrast is among the two done with probability 1 - 0.95 ** 2, alone or last.
    assert share(BlipRandAugment(5), lambda out: (out[..., 1] == 255).all()) == pytest.approx(0.08, abs=0.03)
    # With colours, color and contrast do nothing either: nine of fourteen change something.
    assert share(BlipRandAugment(5, colour=True), unchanged) == pytest.approx((1 - 9 / 14 / 2) ** 2, abs=0.035)


def test_torchvision_leaves_colours_alone_unless_told():
    grey = pixels(*np.random.default_rng(0).integers(0, 256, (16, 16)).tolist())
    kinds = {colour: TorchvisionRandAugment(15, colour) for colour in (False, True)}
    names = {colour: set(kind.transform._AUGMENTATION_SPACE) for colour, kind in kinds.items()}
    assert len(names[False]) == 10 and names[True] - names[False] == set(COLOUR_OPS)
    levels = set(np.unique(grey).tolist())
    outputs = [kinds[True](grey, np.random.default_rng(i)) for i in range(60)]
    assert len({out.tobytes() for out in outputs}) > 25
    # Nearest pixels and grey fill: what only moves pixels makes no new values.
    moved = [out for out in outputs if set(np.unique(out).tolist()) <= levels | {128} and (out == 128).sum() > 3 * 16]
    assert len(moved) >= 5


def test_grey_images_are_augmented_too():
    grey = IMAGE[..., :1].copy()
    for name in PLAIN_OPS + COLOUR_OPS:
        assert blip_operation(name, grey, 7).shape == grey.shape
    for name in ("ShearX", "TranslateY", "Equalize", "Rotate"):
        assert np.array_equal(blip_operation(name, grey, 7)[..., 0], blip_operation(name, IMAGE, 7)[..., 0])
    for policy in (PilRandAugment(9), TorchvisionRandAugment(9, True)):
        assert all(policy(grey, np.random.default_rng(i)).shape == grey.shape for i in range(40))
