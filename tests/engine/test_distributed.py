"""Several ranks compute what one computes."""

import dataclasses
import functools
import json
import os
import shutil
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
from tests.engine.ranks import HARD, SUMS, Case, train
from tests.golden_helpers import CONTRASTIVE, assert_gradients, golden_tower, table
from tests.tasks.test_golden import CONTEXT

ROOT = Path(__file__).parents[2]


def torchrun(ranks: int, module: str, *arguments: object, **environment: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m", module]
    done = subprocess.run(
        [*command, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]


ALONE = World(0, 1, torch.device("cpu"))
STEPS = 3


def run_cases(ranks: int, data_dir: Path, out: Path, cases: list[Case]) -> dict[str, dict[str, torch.Tensor]]:
    """What each case left, by name; one start of the processes for all of them."""
    out.mkdir()
    torchrun(ranks, "tests.engine.ranks", data_dir, out, *(json.dumps(dataclasses.asdict(case)) for case in cases))
    return {case.name: load_file(out / f"{case.name}.safetensors") for case in cases}


@pytest.fixture(scope="module")
def alone(few_dir):
    """The same work in one process, by the names of the cases."""

    @functools.cache
    def found(name: str) -> dict[str, torch.Tensor]:
        return train(str(few_dir), ALONE, CASES[name])

    return found


CASES = {
    case.name: case
    for case in (
        Case("start", steps=0),
        Case("sgd", evaluates=True),
        Case("hard", task=HARD),
        Case("sums", task=SUMS),
        Case("adamw", adamw=True),
        Case("longer", adamw=True, steps=STEPS + 2),
        Case("bf16", precision="bf16", adamw=True),
    )
}


@pytest.fixture(scope="module")
def three(few_dir, tmp_path_factory):
    """Three ranks; the run that AdamW on shards leaves in `run` is gone on with by two."""
    root = tmp_path_factory.mktemp("three")
    cases = [
        Case("sgd.ddp", evaluates=True),
        Case("sgd.fsdp", "fsdp", evaluates=True),
        Case("adamw.ddp", adamw=True),
        Case("adamw.fsdp", "fsdp", adamw=True, save=str(root / "run")),
    ]
    return root / "run", run_cases(3, few_dir, root / "out", cases)


@pytest.fixture(scope="module")
def two(few_dir, tmp_path_factory, three):
    root = tmp_path_factory.mktemp("two")
    shutil.copytree(three[0], root / "run", symlinks=True)
    cases = [
        Case("sgd.ddp", evaluates=True),
        Case("sgd.fsdp", "fsdp", evaluates=True),
        Case("hard.ddp", task=HARD),
        Case("adamw.fsdp", "fsdp", adamw=True),
        Case("sums.ddp", task=SUMS, counts=True),
        Case("sums.fsdp", "fsdp", task=SUMS, counts=True),
        Case("sums.ddp.accumulated", task=SUMS, micro_batch=4, counts=True),
        Case("sums.fsdp.accumulated", "fsdp", task=SUMS, micro_batch=4, counts=True),
        Case("bf16.fsdp", "fsdp", precision="bf16", adamw=True),
        Case("fp16.fsdp", "fsdp", precision="fp16", adamw=True),
        Case("resumed.ddp", adamw=True, steps=1, resume=str(root / "run"), save=str(root / "run")),
        Case("resumed.fsdp", "fsdp", adamw=True, steps=1, resume=str(root / "run")),
    ]
    return run_cases(2, few_dir, root / "out", cases)


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]):
    """Weights after SGD steps, whose changes are as exact as the gradients."""
    assert torch.allclose(found["losses"], wanted["losses"], rtol=1e-6, atol=0), (found["losses"], wanted["losses"])
    for key in wanted.keys() - {"losses"}:
        # Biases start at 0, and in their gradients most cancels: after three steps the rounding of that counts.
        assert (found[key] - wanted[key]).norm() <= 1e-6 * wanted[key].norm() + 5e-7, key


def assert_same_adamw(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], start: dict[str, torch.Tensor]):
    """Changes of weights by AdamW: tolerances of tests/golden/README.md.

    It divides a gradient by its own size, so single entries whose gradient is rounding move at random: 1 in 5,000 may.
    """
    assert torch.allclose(found["losses"], wanted["losses"], rtol=1e-4), (found["losses"], wanted["losses"])
    compared = 0
    for key in start.keys() - {"losses"}:
        if is_noise(key):
            continue
        delta, expected = found[key] - start[key], wanted[key] - start[key]
        assert delta.norm().item() == pytest.approx(expected.norm().item(), rel=3e-5, abs=1e-9), key
        errors = (delta - expected).abs()
        assert errors.max() <= 1e-4 and (errors > 2e-5).sum() <= max(1, errors.numel() // 5000), key
        compared += expected.norm().item() > 0
    assert compared >= 100


def is_noise(key: str) -> bool:
    """Biases of keys, alone or beside those of queries and values: zero gradients but for rounding."""
    return key.endswith(("key.bias", "in_proj_bias", "qkv.bias", "kv.bias"))


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_train_as_one(alone, request, ranks, parallel):
    """MLM, ITM with sampled images and gathered ITC: the same losses and, after three SGD steps, weights; and the same
    evaluation before and after, where ranks have different numbers of batches."""
    found = request.getfixturevalue("two") if ranks == 2 else request.getfixturevalue("three")[1]
    wanted = alone("sgd")
    assert_same(found[f"sgd.{parallel}"], wanted)
    assert wanted["wishes"].tolist() == [0, 1]
    assert wanted["losses"].shape == (STEPS, 3) and (wanted["losses"][0] > 0.5).all()
    assert {"before/itm/val/loss", "after/itm/val/loss"} <= wanted.keys()
    assert wanted["before/mlm/val/loss"] > wanted["after/mlm/val/loss"] + 1e-3


def test_hard_negatives_of_all_ranks_are_those_of_one(alone, two):
    assert_same(two["hard.ddp"], alone("hard"))


@pytest.mark.parametrize("ranks, parallel", [(3, "ddp"), (3, "fsdp"), (2, "fsdp")])
def test_adamw_with_clipped_gradients(alone, two, three, ranks, parallel):
    """The norm that gradients are clipped to is that of all shards together."""
    found = two if ranks == 2 else three[1]
    assert_same_adamw(found[f"adamw.{parallel}"], alone("adamw"), alone("start"))


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_accumulation_in_place_of_ranks(alone, two, parallel):
    """Three micro-batches on each of two ranks, and none: one step, without an exchange of gradients for each."""
    assert_same({**two[f"sums.{parallel}"]}, alone("sums"))
    assert_same({**two[f"sums.{parallel}.accumulated"]}, alone("sums"))
    once, thrice = (two[f"sums.{parallel}{more}"]["collectives"].item() for more in ("", ".accumulated"))
    # A layer that runs twice sends what was accumulated before and what is new apart.
    assert once == thrice >= 2 if parallel == "ddp" else 10 < once <= thrice < 2 * once


def test_accumulation_is_the_whole_batch_but_for_itc(alone, few_dir):
    """Two micro-batches: MLM and ITM are the same means; ITC has fewer negatives, so a smaller loss."""
    losses = train(str(few_dir), ALONE, Case("halves", micro_batch=12, steps=1))["losses"]
    assert torch.allclose(losses[0, :2], alone("sgd")["losses"][0, :2], rtol=1e-5)
    assert losses[0, 2] < alone("sgd")["losses"][0, 2] - 0.3


def test_a_run_goes_on_with_other_ranks(alone, two, three, few_dir):
    """Three steps of three ranks on shards, one of two with replicas, one of two on shards; and one process from the
    first three: the losses and weights of five steps in one."""
    wanted, start = alone("longer"), alone("start")
    losses = torch.cat([three[1]["adamw.fsdp"]["losses"], *(two[f"resumed.{p}"]["losses"] for p in ("ddp", "fsdp"))])
    assert_same_adamw({**two["resumed.fsdp"], "losses": losses}, wanted, start)
    back = train(str(few_dir), ALONE, Case("back", adamw=True, steps=2, resume=str(three[0])))
    losses = torch.cat([three[1]["adamw.fsdp"]["losses"], back["losses"]])
    assert_same_adamw({**back, "losses": losses}, wanted, start)


def test_half_precision_on_shards(alone, two):
    """bf16 as in one process, fp16 with its loss scaling near fp32: the losses before and after AdamW steps."""
    full, half = alone("adamw")["losses"], alone("bf16")["losses"]
    assert 1e-5 < (half / full - 1).abs().max() < 2e-2
    assert torch.allclose(two["bf16.fsdp"]["losses"], half, rtol=2e-3)
    assert 1e-7 < (two["fp16.fsdp"]["losses"] / full - 1).abs().max() < 1e-3


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
