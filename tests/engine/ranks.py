"""What the tests of several ranks run: alone in the test's process, or under torchrun (`python -m tests.engine.ranks`).

Trains a tiny tower for a few steps with plain SGD on real shards and stores the losses of every step and the weights.
"""

from __future__ import annotations

import sys

import torch
from hydra import compose, initialize_config_dir
from safetensors.torch import save_file
from torch import Tensor

from bt.assemble import Data, build_model
from bt.config.entry import CONF_DIR
from bt.config.record import to_config
from bt.data.shards import ShardSet
from bt.data.text import make_tokenizer
from bt.engine import distributed
from bt.engine.distributed import World
from bt.engine.loop import Trainer

STEPS = 3
OVERRIDES = [
    "experiment=easy_vqa_pretrain",
    "encoder=tiny",
    "cross=tiny",
    "encoder.text.dropout=0",
    "cross.dropout=0",
    "global_batch=24",
    "data.texts_per_image=3",
]
# MLM, ITM with sampled images, gathered ITC; and with hard negatives of all ranks.
SAMPLED = ["task.objectives.itm.negatives=sampled"]
HARD = ["task=pretrain_itc_hard", "task.objectives.itm.negatives=global"]


def train(
    data_dir: str, world: World, task: list[str] = SAMPLED, micro_batch: int | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Losses (steps, objectives) of the global batch and the weights after STEPS steps."""
    with initialize_config_dir(CONF_DIR, version_base="1.3"):
        cfg = to_config(compose("config", [*OVERRIDES, *task, f"data.dir={data_dir}"]))
    cfg.trainer.micro_batch = micro_batch
    shards = ShardSet(data_dir, "train")
    tokenizer = make_tokenizer(texts=shards.all_texts(), **cfg.encoder.text["tokenizer"])
    model = build_model(cfg, tokenizer, shards.labels)
    data = Data(cfg, world, model, tokenizer)
    plan = data.plan(shards)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for group in optimizer.param_groups:
        group["peak_lr"] = 0.05
    trainer = Trainer(model.train(), optimizer, lambda step: 1.0, world, seed=0)
    batches = iter(data.train(shards, plan, 0, STEPS))
    losses = []
    for _ in range(STEPS):
        local, _ = trainer.train_step([next(batches) for _ in range(plan.accumulation)])
        losses.append(distributed.all_sum(local.clone()))
    return torch.stack(losses), {key: value.detach().clone() for key, value in model.state_dict().items()}


def main() -> None:
    data_dir, out, *task = sys.argv[1:]
    torch.set_num_threads(1)
    world = distributed.join("cpu")
    losses, weights = train(data_dir, world, task)
    if world.main:
        save_file({"losses": losses, **weights}, out)
    distributed.leave()


if __name__ == "__main__":
    main()
