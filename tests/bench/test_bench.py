"""The benchmark at a tiny size: both sides do the same work, and the JSON says what was measured."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bt.bench.case import Case, prepared
from bt.bench.cases import CASES, MODEL_CASES
from bt.bench.models import SIZES
from bt.data.transforms import make_transform

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", [name for name in MODEL_CASES if name != "memory"])
def test_both_sides_agree(name):
    """Losses and the gradient's norm, or outputs; and once more, after both sides have run."""
    torch.manual_seed(0)
    case: Case = CASES[name].make(SIZES["tiny"])
    for _ in range(2):
        sides = []
        for side in (case.ours, case.peer):
            with prepared(side):
                sides.append(side())
        ours, peer = sides
        assert ours.shape == peer.shape and ours.abs().max() > 0.01
        assert (ours - peer).abs().max() <= 1e-4 * peer.abs().max()


@pytest.mark.parametrize("name", ["data_288_exact", "data_288_imagefolder"])
def test_loading(name):
    """All ways load batches of normalised pixels; the fast kernel is within two grey levels, the exact one exact."""
    case: Case = CASES[name].make(SIZES["tiny"])
    ours, peer = case.ours(), case.peer()
    assert ours.shape == peer.shape == (16, 3, 288, 288) and ours.dtype == peer.dtype == torch.float32
    # Mean and deviation of the same photograph, augmented: about those of the photograph.
    assert (ours.mean() - peer.mean()).abs() < 0.3 and (ours.std() - peer.std()).abs() < 0.3
    assert case.check() <= case.tolerance == (0 if name.endswith("exact") else 2 / 255)


@pytest.mark.parametrize("name", ["data_288_fast_alone", "data_288_exact_alone"])
def test_decoding_and_resizing_alone(name):
    """The libraries' own calls give the pixels that loading gives."""
    case: Case = CASES[name].make(SIZES["tiny"])
    ours, alone = case.ours(), case.peer()
    assert ours.shape == (16, 3, 288, 288) and alone.shape == (3, 288, 288) and alone.dtype == torch.uint8
    last = (Path(case.holds.name) / "photos/a/047.jpg").read_bytes()
    assert torch.equal(make_transform("blip", 288, resize="fast" if "fast" in name else "pil")(last), alone)


def test_the_command_writes_ratios(tmp_path):
    out = tmp_path / "bench.json"
    command = [sys.executable, "-m", "bt.bench", "--size", "tiny", "--only", "inference_20", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    (result,) = json.loads(out.read_text())
    assert result["name"] == "inference_20" and result["unit"] == "pairs/s"
    assert result["loss_difference"] <= 1e-4 and result["spread"][0] <= result["ratio"] <= result["spread"][1]
    assert "inference_20" in done.stdout
