"""What the tests of several ranks run: alone in the test's process, or under torchrun (`python -m tests.engine.ranks`).

Trains a tiny tower for a few steps on real shards and stores the losses of every step and the weights.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from safetensors.torch import save_file
from torch import Tensor
from torch.profiler import profile

from bt.assemble import Data, build_model
from bt.config.entry import CONF_DIR
from bt.config.record import to_config
from bt.data.shards import ShardSet
from bt.data.text import make_tokenizer
from bt.engine import checkpoint, distributed
from bt.engine.distributed import World
from bt.engine.evaluate import evaluate
from bt.engine.loop import Trainer, Wishes
from bt.engine.optimizer import build_optimizer
from bt.engine.parallel import make_parallel, whole
from bt.engine.saver import Saver
from bt.tasks.base import Measuring

OVERRIDES = [
    "experiment=easy_vqa_pretrain",
    "encoder=tiny",
    "cross=tiny",
    "encoder.text.dropout=0",
    "cross.dropout=0",
    "global_batch=24",
    "data.texts_per_image=3",
    "eval.max_samples=7",
    "eval.batch=5",
    "optimizer.lr=1e-3",
]
# MLM, ITM with sampled images, gathered ITC; hard negatives of all ranks; without what depends on micro-batches.
SAMPLED = ["task.objectives.itm.negatives=sampled"]
HARD = ["task=pretrain_itc_hard", "task.objectives.itm.negatives=global"]
SUMS = [*SAMPLED, "~task.objectives.itc"]


@dataclass
class Case:
    """adamw: with the recipe's groups and clipped gradients; else SGD. resume, save: run directories."""

    name: str
    parallel: str = "ddp"
    task: list[str] = dataclasses.field(default_factory=lambda: list(SAMPLED))
    micro_batch: int | None = None
    precision: str = "fp32"
    adamw: bool = False
    steps: int = 3
    resume: str | None = None
    save: str | None = None
    evaluates: bool = False
    counts: bool = False


def train(data_dir: str, world: World, case: Case, share=make_parallel) -> dict[str, Tensor]:
    """ "losses", (steps, objectives) of the global batch, and the weights after the last step, by name.

    With `evaluates`, also the metrics of an evaluation before the first step and after the last one, as
    "before/<name>" and "after/<name>"; with `counts`, how many collectives exchanged gradients in the last step.
    """
    with initialize_config_dir(CONF_DIR, version_base="1.3"):
        cfg = to_config(compose("config", [*OVERRIDES, *case.task, f"data.dir={data_dir}"]))
    cfg.trainer.micro_batch = case.micro_batch
    shards = ShardSet(data_dir, "train")
    tokenizer = make_tokenizer(texts=shards.all_texts(), **cfg.encoder.text["tokenizer"])
    model = build_model(cfg, tokenizer, shards.labels)
    data = Data(cfg, world, model, tokenizer)
    plan = data.plan(shards)
    parallel = share(model.to(world.device).train(), world, case.parallel)
    optimizer = build_optimizer(model, cfg.optimizer) if case.adamw else sgd(model)
    start = 0
    if case.resume:
        start = checkpoint.resume(checkpoint.last_checkpoint(Path(case.resume)), model, optimizer)["step"]
    clip = 1.0 if case.adamw else None
    trainer = Trainer(parallel, optimizer, lambda step: 1.0, seed=0, precision=case.precision, grad_clip=clip)
    trainer.step = start
    found: dict[str, Tensor] = {}
    measure = lambda: evaluate(model, data.evaluation("val"), world, Measuring("val")).metrics  # noqa: E731
    if case.evaluates:
        found |= {f"before/{name}": torch.tensor(value) for name, value in measure().items()}
        model.train()
    batches = iter(data.train(shards, plan, start, start + case.steps))
    losses = []
    for number in range(case.steps):
        micro_batches = [next(batches) for _ in range(plan.accumulation)]
        with profile() if case.counts and number == case.steps - 1 else contextlib.nullcontext() as trace:
            # The last rank alone wishes something, and rank 0 writes down what it hears.
            local, wishes = trainer.train_step(micro_batches, Wishes(save=world.rank == world.size - 1))
        losses.append(distributed.all_sum(local.clone()))
        found["wishes"] = torch.tensor([wishes.stop, wishes.save]).float()
    trainer.check_finite()
    if case.counts:
        found["collectives"] = torch.tensor(exchanges(trace))
    if case.evaluates:
        found |= {f"after/{name}": torch.tensor(value) for name, value in measure().items()}
    if case.save:
        saver = Saver(Path(case.save), world)
        saver.save(step=trainer.step, model=model, optimizer=optimizer, state={})
        saver.wait()
        distributed.barrier()
    found |= {key: whole(value.detach()).cpu().clone() for key, value in model.state_dict().items()}
    return {"losses": torch.stack(losses).cpu() if losses else torch.empty(0), **found}


def sgd(model: torch.nn.Module) -> torch.optim.Optimizer:
    """Sharded and whole parameters in groups of their own, as torch wants them."""
    kinds: dict[type, list[torch.nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            kinds.setdefault(type(parameter.data), []).append(parameter)
    optimizer = torch.optim.SGD([{"params": named} for named in kinds.values()], lr=0.05)
    for group in optimizer.param_groups:
        group["peak_lr"] = 0.05
    return optimizer


def exchanges(trace: profile) -> int:
    """How many collectives of a step carried gradients."""
    names = [event.name for event in trace.events()]
    return sum(name in ("c10d::allreduce_", "c10d::_reduce_scatter_base_") for name in names)


def main() -> None:
    data_dir, out, *cases = sys.argv[1:]
    torch.set_num_threads(1)
    world = distributed.join(os.environ.get("TEST_DEVICE", "cpu"))
    for text in cases:
        case = Case(**json.loads(text))
        found = train(data_dir, world, case)
        if world.main:
            save_file(found, Path(out) / f"{case.name}.safetensors")
    distributed.leave()


if __name__ == "__main__":
    main()
