"""The benchmark at a tiny size: both sides do the same work, and the JSON says what was measured."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bt.bench.case import Case
from bt.bench.cases import CASES, SIZES

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", CASES)
def test_both_sides_agree(name):
    """Losses and the gradient's norm, also after an optimizer step; or outputs."""
    case: Case = CASES[name][1](SIZES["tiny"])
    for _ in range(2):
        ours, peer = case.ours(), case.peer()
        assert ours.shape == peer.shape and ours.abs().max() > 0.1
        assert (ours - peer).abs().max() <= 1e-4 * peer.abs().max()


def test_the_command_writes_ratios(tmp_path):
    out = tmp_path / "bench.json"
    command = [sys.executable, "-m", "bt.bench", "--size", "tiny", "--only", "inference_20", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    (result,) = json.loads(out.read_text())
    assert result["name"] == "inference_20" and result["unit"] == "pairs/s"
    assert result["loss_difference"] <= 1e-4 and result["spread"][0] <= result["ratio"] <= result["spread"][1]
    assert "inference_20" in done.stdout
