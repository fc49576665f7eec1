"""Options at the command line, by what they do to a run on real shards."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from bt.data.plan import choose_samples
from bt.data.shards import ShardSet
from tests.test_train import journal

RUN = ["experiment=easy_vqa", "trainer=smoke", "tracking=none", "eval.test=false", "run_dir=run"]


@pytest.fixture(autouse=True)
def numerics():
    """A run sets them for the whole process."""
    before = torch.get_num_threads(), torch.get_float32_matmul_precision()
    yield
    torch.set_num_threads(before[0])
    torch.set_float32_matmul_precision(before[1])
    torch.use_deterministic_algorithms(False)


def losses(run_dir: Path) -> list[float]:
    return [line["vqa/train/loss"] for line in journal(run_dir) if "lr/base" in line]


@pytest.mark.parametrize(
    ("options", "fraction", "most", "copies"),
    [
        (["data.max_samples=null"], 1.0, None, 1),
        (["data.max_samples=7"], 1.0, 7, 1),
        (["data.max_samples=null", "data.fraction=0.25"], 0.25, None, 1),
        (["data.max_samples=null", "data.dir=[one,two]"], 1.0, None, 2),
        (["data.max_samples=null", "data.dir=[one,two]", "data.weights=[3,1]", "global_batch=16"], 1.0, None, 2),
    ],
)
def test_less_and_more_data(command, few_dir, tmp_path, options, fraction, most, copies):
    """An epoch has the questions of the chosen images, and global_batch counts questions."""
    for name in ("one", "two"):
        shutil.copytree(few_dir, tmp_path / name)
    assert command(*RUN, "data.dir=one", *options) == (0, "")
    counts = ShardSet(str(few_dir), "train").counts("questions")
    pairs = copies * int(counts[choose_samples(len(counts), fraction, most)].sum())
    batch = 16 if "global_batch=16" in options else 8
    steps = [line for line in journal(tmp_path / "run") if "lr/base" in line]
    assert [line["epoch"] for line in steps] == [round(step * batch / pairs, 4) for step in (1, 2, 3)]


def test_autocast_is_near_full_precision(command, few_dir, tmp_path):
    for name in ("fp32", "bf16"):
        result = command(*RUN[:-1], f"data.dir={few_dir}", f"run_dir={name}", f"trainer.precision={name}")
        assert result == (0, "")
    full, half = losses(tmp_path / "fp32"), losses(tmp_path / "bf16")
    assert half == pytest.approx(full, rel=0.02) and all(a != b for a, b in zip(full, half, strict=True))


def test_matrix_products_may_be_less_precise(command, few_dir):
    for precision in ("high", "highest"):
        options = [*RUN[:-1], f"data.dir={few_dir}", f"run_dir={precision}", f"trainer.matmul_precision={precision}"]
        assert command(*options) == (0, "")
        assert torch.get_float32_matmul_precision() == precision


def test_a_multirun_trains_every_combination(command, few_dir, tmp_path):
    grid = ["experiment=easy_vqa", "-m", *RUN[1:-1], f"data.dir={few_dir}", "seed=0,1", "bridge=add,none"]
    assert command(*grid)[0] == 0
    runs = [path.parent for path in (tmp_path / "sweeps/easy_vqa").glob("*/report.json")]
    configs = [OmegaConf.load(run / "config.yaml") for run in runs]
    members = {(cfg.seed, cfg.bridge._target_.rsplit(".")[-1]) for cfg in configs}
    assert members == {(seed, bridge) for seed in (0, 1) for bridge in ("AddBridge", "NoBridge")} and len(runs) == 4
    scores = [tuple(json.loads((run / "report.json").read_text())["metrics"].values()) for run in runs]
    assert len(set(scores)) == 4
    # The same command finds its runs again.
    before = {run: (run / "report.json").stat().st_mtime_ns for run in runs}
    assert command(*grid)[0] == 0
    assert before == {run: (run / "report.json").stat().st_mtime_ns for run in runs}
