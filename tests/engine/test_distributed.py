"""Several ranks compute what one computes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bt.engine.distributed import World
from bt.tasks.base import TaskModel
from bt.tasks.itc import ITC
from tests.engine.ranks import train
from tests.golden_helpers import CONTRASTIVE, assert_gradients, golden_tower, table
from tests.tasks.test_golden import CONTEXT

ROOT = Path(__file__).parents[2]


def torchrun(ranks: int, module: str, *arguments: object) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m", module]
    done = subprocess.run(
        [*command, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def alone(few_dir):
    return train(str(few_dir), World(0, 1, torch.device("cpu")))


def assert_same(found: dict, losses, weights):
    assert torch.allclose(found["losses"], losses, rtol=1e-6, atol=0), (found["losses"], losses)
    for key, value in weights.items():
        # Biases start at 0: after three steps of some 1e-3 the rounding of what cancels in them counts.
        assert (found[key] - value).norm() <= 1e-6 * value.norm() + 1e-7, key


def test_two_ranks_train_as_one(alone, few_dir, tmp_path):
    """MLM, ITM with sampled images and gathered ITC: the same losses and, after three SGD steps, weights."""
    torchrun(2, "tests.engine.ranks", few_dir, tmp_path / "out.safetensors")
    assert_same(load_file(tmp_path / "out.safetensors"), *alone)
    assert alone[0].shape == (3, 3) and (alone[0][0] > 0.5).all()


def test_accumulation_is_the_whole_batch_but_for_itc(alone, few_dir):
    """Two micro-batches: MLM and ITM are the same means; ITC has fewer negatives, so a smaller loss."""
    losses, _ = train(str(few_dir), World(0, 1, torch.device("cpu")), micro_batch=12)
    assert torch.allclose(losses[0, :2], alone[0][0, :2], rtol=1e-5)
    assert losses[0, 2] < alone[0][0, 2] - 0.3


def test_gathered_itc_against_the_released_code(tmp_path):
    """Two processes: the losses of both, and the averaged gradient of every parameter."""
    torchrun(2, "tests.engine.golden_ranks", tmp_path / "out.safetensors")
    found = load_file(tmp_path / "out.safetensors")
    expected = table("bridgetower/two_process/itc/scalars")
    assert found.pop("losses").tolist() == pytest.approx(
        [expected["rank0"]["total"], expected["rank1"]["total"]], abs=2e-6
    )
    model = TaskModel(golden_tower(), {"itc": ITC(CONTEXT, size=CONTRASTIVE)})
    for name, parameter in model.named_parameters():
        parameter.grad = found.pop(name, None)
    assert not found
    assert_gradients(model, "bridgetower/two_process/itc", entries=False, least=60)
