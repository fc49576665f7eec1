"""Ranks: how this process joins the others, and the few collectives that the loop and ITC need."""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from bt.errors import ConfigError

COLLECTIVE_TIMEOUT = datetime.timedelta(minutes=30)


@dataclass(frozen=True)
class World:
    """This process among all: global rank, number of ranks, and the device it computes on."""

    rank: int
    size: int
    device: torch.device

    @property
    def main(self) -> bool:
        return self.rank == 0


def join(device: str = "auto") -> World:
    """Joins the process group that torchrun's variables describe, or stands alone without them.

    NCCL on GPUs, gloo on CPUs. device: auto takes a GPU where there is one.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("trainer.device=cuda: no GPU is visible here; allowed are auto, cpu")
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if device == "cuda":
        index = int(os.environ.get("LOCAL_RANK", 0))
        torch.cuda.set_device(index)
        where = torch.device("cuda", index)
    else:
        where = torch.device("cpu")
    if size > 1 and not dist.is_initialized():
        # gloo beside NCCL, so that small host-side numbers are summed without waiting for the GPU.
        backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=COLLECTIVE_TIMEOUT)
    return World(rank, size, where)


def leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def this_rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def all_sum(tensor: Tensor) -> Tensor:
    """The sum over ranks, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def barrier() -> None:
    """Waits for all ranks."""
    if world_size() > 1:
        dist.barrier()


def broadcast(tensor: Tensor, source: int) -> Tensor:
    """Rank `source`'s values, in place."""
    if world_size() > 1:
        dist.broadcast(tensor, source)
    return tensor


def gather_objects(value) -> list:
    """Every rank's value, rank 0 first."""
    if world_size() == 1:
        return [value]
    box = [None] * world_size()
    dist.all_gather_object(box, value)
    return box


class _GatherRows(torch.autograd.Function):
    """All-gather along rows whose backward sums the gradients of the copies on all ranks.

    Together with a gradient that is averaged over ranks this is the gradient of the loss on the concatenated batch
    (as Lightning's all_gather(sync_grads=True), which the official code uses).
    """

    @staticmethod
    def forward(ctx, rows: Tensor, sizes: list[int]) -> Tensor:
        ctx.start, ctx.count = sum(sizes[: dist.get_rank()]), len(rows)
        # Ranks may hold different numbers of rows, and gathering wants equal shapes: pad, then cut.
        padded = rows.new_zeros((max(sizes), *rows.shape[1:]))
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    @staticmethod
    def backward(ctx, gradient: Tensor):
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient[ctx.start : ctx.start + ctx.count], None


def gather_rows(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Each (rows, ...) of this rank -> (rows of all ranks, ...), rank 0 first, with gradients.

    All tensors have the same number of rows.
    """
    if world_size() == 1:
        return tensors
    count = torch.tensor([len(tensors[0])], device=tensors[0].device)
    counts = [torch.empty_like(count) for _ in range(world_size())]
    dist.all_gather(counts, count)
    sizes = [int(c) for c in counts]
    return tuple(_GatherRows.apply(tensor.contiguous(), sizes) for tensor in tensors)
