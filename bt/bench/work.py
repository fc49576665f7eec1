"""Work of a step, counted and not timed: the same on every machine.

python -m bt.bench.work [--write]   (prints it, or writes what `make test` holds it against)
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bt.bench.cases import irtr_batch
from bt.bench.models import SIZES, make_batch, make_model, pretraining_objectives
from bt.bench.retrieval_cases import open_gallery
from bt.data.batch import Batch
from bt.engine.cost import counting_flops
from bt.tasks.base import Context, Objective, TaskModel
from bt.tasks.contrastive import Contrastive
from bt.tasks.irtr import IRTR
from bt.tasks.itc import ITC
from bt.tasks.itm import ITM
from bt.tasks.itm_itc import HardITM
from bt.tasks.mlm import MLM
from bt.tasks.vqa import VQA

COMMITTED = Path(__file__).with_name("work.json")
SIZE = SIZES["tiny"]
# Operations for which the host would wait for a GPU: their result is a number, or a shape that depends on numbers.
SYNCS = ("aten._local_scalar_dense", "aten.equal", "aten.nonzero", "aten.masked_select", "aten._unique2", "aten.unique")


class SyncCounter(TorchDispatchMode):
    """Counts operations that would make the host wait."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        name = str(function.overloadpacket)
        masks = name == "aten.index" and any(
            part is not None and part.dtype in (torch.bool, torch.uint8) for part in arguments[1]
        )
        self.count += name.startswith(SYNCS) or masks
        return function(*arguments, **(keywords or {}))


def contrast_targets(batch: Batch, name: str) -> Batch:
    """Targets of the contrastive objectives, which only say how many pairs there are."""
    return replace(batch, targets={**batch.targets, name: {"pair": torch.arange(len(batch.pairs))}})


def hard_batch() -> Batch:
    batch = contrast_targets(make_batch(SIZE, 3, 2), "itc")
    draws = torch.rand(2, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    batch.targets["itm"] = {"image_draw": draws[0], "text_draw": draws[1], "text_key": torch.arange(6)}
    return batch


def vqa_batch() -> Batch:
    batch = make_batch(SIZE, 3, 2)
    batch.targets = {"vqa": {"scores": torch.rand(6, SIZE.answers), "answered": torch.ones(6, dtype=torch.bool)}}
    return batch


Objectives = Callable[[Context], dict[str, Objective]]
TASKS: dict[str, tuple[Objectives, Callable[[], Batch]]] = {
    "pretrain": (pretraining_objectives, lambda: make_batch(SIZE, 3, 2)),
    "pretrain_sampled": (pretraining_objectives, lambda: make_batch(SIZE, 4, 1, false_images=True)),
    "pretrain_itc_hard": (lambda c: {"mlm": MLM(c), "itc": ITC(c), "itm": HardITM(c)}, hard_batch),
    "vqa": (lambda c: {"vqa": VQA(c)}, vqa_batch),
    "retrieval_itm": (lambda c: {"irtr": IRTR(c, texts=7), "itm": ITM(c)}, lambda: irtr_batch(SIZE, 3, 8)),
    "contrastive": (
        lambda c: {"contrastive": Contrastive(c)},
        lambda: contrast_targets(make_batch(SIZE, 4, 1), "contrastive"),
    ),
}


def count_encoded(model: TaskModel, step: Callable[[], Any]) -> dict[str, int]:
    """Floating-point operations of a step, calls of both encoders and the rows they took, and host waits."""
    rows, calls = {"images": 0, "texts": 0}, {"images": 0, "texts": 0}

    def note(kind: str):
        def hook(_, arguments: tuple[Tensor, ...]) -> None:
            rows[kind] += len(arguments[0])
            calls[kind] += 1

        return hook

    handles = [
        part.register_forward_pre_hook(note(kind))
        for kind, part in (("images", model.tower.vision), ("texts", model.tower.text))
    ]
    with SyncCounter() as syncs, counting_flops() as counter:
        step()
    for handle in handles:
        handle.remove()
    return {
        "flop": counter.get_total_flops(),
        "vision_calls": calls["images"],
        "images": rows["images"],
        "text_calls": calls["texts"],
        "texts": rows["texts"],
        "host_waits": syncs.count,
    }


def of_task(name: str) -> dict[str, int]:
    """The work of a training step, without the optimizer."""
    torch.manual_seed(0)
    objectives, make = TASKS[name]
    model, batch = make_model(SIZE, objectives), make()
    return count_encoded(model, lambda: sum(result.loss for result in model(batch).values()).backward())


def of_retrieval() -> dict[str, int]:
    """The work of scoring 3 images with 6 texts, all pairs."""
    torch.manual_seed(0)
    model = make_model(SIZE, lambda context: {"irtr": IRTR(context)}).eval()

    @torch.no_grad()
    def score() -> None:
        gallery = open_gallery(model, make_batch(SIZE, 3, 2))
        gallery.scores(gallery.states_of(gallery.chunks[0]), torch.cartesian_prod(torch.arange(3), torch.arange(6)))

    return count_encoded(model, score)


def count_all() -> dict[str, dict[str, int]]:
    return {name: of_task(name) for name in TASKS} | {"retrieval": of_retrieval()}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bt.bench.work", description=__doc__.partition("\n")[0])
    parser.add_argument("--write", action="store_true", help=f"write {COMMITTED.name}")
    text = json.dumps(count_all(), indent=1)
    if parser.parse_args().write:
        COMMITTED.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
