"""Ranks: how this process joins the others, and the few collectives that the loop and ITC need."""

from __future__ import annotations

import contextlib
import datetime
import os
import socket
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from bt.engine import watch
from bt.errors import ConfigError, UserError


@dataclass(frozen=True)
class World:
    """This process among all: global rank, number of ranks, and the device it computes on."""

    rank: int
    size: int
    device: torch.device

    @property
    def main(self) -> bool:
        return self.rank == 0


@contextlib.contextmanager
def joined(device: str = "auto", timeout_minutes: float = 30.0) -> Iterator[World]:
    """A program's work as one of the ranks that torchrun's variables describe, or alone without them.

    NCCL on GPUs, gloo on CPUs. device: auto takes a GPU where there is one. timeout_minutes: see bt.engine.watch.
    An error on one rank ends all of them, each with one line that says whose it was.
    """
    failed = True
    try:
        with watch.explained():
            yield join(device, timeout_minutes)
        failed = False
    finally:
        leave(failed)


def join(device: str = "auto", timeout_minutes: float = 30.0) -> World:
    """See `joined`."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("trainer.device=cuda: no GPU is visible here; allowed are auto, cpu")
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if device == "cuda":
        index, visible = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if index >= visible:
            raise ConfigError(f"process {index + 1} on {socket.gethostname()} has no GPU: {visible} are visible there")
        torch.cuda.set_device(index)
        where = torch.device("cuda", index)
    else:
        where = torch.device("cpu")
    if size > 1 and not dist.is_initialized():
        # gloo beside NCCL, so that small host-side numbers are summed without waiting for the GPU.
        backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
        # The collectives' own time-out, which can say less, comes after the watch's.
        timeout = datetime.timedelta(minutes=timeout_minutes + 1)
        try:
            store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
            store = dist.PrefixStore(meet(store, rank, size, timeout.total_seconds()), store)
        except (dist.DistError, ValueError) as error:
            place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            reason = f"rank {rank} of {size} on {socket.gethostname()} did not find the others at {place}"
            raise UserError(f"{reason} ({str(error).splitlines()[0]})") from error
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
        watch.start(store, rank, size, 60 * timeout_minutes)
    return World(rank, size, where)


def meet(store: dist.Store, rank: int, size: int, seconds: float) -> str:
    """A name that all ranks of this start have, and none of another.

    torchrun starts ranks again on the store that they had, and torch 2.15 then takes addresses for theirs that are of
    processes that are gone. So every rank says a word of its own, and goes by rank 0's answer to that very word.
    """
    word = uuid.uuid4().hex
    if rank > 0:
        store.set(f"bt/{rank}", word)
        name = store.get(f"bt/to/{word}").decode()
        store.add(f"bt/met/{name}", 1)
        return name
    answered: dict[str, str] = {}
    deadline = time.monotonic() + seconds
    while store.add(f"bt/met/{word}", 0) < size - 1:
        for key in [f"bt/{other}" for other in range(1, size)]:
            if store.check([key]) and (said := store.get(key).decode()) != answered.get(key):
                store.set(f"bt/to/{said}", word)
                answered[key] = said
        if time.monotonic() > deadline:
            missing = [str(other) for other in range(1, size) if f"bt/{other}" not in answered]
            raise UserError(f"no sign of rank {', '.join(missing[:8]) or '?'} of {size} in {seconds / 60:g} minutes")
        time.sleep(0.02)
    return word


def leave(failed: bool = False) -> None:
    """failed: others may be gone, so that leaving can take for ever; the watch then ends this process."""
    if not failed:
        watch.stop()
    if dist.is_initialized():
        dist.destroy_process_group()
    watch.stop()


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
