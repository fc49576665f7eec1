"""Tensors kept in main memory, then in a memory-mapped file, then not at all."""

from __future__ import annotations

import mmap
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

# Left free on the disk, where a checkpoint may want to go: so much, or this share of a small disk.
RESERVE_BYTES, RESERVE_SHARE = 2 * 2**30, 0.05


class TensorStore:
    """Numbered tensors of one floating type. The first `memory` bytes of them stay in main memory, the next ones go to
    a file in `folder` while its disk has room (None: there is no such file), the rest is not kept.

    The file has no name, so that the system removes it however the process ends.
    """

    def __init__(self, memory: int, folder: Path | None, dtype: torch.dtype):
        self.memory, self.folder, self.dtype = memory, folder, dtype
        self._items: list[Tensor | tuple[int, tuple[int, ...]] | None] = []
        self._file = None
        self._map: mmap.mmap | None = None
        self._size = 0  # of the file
        self._full = folder is None

    def __len__(self) -> int:
        return len(self._items)

    def add(self, tensor: Tensor) -> int:
        """Keeps it if there is room; returns its number."""
        tensor = tensor.to("cpu", self.dtype)
        if tensor.nbytes <= self.memory:
            self.memory -= tensor.nbytes
            self._items.append(tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor)
        else:
            self._items.append(self._write(tensor))
        return len(self._items) - 1

    def get(self, number: int) -> Tensor | None:
        """The tensor on the CPU, or None if there was no room for it."""
        item = self._items[number]
        if not isinstance(item, tuple):
            return item
        offset, shape = item
        if self._map is None or len(self._map) < self._size:
            self._map = mmap.mmap(self._file.fileno(), self._size, access=mmap.ACCESS_READ)
        count = int(np.prod(shape))
        kind = torch.empty(0, dtype=self.dtype).numpy().dtype
        # A copy, because torch takes no array that cannot be written to.
        return torch.from_numpy(np.frombuffer(self._map, kind, count, offset).reshape(shape).copy())

    def close(self) -> None:
        self._items.clear()
        self._map = None
        if self._file is not None:
            self._file.close()

    def _write(self, tensor: Tensor) -> tuple[int, tuple[int, ...]] | None:
        if self._full:
            return None
        try:
            if self._file is None:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._file = tempfile.TemporaryFile(dir=self.folder, buffering=0)  # noqa: SIM115 open until close()
            disk = shutil.disk_usage(self.folder)
            self._full = disk.free - tensor.nbytes < min(RESERVE_BYTES, RESERVE_SHARE * disk.total)
            if not self._full:
                # Written, not mapped: a disk that is full after all says so here, and not by killing the process.
                _write_all(self._file, memoryview(tensor.contiguous().numpy()).cast("B"))
        except OSError:
            self._full = True
        if self._full:
            return None
        offset, self._size = self._size, self._size + tensor.nbytes
        return offset, tuple(tensor.shape)


def _write_all(file, content: memoryview) -> None:
    while content:
        content = content[file.write(content) :]
