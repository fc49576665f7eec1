"""One rank of the released code's two-process ITC case; started by torchrun from test_distributed.py."""

from __future__ import annotations

import sys

import torch
from safetensors.torch import save_file

from bt.data.batch import Batch, Texts
from bt.engine import distributed
from bt.engine.loop import wrap
from bt.tasks.base import TaskModel
from bt.tasks.itc import ITC
from tests.golden_helpers import CONTRASTIVE, golden_tower, load_golden, tensors
from tests.tasks.test_golden import CONTEXT


def main() -> None:
    torch.set_num_threads(1)
    world = distributed.join("cpu")
    raw = tensors(f"bridgetower/two_process/batch_rank{world.rank}")
    count = len(raw["text_ids"])
    model = load_golden(TaskModel(golden_tower(), {"itc": ITC(CONTEXT, size=CONTRASTIVE)})).train()
    batch = Batch(
        images=raw["image"],
        texts=Texts(raw["text_ids"], raw["text_masks"].bool()),
        pairs=torch.arange(count)[:, None].expand(count, 2).contiguous(),
        # The case has one-hot targets although images repeat: every image counts as its own.
        image_ids=torch.arange(count) + world.rank * count,
        pair_ids=torch.arange(count) + world.rank * count,
        targets={"itc": {"pair": torch.arange(count)}},
    )
    wrapped = wrap(model, world)  # kept: the backward pass of a wrapper that is gone does not synchronise
    result = wrapped(batch)["itc"]
    (result.loss / count).backward()
    loss = distributed.gather_objects(result.loss.item() / count)
    if world.main:
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        save_file({"losses": torch.tensor(loss), **gradients}, sys.argv[1])
    distributed.leave()


if __name__ == "__main__":
    main()
