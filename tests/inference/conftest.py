"""Tiny finished runs of the tasks that answer something, on a few samples in the form of their data sets."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import pytest
import torch

import bt
from bt.inference.predictor import Predictor
from bt.smoke import smoke


@pytest.fixture(scope="session")
def smoke_runs(tmp_path_factory) -> Path:
    """The directory that `python -m bt.smoke` leaves: runs/<experiment>, data/samples/<data set>."""
    root = tmp_path_factory.mktemp("smoke")
    threads, strict = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    with contextlib.chdir(root), contextlib.redirect_stdout(io.StringIO()):
        experiments = ["vqa_base", "snli_ve_base", "nlvr2_base"]
        outcomes = [*smoke(experiments, ["tracking=none"])]
        # The heads of pre-training with the contrast beside them.
        outcomes += smoke(["pretrain_base"], ["tracking=none", "task=pretrain_itc", "task.objectives.itc.size=8"])
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(strict)
    failed = [outcome.output for outcome in outcomes if outcome.error]
    assert not failed, failed
    return root


@pytest.fixture(scope="session")
def vqa(smoke_runs) -> Predictor:
    return bt.load(smoke_runs / "runs/vqa_base")


@pytest.fixture(scope="session")
def pretrained(smoke_runs) -> Predictor:
    return bt.load(smoke_runs / "runs/pretrain_base")
