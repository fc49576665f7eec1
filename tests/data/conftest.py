from pathlib import Path

import pytest

from bt.data.shards import ShardSet
from bt.data.sources.easy_vqa import EasyVQA
from bt.data.text import train_tokenizer
from bt.data.write import convert
from tests.data.helpers import RAW


@pytest.fixture(scope="session")
def raw() -> Path:
    """The raw files of easy-VQA, as the package ships them."""
    return RAW


@pytest.fixture
def small_dir(tmp_path, small_raw) -> Path:
    """60 + 60 images of easy-VQA in shards of 10 samples, the test's own to damage."""
    convert(EasyVQA(str(small_raw)), tmp_path / "shards", shard_size=10)
    return tmp_path / "shards"


@pytest.fixture(scope="session")
def train_set(data_dir) -> ShardSet:
    return ShardSet(data_dir, "train")


@pytest.fixture(scope="session")
def tokenizer(train_set):
    return train_tokenizer(train_set.all_texts())
