import sys
from pathlib import Path

import pytest
import torch
from hydra.core.hydra_config import HydraConfig

from bt import train
from bt.data.sources.easy_vqa import EasyVQA
from bt.data.write import convert
from tests.data.helpers import make_raw_tree

# Tests run side by side with others on small machines, and one thread makes sums repeatable.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory) -> Path:
    """All of easy-VQA in shards of 500 samples; not to be written to."""
    out = tmp_path_factory.mktemp("easy_vqa")
    convert(EasyVQA(), out, shard_size=500)
    return out


@pytest.fixture(scope="session")
def small_raw(tmp_path_factory) -> Path:
    """A raw tree with the package's images 0-59 of each part; not to be written to."""
    return make_raw_tree(tmp_path_factory.mktemp("raw"), 60)


@pytest.fixture(scope="session")
def few_dir(tmp_path_factory, small_raw) -> Path:
    """The shards of `small_raw`, 10 samples each; not to be written to."""
    out = tmp_path_factory.mktemp("few") / "shards"
    convert(EasyVQA(str(small_raw)), out, shard_size=10)
    return out


@pytest.fixture(autouse=True)
def no_hydra_left():
    """What a program run in this process leaves in Hydra's global state would make a later test part of its sweep."""
    yield
    HydraConfig.instance().cfg = None


@pytest.fixture
def command(monkeypatch, capfd, tmp_path):
    """Runs `python -m bt.train ...` in this process; returns status and standard error."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["bt.train", *map(str, arguments)])
        try:
            train.main()
            status = 0
        except SystemExit as end:
            status = end.code
        return status, capfd.readouterr().err

    return call
