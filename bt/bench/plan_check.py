"""One rank's real training steps on the CPU, measured, for `python -m bt.bench plan --check`, which starts it."""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bt.bench.memory import resident
from bt.bench.models import Size, make_batch
from bt.bench.plan import SIZES, loss_of, make_model
from bt.engine import distributed
from bt.engine.distributed import World
from bt.engine.parallel import make_parallel

WARM_UP = Size(width=64, depth=1, heads=1, image=32, cross_layers=1, vocabulary=100)
STEPS = 2  # the second one has the optimizer's moments


class Sent(TorchDispatchMode):
    """Counts the bytes that a rank sends in collectives of tensors, by ring."""

    def __init__(self, ranks: int):
        super().__init__()
        self.share, self.bytes = (ranks - 1) / ranks, 0.0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            name = function._schema.name
            if name == "c10d::allreduce_":
                self.bytes += 2 * self.share * sum(tensor.nbytes for tensor in args[0])
            elif name == "c10d::_allgather_base_":
                self.bytes += self.share * args[0].nbytes
            elif name == "c10d::_reduce_scatter_base_":
                self.bytes += self.share * args[1].nbytes
        return function(*args, **(kwargs or {}))


def steps(size: Size, world: World, work: dict[str, Any]) -> float:
    """Trains on a random batch; returns the bytes that were sent in the last step."""
    model = make_model(size)
    model.tower.set_gradient_checkpointing(work["checkpointing"])
    parallel = make_parallel(model, world, work["parallel"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    batch = make_batch(size, work["micro_batch"], 1, (work["tokens"], work["tokens"]))
    for _ in range(STEPS):
        with Sent(world.size) as sent:
            for part in range(work["accumulation"]):
                with parallel.accumulating(last=part == work["accumulation"] - 1):
                    loss_of(parallel.forward, batch, "fp32").backward()
            parallel.finish_backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return sent.bytes


def main() -> None:
    work, out = json.loads(sys.argv[1]), Path(sys.argv[2])
    with distributed.joined("cpu") as world:
        steps(WARM_UP, world, work)  # what libraries load and keep from their first use on is no part of the plan
        before = resident("VmRSS")
        sent = steps(SIZES[work["size"]], world, work)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
        (out / f"{world.rank}.json").write_text(json.dumps({"bytes": peak, "sent": sent}))


if __name__ == "__main__":
    main()
