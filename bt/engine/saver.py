"""Saving while training goes on: ranks stop only as long as it takes to copy what is saved."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bt.engine import checkpoint
from bt.engine.distributed import World
from bt.engine.optimizer import AdamW


class Saver:
    """Writes a run's checkpoints, on rank 0; every rank calls `save`.

    background: writing goes on in a thread while training does. For that rank 0 keeps a copy of weights and optimizer
    state in main memory (12 bytes a parameter; page-locked where there is a GPU). Without it rank 0 needs such a copy
    only while it writes, and only of what is not in main memory already. Other ranks hold one whole tensor at a time.
    """

    def __init__(self, run_dir: Path, world: World, *, keep: int = 1, background: bool = True):
        self.run_dir, self.world, self.keep, self.background = run_dir, world, keep, background
        self.step: int | None = None
        self.buffers: dict[str, Tensor] = {}
        self.thread: threading.Thread | None = None
        self.error: Exception | None = None

    def save(self, *, step: int, model: nn.Module, optimizer: AdamW, **options: Any) -> None:
        """Takes the checkpoint of a step; options: as of bt.engine.checkpoint.save, on rank 0.

        Waits until the one before is on the disk, and raises its CheckpointError. The same step again changes the
        state alone.
        """
        self.wait()
        parts = {} if step == self.step else checkpoint.contents(model, optimizer)
        self.step = step
        tensors: dict[str, dict[str, Tensor]] = {}
        for file, named in parts.items():
            taken = self._take(file, named)
            if self.world.main:
                tensors[file] = taken
        if not self.world.main:
            return
        if self.buffers and self.world.device.type == "cuda":
            torch.cuda.synchronize(self.world.device)
        job = lambda: checkpoint.save(self.run_dir, step=step, tensors=tensors, keep=self.keep, **options)  # noqa: E731
        if not self.background:
            job()
            return
        self.thread = threading.Thread(target=self._run, args=(job,), name="saver")
        self.thread.start()

    def _take(self, file: str, named: Iterator[tuple[str, Tensor]]) -> dict[str, Tensor]:
        """The tensors on rank 0; nothing on the others, which only help to gather them."""
        taken = {}
        for name, tensor in named:
            if not self.world.main:
                continue
            taken[name] = self._copy(f"{file}/{name}", tensor) if self.background else tensor.cpu()
        return taken

    def _copy(self, name: str, tensor: Tensor) -> Tensor:
        """A copy in main memory, which is used again for the next checkpoint."""
        if name not in self.buffers:
            on_gpu = tensor.device.type == "cuda"
            self.buffers[name] = torch.empty_like(tensor, device="cpu", pin_memory=on_gpu)
        return self.buffers[name].copy_(tensor, non_blocking=True)

    def _run(self, job: Callable[[], Any]) -> None:
        try:
            job()
        except Exception as error:
            self.error = error

    def check(self) -> None:
        """Raises CheckpointError where the last one could not be written; waits for nothing."""
        if self.error is not None:
            error, self.error = self.error, None
            raise error

    def wait(self, seconds: float | None = None) -> None:
        """Returns when what was saved is on the disk, or after so many seconds; raises as `check`."""
        if self.thread is not None:
            self.thread.join(seconds)
        self.check()
