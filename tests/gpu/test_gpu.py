"""What a GPU alone can show: the same results as on a CPU, autocast, loss scaling, NCCL, shards, page-locked copies.

Everything here is skipped without CUDA. On a machine with several GPUs two ranks use two of them.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from bt.engine.distributed import World
from bt.engine.parallel import Shards
from bt.models.bridgetower import Need
from tests.engine.ranks import SUMS, Case, train
from tests.engine.test_distributed import assert_same_adamw, torchrun
from tests.golden_helpers import difference, golden_batch, golden_texts, golden_tower, load_golden, tensors

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

ROOT = Path(__file__).parents[2]
CPU = World(0, 1, torch.device("cpu"))
GPU = World(0, 1, torch.device("cuda", 0))


@pytest.fixture(scope="module")
def on_cpu(few_dir):
    return {name: train(str(few_dir), CPU, Case(name, adamw=True, steps=n)) for name, n in (("start", 0), ("end", 3))}


@pytest.fixture
def group():
    """A process group of one, so that NCCL and shards run on a single GPU too."""
    dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_the_tower_is_that_of_the_released_code():
    tower = load_golden(torch.nn.ModuleDict({"tower": golden_tower()}))["tower"].cuda().eval()
    batch, expected = golden_batch(), tensors("bridgetower/infer/outputs")
    texts = golden_texts(batch)
    texts.ids, texts.mask = texts.ids.cuda(), texts.mask.cuda()
    with torch.no_grad():
        images = tower.encode_images(batch["image"].cuda())
        pairs = torch.arange(4, device="cuda")[:, None].expand(-1, 2)
        cls = tower.fuse(images, tower.encode_texts(texts), pairs, Need(cls=True)).cls.cpu()
    assert difference(cls, expected["cls_feats"]) <= 5e-5


def test_fused_adamw_steps_are_those_of_the_cpu(on_cpu, few_dir):
    found = train(str(few_dir), GPU, Case("gpu", adamw=True))
    assert torch.allclose(found["losses"], on_cpu["end"]["losses"], rtol=1e-4)
    for key in (
        "objectives.itm.head.fc.weight",
        "tower.text_projection.weight",
        "tower.cross.text_layers.0.ffn.up.weight",
    ):
        moved, expected = (weights[key] - on_cpu["start"][key] for weights in (found, on_cpu["end"]))
        assert (moved - expected).norm() <= 1e-2 * expected.norm(), key


@pytest.mark.parametrize("precision, tolerance", [("bf16", 2e-2), ("fp16", 2e-3)])
def test_half_precision_is_near_fp32(on_cpu, few_dir, precision, tolerance):
    losses = train(str(few_dir), GPU, Case(precision, adamw=True, precision=precision))["losses"]
    assert 1e-7 < (losses / on_cpu["end"]["losses"] - 1).abs().max() < tolerance


def test_shards_over_nccl(few_dir, group, tmp_path):
    """fully_shard on one GPU: the steps of the whole model there, saved from the GPU and gone on with on a CPU."""
    run = str(tmp_path / "run")
    whole = train(str(few_dir), GPU, Case("whole", adamw=True))
    shards = train(str(few_dir), GPU, Case("shards", "fsdp", adamw=True, save=run), share=lambda m, w, k: Shards(m, w))
    assert_same_adamw(shards, whole, train(str(few_dir), GPU, Case("start", steps=0)))
    resumed = train(str(few_dir), CPU, Case("resumed", adamw=True, steps=1, resume=run))
    longer = train(str(few_dir), GPU, Case("longer", adamw=True, steps=4))
    assert torch.allclose(resumed["losses"][0], longer["losses"][3], rtol=1e-4)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_ranks_over_nccl(few_dir, tmp_path):
    """Replicas and shards, with accumulation too, against one GPU."""
    cases = [Case(f"{p}{m or ''}", p, task=SUMS, adamw=True, micro_batch=m) for p in ("ddp", "fsdp") for m in (None, 4)]
    arguments = [few_dir, tmp_path, *(json.dumps(dataclasses.asdict(case)) for case in cases)]
    torchrun(2, "tests.engine.ranks", *arguments, TEST_DEVICE="cuda")
    start, alone = (train(str(few_dir), GPU, Case("a", task=SUMS, adamw=True, steps=n)) for n in (0, 3))
    for case in cases:
        assert_same_adamw(load_file(tmp_path / f"{case.name}.safetensors"), alone, start)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_whole_run(few_dir, tmp_path, precision):
    """bt.train on the GPU, with decoding there, to its report."""
    settings = ["experiment=easy_vqa", "trainer=smoke", f"data.dir={few_dir}", "tracking=none", "trainer.device=cuda"]
    settings += [
        f"trainer.precision={precision}",
        "data.resize=fast",
        "data.decode_on=device",
        f"run_dir={tmp_path}/run",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "bt.train", *settings], cwd=ROOT, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert report["device_type"] == "cuda" and report["peak_device_memory_bytes"] > 2**20
    assert 0 < report["metrics"]["vqa/test/loss"] < 20
