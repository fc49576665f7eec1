"""Peak memory of a training step, each side in a process of its own."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor

from bt.bench.case import Case, seconds
from bt.bench.models import SIZES, Size, make_batch, make_ours, make_peer, make_step

STEPS = 2


def resident(field: str) -> int:
    """Bytes of this process's memory: VmRSS now, VmHWM at its peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}")


def run_side(side: str, size: Size, images: int) -> dict:
    """Losses, bytes of weights and of the peak of two steps with AdamW, over what it had before; seconds of one step.

    side: "peer", or ours with this gradient checkpointing.
    """
    from bt.bench.cases import peer_pretraining_step

    torch.manual_seed(0)
    before = resident("VmRSS")
    batch, peer = make_batch(size, images, 1), make_peer(size)
    if side == "peer":
        model = peer
    else:
        model = make_ours(size, peer)
        model.tower.set_gradient_checkpointing(side)
        del peer
        gc.collect()
    weights = resident("VmRSS") - before
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    step = peer_pretraining_step(model, batch) if side == "peer" else make_step(model, batch)
    step.prepare()
    losses = [step().tolist() for _ in range(STEPS - 1)]
    last = seconds(lambda: losses.append(step().tolist()))
    return {"losses": losses, "weights": weights, "peak": resident("VmHWM") - before, "seconds": last}


def in_a_process(side: str, size_name: str, images: int) -> dict:
    # The allocator gives back what is freed, so that the peak is that of tensors.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "131072"}
    command = [sys.executable, "-m", "bt.bench.memory", side, size_name, str(images)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"error: memory: the process of {side} ended with {done.returncode}: {done.stderr[-400:]}")
    return json.loads(done.stdout.splitlines()[-1])


def memory(size: Size, images: int = 8) -> Case:
    """Peak of a pre-training step of MLM + ITM with AdamW, 1 text per image: ours with cheap gradient checkpointing.

    In the notes also without it.
    """
    (name,) = (name for name, known in SIZES.items() if known == size)
    found: dict[str, dict] = {}

    def losses(side: str) -> Tensor:
        found[side] = in_a_process(side, name, images)
        return torch.tensor(found[side]["losses"][0])

    def ours() -> Tensor:
        torch.testing.assert_close(losses("none"), losses("cheap"), rtol=1e-4, atol=0)
        return torch.tensor(found["cheap"]["losses"][0])

    notes = {"pairs": images, "sides": found}
    costs = lambda: (found["cheap"]["peak"] / 1e9, found["peer"]["peak"] / 1e9)  # noqa: E731
    return Case(1, ours, lambda: losses("peer"), unit="GB", costs=costs, repetitions=1, notes=notes)


if __name__ == "__main__":
    print(json.dumps(run_side(sys.argv[1], SIZES[sys.argv[2]], int(sys.argv[3]))))
