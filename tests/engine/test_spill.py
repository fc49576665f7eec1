"""Tensors that outgrow the memory, and then the disk."""

import resource
import signal
import subprocess
from contextlib import contextmanager

import pytest
import torch

from bt.engine import spill
from bt.engine.spill import TensorStore


def tensors(count: int, numbers: int = 250) -> list[torch.Tensor]:
    """A kilobyte each, of several shapes."""
    shapes = [(numbers,), (5, numbers // 5), (2, 5, numbers // 10)]
    return [torch.randn(shapes[i % 3], generator=torch.Generator().manual_seed(i)) for i in range(count)]


def fill(store: TensorStore, values: list[torch.Tensor]) -> list[bool]:
    """Which of the values are there afterwards; those that are, are equal."""
    assert [store.add(value) for value in values] == list(range(len(values))) and len(store) == len(values)
    found = [store.get(number) for number in range(len(values))]
    assert all(kept is None or torch.equal(kept, value) for kept, value in zip(found, values, strict=True))
    return [kept is not None for kept in found]


def test_memory_then_disk(tmp_path):
    folder = tmp_path / "new" / "folder"
    store = TensorStore(3_500, folder, torch.float32)
    values = tensors(7)
    for value in values[:3]:
        store.add(value)
    assert not folder.exists()
    store.add(values[3])
    assert folder.is_dir() and torch.equal(store.get(3), values[3])
    for value in values[4:]:
        store.add(value)
    assert all(torch.equal(store.get(i), value) for i, value in enumerate(values)), (
        "what came after the first reading too"
    )
    store.close()


def test_memory_alone():
    store = TensorStore(3_500, None, torch.float32)
    assert fill(store, tensors(6)) == [True] * 3 + [False] * 3


def test_half_precision_takes_half_of_the_room():
    values = [value.half().float() for value in tensors(8)]
    store = TensorStore(3_500, None, torch.float16)
    found = [store.get(store.add(value)) for value in values]
    assert [kept is not None for kept in found] == [True] * 7 + [False]
    assert found[0].dtype == torch.float16 and torch.equal(found[2].float(), values[2])


def test_a_part_of_a_tensor_does_not_hold_the_whole():
    store = TensorStore(10**6, None, torch.float32)
    whole = torch.randn(1000, 10)
    store.add(whole[:1])
    assert store.get(0).untyped_storage().nbytes() == 40


@contextmanager
def files_of_at_most(size: int):
    """Writing more is an error, as on a full disk. Not a fixture: pytest writes between a test and its teardown."""
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, previous)


def test_what_finds_no_room_is_not_kept(tmp_path):
    """Two fit into the file; a smaller one that would still fit is not kept either, so that the kept ones are first."""
    store = TensorStore(0, tmp_path, torch.float32)
    with files_of_at_most(3_000):
        kept = fill(store, [*tensors(2), torch.randn(500), torch.ones(3)])
    assert kept == [True, True, False, False]
    store.close()


def test_a_small_disk_keeps_a_reserve(tmp_path):
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], capture_output=True).returncode:
        pytest.skip("a tmpfs cannot be mounted here")
    try:
        store = TensorStore(0, place, torch.float32)
        there = fill(store, [torch.randn(10_240) for _ in range(30)])  # 40 kB each
        assert there == sorted(there, reverse=True) and 15 < sum(there) < 26
        free = spill.shutil.disk_usage(place).free
        assert 0.05 * 2**20 <= free < 0.05 * 2**20 + 45_000
        assert list(place.iterdir()) == [], "the file has no name"
        store.close()
        assert spill.shutil.disk_usage(place).free > 0.99 * 2**20
    finally:
        subprocess.run(["umount", str(place)], check=True)
