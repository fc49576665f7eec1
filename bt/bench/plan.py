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
import resource
import subprocess
import sys
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from bt.bench.cases import make_batch
from bt.engine.parallel import layers
from bt.engine.precision import AUTOCAST, autocast
from bt.engine.progress import table
from bt.models.bridgetower import build_tower
from bt.tasks.base import Context, TaskModel
from bt.tasks.itm import ITM
from bt.tasks.mlm import MLM

VOCABULARY = 50265
CPU = torch.device("cpu")
GB = 1e9


@dataclass(frozen=True)
class Size:
    """base, large: the paper's. small: for checking the memory model where main memory is little."""

    width: int
    depth: int
    patch: int
    image: int
    cross_layers: int = 6
    vocabulary: int = VOCABULARY


SIZES = {"small": Size(384, 12, 16, 224), "base": Size(768, 12, 16, 288), "large": Size(1024, 24, 14, 294)}


@dataclass
class Traced:
    """Of one rank's model. layers, rest: parameters of what FSDP gathers by itself, and of all else.

    fixed, per_pair: bytes that autograd keeps between the passes; largest: of one kept tensor, per pair.
    flops: of the forward passes, per pair. calls: how often each of `layers` runs in a step.
    """

    layers: list[int]
    rest: int
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
    heads = size.width // 64
    text = {
        "model_type": "roberta",
        "vocab_size": size.vocabulary,
        "hidden_size": size.width,
        "num_hidden_layers": size.depth,
        "num_attention_heads": heads,
        "intermediate_size": 4 * size.width,
        "max_position_embeddings": 514,
        "type_vocab_size": 1,
        "attention_probs_dropout_prob": 0.0,
    }
    architecture = {"width": size.width, "layers": size.depth, "patch_size": size.patch, "quick_gelu": True}
    encoders, cross = "bt.models.encoders", {"width": size.width, "heads": heads, "layers": size.cross_layers}
    tower = build_tower(
        {
            "vision": {
                "_target_": f"{encoders}.open_clip_vit.OpenClipVision",
                "image_size": size.image,
                "architecture": architecture,
            },
            "text": {"_target_": f"{encoders}.hf_text.HFText", "config": text},
        },
        {"_target_": "bt.models.bridges.add.AddBridge"},
        {"_target_": "bt.models.cross_modal.CoAttention", **cross},
        vocab_size=size.vocabulary,
    )
    for module in tower.cross.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
    tokenizer = SimpleNamespace(vocab_size=size.vocabulary, mask_id=4, special_ids=[0, 1, 2])
    context = Context(tower.width, tower.text.width, tower.vision.width, tokenizer)
    return TaskModel(tower, {"mlm": MLM(context), "itm": ITM(context)}).train()


def loss_of(model: TaskModel, batch, precision: str) -> torch.Tensor:
    with autocast(CPU, precision):
        results = model(batch)
    return sum(result.loss for result in results.values())


def trace(size: Size, tokens: int, precision: str, checkpointing: bool = False) -> Traced:
    """Runs the forward passes twice. tokens: of each text."""
    model = make_model(size)
    model.tower.set_gradient_checkpointing(checkpointing)
    blocks = layers(model)
    counts = [sum(p.numel() for p in block.parameters()) for block in blocks]
    traced = Traced(counts, sum(p.numel() for p in model.parameters()) - sum(counts))
    calls: Counter[int] = Counter()
    for number, block in enumerate(blocks):
        block.register_forward_hook(lambda *_, number=number: calls.update([number]))
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found = {
        pairs: _forward(model, make_batch(size, pairs, 1, (tokens, tokens)), precision, weights) for pairs in (2, 4)
    }
    (kept_two, _, flops_two), (kept_four, largest, flops_four) = found[2], found[4]
    traced.per_pair, traced.flops = (kept_four - kept_two) / 2, (flops_four - flops_two) / 2
    traced.fixed, traced.largest = kept_two - 2 * traced.per_pair, largest / 4
    traced.calls = [calls[number] // 2 for number in range(len(blocks))]
    return traced


def _forward(model: nn.Module, batch, precision: str, weights: set[int]) -> tuple[int, int, int]:
    """Bytes kept, bytes of the largest kept tensor, and operations."""
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor), FlopCounterMode(display=False) as counter:
        loss = loss_of(model, batch, precision)
    del loss
    return sum(kept.values()), max(kept.values()), counter.get_total_flops()


def memory(traced: Traced, parallel: str, devices: int, micro_batch: int, accumulation: int) -> float:
    """Bytes at the peak of a step with fused AdamW, fp32 weights; without what libraries and the allocator keep.

    One device: weights and two moments, and then either all activations or all gradients, as the backward pass frees
    the ones while it makes the others. DDP: gradients are there all the time, in its buckets. FSDP: shares, beside all
    that is no layer and two layers of the largest kind; accumulated gradients are whole.
    """
    every = 4.0 * traced.parameters
    activations = traced.fixed + micro_batch * traced.per_pair
    working = 3 * micro_batch * traced.largest  # of the layer that runs
    if devices == 1:
        first = every if accumulation > 1 else 0.0
        return 3 * every + working + max(activations + first, every)
    if parallel == "ddp":
        return 4 * every + working + activations
    gathered = 4.0 * (traced.rest + 2 * max(traced.layers))
    gradients = every if accumulation > 1 else gathered
    return 4 * every / devices + gathered + gradients + working + activations


def network(traced: Traced, parallel: str, devices: int, accumulation: int) -> float:
    """Bytes that a device sends in a step, by ring or tree: all-reduce of gradients, or for FSDP the gathering of each
    layer whenever it runs and once more for its backward pass, of the rest once, and one reduce-scatter."""
    share = (devices - 1) / devices
    if parallel == "ddp":
        return 2 * share * 4.0 * traced.parameters
    runs = zip(traced.layers, traced.calls, strict=True)
    gathers = sum(2 * calls * count for count, calls in runs) + traced.rest
    return share * 4.0 * (accumulation * gathers + traced.parameters)


def plan(traced: Traced, options: argparse.Namespace, parallel: str, devices: int) -> list[str]:
    """A row of the table."""
    per_rank = options.global_batch // devices
    micro = min(options.micro_batch, per_rank)
    accumulation = per_rank // micro
    compute = per_rank * traced.flops * (4 if options.gradient_checkpointing else 3) / (options.tflops * 1e12)
    sent = network(traced, parallel, devices, accumulation)
    exchange = sent / (options.network * GB)
    slow, fast = options.global_batch / (compute + exchange), options.global_batch / max(compute, exchange)
    local = min(devices, options.per_node)
    reading = slow / devices * local * options.image_bytes, fast / devices * local * options.image_bytes
    return [
        parallel if devices > 1 else "-",
        str(devices),
        f"{accumulation} x {micro}",
        f"{memory(traced, parallel, devices, micro, accumulation) / GB:.1f}",
        f"{sent / GB:.2f}",
        f"{compute:.3f}",
        f"{exchange:.3f}",
        f"{slow:,.0f} to {fast:,.0f}",
        f"{reading[0] / 1e6:.0f} to {reading[1] / 1e6:.0f}",
    ]


HEADER = (
    "parallel devices micro-batches|memory, GB|sent a step, GB|computing, s|network, s|pairs/s|reading, MB/s a node"
)


def measure(size: Size, pairs: int, tokens: int, steps: int = 2) -> dict[str, float]:
    """Peak of this process's memory in real steps on the CPU, over what it had before the model was built."""
    before = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    model = make_model(size)
    batch = make_batch(size, pairs, 1, (tokens, tokens))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    for _ in range(steps):
        loss_of(model, batch, "fp32").backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return {"bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before}


def measured(name: str, pairs: int, tokens: int) -> float:
    """`measure` in a process of its own, whose allocator gives back what is freed."""
    call = f"from bt.bench.plan import *; print(json.dumps(measure(SIZES[{name!r}], {pairs}, {tokens})))"
    around = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run([sys.executable, "-c", call], env=around, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])["bytes"]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bt.bench plan", description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=list(SIZES), default="base")
    parser.add_argument("--devices", default="1,8,64,512", help="numbers, comma-separated")
    parser.add_argument("--global-batch", type=int, default=4096, help="pairs a step (default: the official 4096)")
    parser.add_argument("--micro-batch", type=int, default=32, help="at most so many pairs per device and pass")
    parser.add_argument("--tokens", type=int, default=50, help="of a text")
    parser.add_argument("--precision", choices=list(AUTOCAST), default="bf16")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--per-node", type=int, default=8, help="devices of a machine")
    parser.add_argument("--tflops", type=float, default=200.0, help="that a device reaches in this work, not its peak")
    parser.add_argument("--network", type=float, default=25.0, help="GB/s that a device sends to others")
    parser.add_argument("--image-bytes", type=int, default=60_000, help="of an encoded image")
    parser.add_argument("--disk", type=float, default=1.0, help="GB/s of the file system that checkpoints go to")
    parser.add_argument("--check", action="store_true", help="compare the memory with that of real steps on this CPU")
    options = parser.parse_args(arguments)
    size = SIZES[options.size]
    if options.check:
        peak = measured(options.size, options.micro_batch, options.tokens)
        expected = memory(trace(size, options.tokens, "fp32"), "ddp", 1, options.micro_batch, 1)
        print(f"{options.size}, {options.micro_batch} pairs, fp32: planned {expected / GB:.2f} GB, measured", end=" ")
        print(f"{peak / GB:.2f} GB, planned : measured {expected / peak:.3f}")
        return
    traced = trace(size, options.tokens, options.precision, options.gradient_checkpointing)
    print(f"{options.size}: {json.dumps(asdict(size))}, {options.tokens} tokens, {options.precision}")
    print(f"{traced.parameters:,} parameters, {traced.rest:,} of them in no layer; ", end="")
    print(f"{3 * traced.flops / 1e12:.2f} TFLOP and {traced.per_pair / 1e6:.0f} MB of activations a pair")
    rows = []
    for devices in map(int, options.devices.split(",")):
        if options.global_batch % devices or options.global_batch // devices % min(
            options.micro_batch, options.global_batch // devices
        ):
            parser.error(
                f"--global-batch {options.global_batch} does not divide among {devices} devices in micro-batches"
            )
        rows += [plan(traced, options, p, devices) for p in (("ddp", "fsdp") if devices > 1 else ("ddp",))]
    header = (*HEADER.split("|")[0].split(), *HEADER.split("|")[1:])
    print("\n" + table(rows, header))
    whole = 12.0 * traced.parameters
    print(
        f"\na checkpoint: {whole / GB:.1f} GB, {whole / GB / options.disk:.0f} s to write, in the background;", end=" "
    )
    print(f"{whole / GB:.1f} GB of main memory on rank 0 for the copy")


if __name__ == "__main__":
    main()
