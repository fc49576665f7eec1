"""What a pre-training step (MLM + ITM) needs on how many devices: memory, network, time, reading, checkpoints.

python -m bt.bench plan --size base --devices 1,8,64,512 --tflops 200 --network 25

Memory of activations and operations are not estimated by formulas: a step's forward passes run here, on the CPU, with
two and with four pairs, and what autograd keeps and what is computed is counted; both grow in proportion to the pairs.
The rest is arithmetic on numbers of parameters. Speed of devices and network are what you give.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from bt.bench import models
from bt.bench.case import kept_by_autograd
from bt.bench.models import Size, make_batch
from bt.engine.parallel import layers
from bt.engine.precision import AUTOCAST, autocast
from bt.engine.progress import table
from bt.models.checkpointing import MODES
from bt.tasks.base import TaskModel

ITC_WIDTH = 256
CPU = torch.device("cpu")
GB = 1e9


# base, large: the paper's. small, medium: for checking the memory model where main memory is little.
SIZES = {
    "small": Size(width=384, heads=6, image=224),
    "medium": Size(width=512, heads=8, image=256),
    "base": Size(),
    "large": Size(width=1024, depth=24, heads=16, patch=14, image=294),
}
SHOWN = ("width", "depth", "patch", "image", "cross_layers", "vocabulary")  # what the plan depends on


@dataclass
class Traced:
    """Of one rank's model. layers, rest: parameters of what FSDP gathers by itself, and of all else; heads: of these,
    those of the objectives, whose gradients are the first.

    fixed, per_pair: bytes that autograd keeps between the passes; largest: of one kept tensor, per pair.
    flops: of the forward passes, per pair. calls: how often each of `layers` runs in a step.
    """

    layers: list[int]
    rest: int
    heads: int
    calls: list[int] = field(default_factory=list)
    fixed: float = 0.0
    per_pair: float = 0.0
    largest: float = 0.0
    flops: float = 0.0

    @property
    def parameters(self) -> int:
        return sum(self.layers) + self.rest


def make_model(size: Size) -> TaskModel:
    """With dropout of hidden states, but not of attention: CPUs keep the attention matrix for that, GPUs do not."""
    model = models.make_model(size, models.pretraining_objectives, dropout=0.1)
    for module in model.tower.cross.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
    return model


def loss_of(model: TaskModel, batch, precision: str) -> torch.Tensor:
    with autocast(CPU, precision):
        results = model(batch)
    return sum(result.loss for result in results.values())


def trace(size: Size, tokens: int, precision: str, checkpointing: str = "none") -> Traced:
    """Runs the forward passes twice. tokens: of each text."""
    model = make_model(size)
    model.tower.set_gradient_checkpointing(checkpointing)
    blocks = layers(model)
    counts = [sum(p.numel() for p in block.parameters()) for block in blocks]
    every, heads = (sum(p.numel() for p in part.parameters()) for part in (model, model.objectives))
    traced = Traced(counts, every - sum(counts), heads)
    calls: Counter[int] = Counter()
    for number, block in enumerate(blocks):
        block.register_forward_hook(lambda *_, number=number: calls.update([number]))
    found = {pairs: _forward(model, make_batch(size, pairs, 1, (tokens, tokens)), precision) for pairs in (2, 4)}
    (kept_two, _, flops_two), (kept_four, largest, flops_four) = found[2], found[4]
    traced.per_pair, traced.flops = (kept_four - kept_two) / 2, (flops_four - flops_two) / 2
    traced.fixed, traced.largest = kept_two - 2 * traced.per_pair, largest / 4
    traced.calls = [calls[number] // 2 for number in range(len(blocks))]
    return traced


def _forward(model: nn.Module, batch, precision: str) -> tuple[int, int, int]:
    """Bytes kept, bytes of the largest kept tensor, and operations."""
    with kept_by_autograd(model.parameters()) as kept, FlopCounterMode(display=False) as counter:
        loss = loss_of(model, batch, precision)
    del loss
    return sum(kept.values()), max(kept.values()), counter.get_total_flops()


def memory(traced: Traced, parallel: str, devices: int, micro_batch: int, accumulation: int) -> float:
    """Bytes at the peak of a step with fused AdamW, fp32 weights; without what libraries and the allocator keep.

    One device: weights and two moments, and then either all activations, with the heads' gradients, or all gradients,
    as the backward pass frees the ones while it makes the others. DDP: gradients are there all the time, in its
    buckets, and accumulated ones beside them. FSDP: shares, beside all that is no layer and two layers of the largest
    kind; gradients of what is no layer are whole until the end of the backward pass, accumulated ones too.
    """
    every = 4.0 * traced.parameters
    activations = traced.fixed + micro_batch * traced.per_pair
    working = 3 * micro_batch * traced.largest  # of the layer that runs
    first = every if accumulation > 1 else 4.0 * traced.heads
    if devices == 1:
        return 3 * every + working + max(activations + first, every)
    if parallel == "ddp":
        return (5 if accumulation > 1 else 4) * every + working + activations
    gathered = 4.0 * (traced.rest + 2 * max(traced.layers))
    return 3 * every / devices + gathered + working + max(activations + first, every / devices + 4.0 * traced.rest)


def network(traced: Traced, parallel: str, devices: int, accumulation: int) -> float:
    """Bytes that a device sends in a step, by ring: all-reduce of gradients, or for FSDP the gathering of each layer
    whenever it runs and once more for its backward pass, of the rest once a micro-batch, and one reduce-scatter (two of
    layers that run more than once: what was accumulated before goes ahead)."""
    share = (devices - 1) / devices
    if parallel == "ddp":
        return 2 * share * 4.0 * traced.parameters
    runs = list(zip(traced.layers, traced.calls, strict=True))
    gathers = sum(2 * calls * count for count, calls in runs) + traced.rest
    ahead = sum(count for count, calls in runs if calls > 1) if accumulation > 1 else 0
    return share * 4.0 * (accumulation * gathers + traced.parameters + ahead)


def row(traced: Traced, options: argparse.Namespace, parallel: str, devices: int) -> list[str]:
    """A row of the table. Exchange and computing may overlap in part: from one after the other to only the longer."""
    per_rank = options.global_batch // devices
    micro = min(options.micro_batch, per_rank)
    accumulation = per_rank // micro
    compute = per_rank * traced.flops * (4 if options.gradient_checkpointing == "full" else 3) / (options.tflops * 1e12)
    sent = network(traced, parallel, devices, accumulation)
    exchange = sent / GB / (options.inside if devices <= options.per_node else options.network)
    speeds = [options.global_batch / seconds for seconds in (compute + exchange, max(compute, exchange))]
    node = min(devices, options.per_node) / devices
    return [
        parallel if devices > 1 else "-",
        str(devices),
        f"{accumulation} x {micro}",
        f"{memory(traced, parallel, devices, micro, accumulation) / GB:.1f}",
        f"{sent / GB:.2f}",
        f"{compute:.3f}",
        f"{exchange:.3f}",
        " to ".join(f"{speed:,.0f}" for speed in speeds),
        " to ".join(f"{speed * node:,.0f}" for speed in speeds),
        " to ".join(f"{speed * node * options.image_bytes / 1e6:.0f}" for speed in speeds),
    ]


HEADER = (
    "parallel", "devices", "micro-batches", "memory, GB", "sent a step, GB", "computing, s", "network, s", "pairs/s",
    "pairs/s a node", "reading, MB/s a node",
)  # fmt: skip


def show(traced: Traced, options: argparse.Namespace, where: list[tuple[str, int]]) -> None:
    """Prints the table and what does not depend on the number of devices."""
    size, whole = SIZES[options.size], 12 * traced.parameters / GB
    shown = json.dumps({key: getattr(size, key) for key in SHOWN})
    print(f"{options.size}: {shown}, {options.tokens} tokens, {options.precision}")
    print(
        f"{traced.parameters:,} parameters, {traced.rest:,} of them in no layer; {3 * traced.flops / 1e12:.2f} TFLOP "
        f"and {traced.per_pair / 1e6:.0f} MB of activations a pair\n"
    )
    print(table([row(traced, options, parallel, devices) for parallel, devices in where], HEADER))
    # Forward each rank's share of all features, backward an all-reduce of their gradients.
    itc = 3 * 2 * ITC_WIDTH * 4 * options.global_batch
    print(
        f"\na checkpoint: {whole:.1f} GB, {whole / options.disk:.0f} s to write, in the background; {whole:.1f} GB of "
        f"main memory on rank 0 for the copy\nITC over all devices: {itc / 1e6:.0f} MB more sent a step"
    )


def check(options: argparse.Namespace, traced: Traced, parallel: str, devices: int) -> str:
    """One line: a rank's peak memory and bytes sent in real steps here (bt.bench.plan_check), beside the plan's."""
    work = {key: getattr(options, key) for key in ("size", "micro_batch", "accumulation", "tokens")}
    work |= {"parallel": parallel, "checkpointing": options.gradient_checkpointing}
    start = ["torch.distributed.run", "--standalone", f"--nproc-per-node={devices}", "-m"] if devices > 1 else []
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "-m", *start, "bt.bench.plan_check", json.dumps(work), out]
        # The allocator gives back at once what is freed, so that the process's memory is what its tensors take.
        done = subprocess.run(command, env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}, stdout=sys.stderr)
        if done.returncode:
            sys.exit(f"the steps failed: {' '.join(command)}")
        ranks = [json.loads(path.read_text()) for path in Path(out).iterdir()]
    planned = memory(traced, parallel, devices, options.micro_batch, options.accumulation)
    measured = max(rank["bytes"] for rank in ranks)
    line = (
        f"{options.size}, {parallel} on {devices}, {options.accumulation} x {options.micro_batch} pairs, fp32: "
        f"memory planned {planned / GB:.2f} GB, measured {measured / GB:.2f} GB ({planned / measured:.3f})"
    )
    if devices > 1:
        sent, counted = network(traced, parallel, devices, options.accumulation), ranks[0]["sent"]
        line += f"; sent planned {sent / GB:.3f} GB, counted {counted / GB:.3f} GB ({sent / counted:.3f})"
    return line


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bt.bench plan", description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=list(SIZES), default="base")
    parser.add_argument("--devices", default="1,8,64,512", help="numbers, comma-separated")
    parser.add_argument("--global-batch", type=int, default=4096, help="pairs a step (default: the official 4096)")
    parser.add_argument("--micro-batch", type=int, default=32, help="at most so many pairs per device and pass")
    parser.add_argument("--tokens", type=int, default=50, help="of a text")
    parser.add_argument("--precision", choices=list(AUTOCAST), default="bf16")
    parser.add_argument("--gradient-checkpointing", choices=MODES, default="none")
    parser.add_argument("--per-node", type=int, default=8, help="devices of a machine")
    parser.add_argument("--tflops", type=float, default=200.0, help="that a device reaches in this work, not its peak")
    parser.add_argument("--inside", type=float, default=200.0, help="GB/s that a device sends to others of its machine")
    parser.add_argument("--network", type=float, default=25.0, help="GB/s that a device sends to other machines")
    parser.add_argument("--image-bytes", type=int, default=60_000, help="of an encoded image")
    parser.add_argument("--disk", type=float, default=1.0, help="GB/s of the file system that checkpoints go to")
    parser.add_argument("--check", action="store_true", help="compare with real steps on this CPU, in fp32")
    parser.add_argument("--accumulation", type=int, default=1, help="micro-batches of such a step")
    options = parser.parse_args(arguments)
    options.devices = [int(number) for number in options.devices.split(",")]
    for number in options.devices if not options.check else []:
        pairs = options.global_batch // number
        if options.global_batch % number or pairs % min(options.micro_batch, pairs):
            parser.error(f"--global-batch {options.global_batch}: no equal micro-batches on {number} devices")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    where = [(kind, number) for number in options.devices for kind in (("ddp", "fsdp") if number > 1 else ("ddp",))]
    precision = "fp32" if options.check else options.precision
    traced = trace(SIZES[options.size], options.tokens, precision, options.gradient_checkpointing)
    if not options.check:
        show(traced, options, where)
        return
    for kind, number in where:
        print(check(options, traced, kind, number), flush=True)


if __name__ == "__main__":
    main()
