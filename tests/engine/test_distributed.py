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
from bt.tasks.itm_itc import HardITM
from tests.engine.ranks import HARD, SAMPLED, train
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


ALONE = World(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def alone(few_dir):
    return train(str(few_dir), ALONE)


def assert_same(found: dict, losses, weights):
    assert torch.allclose(found["losses"], losses, rtol=1e-6, atol=0), (found["losses"], losses)
    for key, value in weights.items():
        # Biases start at 0: after three steps of some 1e-3 the rounding of what cancels in them counts.
        assert (found[key] - value).norm() <= 1e-6 * value.norm() + 1e-7, key


@pytest.mark.parametrize("task", [SAMPLED, HARD], ids=["sampled", "hard"])
def test_two_ranks_train_as_one(alone, few_dir, tmp_path, task):
    """MLM, gathered ITC, and ITM with sampled images or hard negatives of all ranks: the same losses and, after three
    SGD steps, weights."""
    torchrun(2, "tests.engine.ranks", few_dir, tmp_path / "out.safetensors", *task)
    losses, weights = alone if task == SAMPLED else train(str(few_dir), ALONE, task)
    assert_same(load_file(tmp_path / "out.safetensors"), losses, weights)
    assert losses.shape == (3, 3) and (losses[0] > 0.5).all()


def test_accumulation_is_the_whole_batch_but_for_itc(alone, few_dir):
    """Two micro-batches: MLM and ITM are the same means; ITC has fewer negatives, so a smaller loss."""
    losses, _ = train(str(few_dir), ALONE, micro_batch=12)
    assert torch.allclose(losses[0, :2], alone[0][0, :2], rtol=1e-5)
    assert losses[0, 2] < alone[0][0, 2] - 0.3


@pytest.mark.parametrize("case", ["itc", "itm_itc_finetune", "itm_itc_finetune_global"])
def test_two_processes_against_the_released_code(case, tmp_path):
    """Gathered ITC, hard negatives of the own rank and of all: the losses of both ranks, logits and negatives (checked
    by the ranks), and the averaged gradient of every parameter."""
    torchrun(2, "tests.engine.golden_ranks", case, tmp_path / "out.safetensors")
    found = load_file(tmp_path / "out.safetensors")
    expected = table(f"bridgetower/two_process/{case}/scalars")
    names = ["total"] if case == "itc" else ["itc_loss", "itm_loss"]
    for losses, rank in zip(found.pop("losses").tolist(), ("rank0", "rank1"), strict=True):
        assert losses == pytest.approx([expected[rank][name] for name in names], abs=2e-6)
    model = TaskModel(golden_tower(), {"itc": ITC(CONTEXT, size=CONTRASTIVE), "itm": HardITM(CONTEXT)})
    for name, parameter in model.named_parameters():
        parameter.grad = found.pop(name, None)
    assert not found
    assert_gradients(model, f"bridgetower/two_process/{case}", entries=False, least=60 if case == "itc" else 200)
