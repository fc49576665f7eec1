"""Every combination of pre-training objectives in conf/task/: its weights weigh, as in a sum of gradients."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from bt.assemble import Data, build_model
from bt.config.entry import CONF_DIR
from bt.data.shards import ShardSet
from bt.data.text import make_tokenizer
from bt.engine.distributed import World
from bt.engine.loop import Trainer
from bt.engine.parallel import Parallel
from tests.test_config import composed

COMBINATIONS = sorted(path.stem for path in Path(CONF_DIR, "task").glob("pretrain*.yaml"))
WEIGHTS = (0.25, 2.0, 0.5, 3.0)
RATE = 1.0


def step(task: str, shards: Path, weights: dict[str, float] | None = None) -> tuple[Tensor, list[str], Tensor]:
    """The change of all parameters by one step of plain SGD in two micro-batches, the objectives, their losses."""
    cfg = composed(
        f"task={task}", "encoder=tiny", "cross=tiny", "encoder.text.dropout=0", "cross.dropout=0", "global_batch=12",
        "trainer.micro_batch=6", "data=easy_vqa", f"data.dir={shards}", "data.workers=0", "data.texts_per_image=1",
    )  # fmt: skip
    for name, node in cfg.task.objectives.items():
        node["weight"] = node["weight"] if weights is None else weights.get(name, 0.0)
    data = ShardSet(str(shards), "train")
    tokenizer = make_tokenizer(texts=data.all_texts(), **cfg.encoder.text["tokenizer"])
    world = World(0, 1, torch.device("cpu"))
    model = build_model(cfg, tokenizer, data.labels)
    loaders = Data(cfg, world, model, tokenizer)
    plan = loaders.plan(data)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    optimizer.param_groups[0]["peak_lr"] = RATE
    before = torch.cat([parameter.detach().flatten().clone() for parameter in model.parameters()])
    trainer = Trainer(Parallel(model.train(), world), optimizer, lambda step: 1.0, seed=0)
    batches = iter(loaders.train(data, plan, 0, 1))
    losses, _ = trainer.train_step([next(batches) for _ in range(plan.accumulation)])
    after = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    return (after - before) / -RATE, trainer.names, losses


@pytest.mark.parametrize("task", COMBINATIONS)
def test_weights_weigh(few_dir, task):
    """The gradient of a weighted combination is that sum of the gradients which each of its losses has alone."""
    _, names, losses = step(task, few_dir)
    alone = {name: step(task, few_dir, {name: 1.0})[0] for name in names}
    weights = dict(zip(names, WEIGHTS, strict=False))
    assert len(names) == len(weights) > 1 and all(loss > 0 for loss in losses)
    both, _, _ = step(task, few_dir, weights)
    expected = sum(weight * alone[name] for name, weight in weights.items())
    scale = expected.abs().max()
    assert (both - expected).abs().max() <= 1e-4 * scale
    for name in names:
        # Not a sum that any of them could be missing from.
        assert (weights[name] * alone[name]).abs().max() > 1e-2 * scale


def test_the_combinations_that_there_are():
    objectives = {task: list(composed(f"task={task}").task.objectives) for task in COMBINATIONS}
    assert objectives["pretrain"] == ["mlm", "itm"]
    assert objectives["pretrain_itc"] == ["mlm", "itm", "itc"]
    for task in COMBINATIONS:
        cfg = composed(f"task={task}")
        assert all(node["weight"] == 1.0 for node in cfg.task.objectives.values()), "official: plain sums"
