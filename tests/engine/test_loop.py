"""The training step and the evaluation loop."""

import numpy as np
import pytest
import torch
from torch import nn

from bt.data.batch import Batch, Texts
from bt.engine.distributed import World
from bt.engine.evaluate import evaluate
from bt.engine.loop import NonFiniteLoss, Trainer, Wishes
from bt.engine.metrics import Means
from bt.engine.parallel import Parallel
from bt.tasks.base import Evaluator, Measuring, Result

ALONE = World(0, 1, torch.device("cpu"))


class Squares(nn.Module):
    """An objective of one weight: the sum over pairs of (weight x - target)^2, counted by pairs."""

    summarises = True

    def __init__(self, weight: float):
        super().__init__()
        self.weight = weight
        self.factor = nn.Parameter(torch.tensor(2.0))

    def count(self, targets):
        return len(targets["x"])

    def forward(self, targets):
        errors = (self.factor * targets["x"] - targets["y"]) ** 2
        metrics = {"error": errors, "weighted": (errors, targets["x"])}
        return Result(errors.sum(), metrics)

    def predictions(self, batch, result):
        return [{"error": round(value, 3)} for value in result.metrics["error"].tolist()]

    def summary(self, rows):
        return {"largest": max(row["error"] for row in rows)}


class Model(nn.Module):
    def __init__(self, **weights: float):
        super().__init__()
        self.objectives = nn.ModuleDict({name: Squares(weight) for name, weight in weights.items()})
        self.evaluators, self.batch_metrics = {}, True

    def forward(self, batch):
        return {name: objective(batch.targets[name]) for name, objective in self.objectives.items()}

    def counts(self, batch):
        counts = [objective.count(batch.targets[name]) for name, objective in self.objectives.items()]
        return torch.tensor(counts, dtype=torch.float64)


def make_batch(**targets) -> Batch:
    named = {
        name: {key: torch.tensor(values) for key, values in zip("xy", pair, strict=True)}
        for name, pair in targets.items()
    }
    empty = torch.zeros(0, dtype=torch.int64)
    return Batch(empty, Texts(empty, empty), empty, empty, empty, targets=named, keys=["picture-7", "picture-8"])


def trainer(model, **options) -> Trainer:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for group in optimizer.param_groups:
        group["peak_lr"], group["role"] = 0.1, "base"
    return Trainer(Parallel(model, ALONE), optimizer, lambda step: 1.0 / (step + 1), seed=0, **options)


def test_loss_weights_scale_the_gradient_and_means_run_over_all_micro_batches():
    model = Model(a=1.0, b=0.5)
    losses, wishes = trainer(model).train_step(
        [make_batch(a=([1.0, 2.0], [0.0, 0.0]), b=([1.0], [1.0])), make_batch(a=([3.0], [0.0]), b=([2.0], [0.0]))]
    )
    # Means over the three resp. two terms, not means of micro-batch means: (4 + 16 + 36) / 3 and (1 + 16) / 2.
    assert losses.tolist() == pytest.approx([56 / 3, 8.5])
    assert wishes == Wishes(stop=False, save=False)
    # d/df of the means, times the weight: a: 2 f (1 + 4 + 9) / 3; b: 0.5 * (2 (f - 1) + 2 f 4) / 2.
    assert model.objectives["a"].factor.item() == pytest.approx(2 - 0.1 * 2 * 2 * 14 / 3, rel=1e-5)
    assert model.objectives["b"].factor.item() == pytest.approx(2 - 0.1 * 0.5 * (2 + 16) / 2, rel=1e-6)


def test_schedule_and_clipping():
    model = Model(a=1.0)
    run = trainer(model, grad_clip=1.0)
    run.train_step([make_batch(a=([10.0], [0.0]))])
    assert model.objectives["a"].factor.item() == pytest.approx(1.9, rel=1e-5)  # gradient 400, clipped to 1
    run.train_step([make_batch(a=([10.0], [0.0]))])
    assert model.objectives["a"].factor.item() == pytest.approx(1.85, rel=1e-5)  # half the rate
    assert run.learning_rates() == {"base": 0.05}


def test_dropout_depends_on_seed_step_and_rank_alone():
    def draws(step: int, rank: int, seed: int = 0) -> float:
        model = Model(a=1.0)
        run = trainer(model)
        run.seed = seed
        run.step, run.world = step, World(rank, 1, torch.device("cpu"))
        torch.manual_seed(np.random.randint(1 << 30))
        run.train_step([make_batch(a=([1.0], [0.0]))])
        return torch.rand(()).item()

    assert draws(3, 0) == draws(3, 0)
    assert len({draws(3, 0), draws(4, 0), draws(3, 1), draws(3, 0, seed=1)}) == 4


def test_a_loss_that_is_not_finite_stops_with_step_and_images():
    model = Model(a=1.0)
    run = trainer(model)
    run.train_step([make_batch(a=([float("nan")], [0.0]))])
    with pytest.raises(NonFiniteLoss, match=r"loss of a is not finite at step 1; images: picture-7, picture-8"):
        run.check_finite()


def test_weights_that_are_not_finite_are_not_saved():
    model = Model(a=1.0)
    run = trainer(model)
    run.train_step([make_batch(a=([1.0], [0.0]))])
    run.check_finite()
    model.objectives["a"].factor.data.fill_(float("inf"))
    with pytest.raises(NonFiniteLoss, match=r"objectives\.a\.factor is not finite after step 1"):
        run.check_finite()


def test_evaluation_means_are_over_all_terms():
    model = Model(a=1.0)
    batches = [make_batch(a=([1.0, 2.0], [0.0, 0.0])), make_batch(a=([3.0], [0.0]))]
    batches[0].skipped, batches[1].skipped = {"a.tar: bad": 2}, {"a.tar: bad": 1, "b.tar: worse": 1}
    found = evaluate(model, batches, ALONE, Measuring("val"), predictions=True)
    assert found.metrics == pytest.approx(
        {
            "a/val/error": 56 / 3,
            "a/val/loss": 56 / 3,
            "a/val/weighted": (4 + 16 * 2 + 36 * 3) / 6,
            "a/val/largest": 36.0,
        }
    )
    assert found.rows == {"a": [{"error": 4.0}, {"error": 16.0}, {"error": 36.0}]}
    assert found.skipped == {"a.tar: bad": 3, "b.tar: worse": 1}
    assert not model.training


def test_evaluators_are_measured_beside_or_in_place_of_the_objectives():
    class Batches(Evaluator):
        def __call__(self, model, batches, world, how):
            return {"batches": float(len([*batches])), "precision": how.precision == "bf16"}

    model = Model(a=1.0)
    model.evaluators = {"whole": Batches()}
    batches = [make_batch(a=([1.0], [0.0])), make_batch(a=([3.0], [0.0]))]
    found = evaluate(model, batches, ALONE, Measuring("test", "bf16")).metrics
    assert found["whole/test/batches"] == 2 and found["whole/test/precision"] and found["a/test/error"] == 20
    model.batch_metrics = False
    assert evaluate(model, batches, ALONE, Measuring("test", "bf16")).metrics.keys() == {
        "whole/test/batches",
        "whole/test/precision",
    }


def test_means_keep_the_digits_of_long_sums():
    means = Means(torch.device("cpu"))
    for _ in range(20):
        means.add("x", torch.full((100_000,), 0.1))
    assert means.compute()["x"] == pytest.approx(float(np.float32(0.1)), rel=1e-12)
