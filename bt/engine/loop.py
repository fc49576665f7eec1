"""Training: a plain loop over batches."""

from __future__ import annotations

import contextlib
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from bt.data.batch import Batch
from bt.engine.distributed import World, all_sum, gather_objects
from bt.engine.precision import autocast
from bt.errors import UserError


class NonFiniteLoss(UserError):
    """A loss became NaN or infinite."""


class Stopped(UserError):
    """A signal asked for the end; everything up to the running step is saved."""

    ends_sweep = True


@dataclass
class StepReport:
    """What one logging step says: its losses; speed, images read and images skipped by all ranks since the last one."""

    step: int
    epoch: float
    losses: dict[str, float]
    learning_rates: dict[str, float]
    pairs_per_second: float
    data_wait_share: float
    images: int
    skipped: dict[str, int] = field(default_factory=dict)


def wrap(model: nn.Module, world: World) -> nn.Module:
    """The module whose forward synchronises gradients over ranks.

    find_unused_parameters: which parameters a loss reaches depends on the objectives (MLM alone leaves the poolers
    out), and a parameter without gradient must stay without one, neither moved nor decayed.
    """
    if world.size == 1:
        return model
    ids = [world.device.index] if world.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=ids, find_unused_parameters=True)


class Trainer:
    """The state of a training run: model, optimizer, schedule and position.

    model: bt.tasks.base.TaskModel. schedule: step -> factor on every group's peak learning rate.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        schedule: Callable[[int], float],
        world: World,
        *,
        seed: int,
        precision: str = "fp32",
        grad_clip: float | None = None,
    ):
        self.model, self.optimizer, self.schedule, self.world = model, optimizer, schedule, world
        self.wrapped = wrap(model, world)
        self.seed, self.precision, self.grad_clip = seed, precision, grad_clip
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=precision == "fp16")
        self.names = list(model.objectives)
        self.weights = [model.objectives[name].weight for name in self.names]
        self.step = 0
        self._unchecked: Tensor | None = None
        self._keys: list[str] = []  # images of the last step

    def train_step(self, micro_batches: list[Batch], stop: bool = False) -> tuple[Tensor, bool]:
        """One optimizer step over this rank's micro-batches.

        Returns the losses, (objectives,) float64 on the device: this rank's share of each objective's mean over the
        global batch (their sum over ranks is the loss); and whether any rank asked to stop.
        """
        factor = self.schedule(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
        # Dropout is drawn from (seed, step, rank), so that resuming needs no saved generator.
        torch.manual_seed(int(np.random.SeedSequence([self.seed, self.step, self.world.rank]).generate_state(1)[0]))
        counts = sum(self.model.counts(batch) for batch in micro_batches)
        # On the host, in one collective: how many terms each mean has, and whether to stop.
        agreed = all_sum(torch.cat([counts, torch.tensor([float(stop)], dtype=counts.dtype)]))
        counts = agreed[:-1].clamp(min=1.0)
        scale = [weight / count for weight, count in zip(self.weights, counts.tolist(), strict=True)]
        losses = torch.zeros(len(self.names), dtype=torch.float64, device=self.world.device)
        for i, batch in enumerate(micro_batches):
            last = i == len(micro_batches) - 1
            with contextlib.nullcontext() if last or self.world.size == 1 else self.wrapped.no_sync():
                with autocast(self.world.device, self.precision):
                    results = self.wrapped(batch.to(self.world.device))
                total = sum(results[name].loss * share for name, share in zip(self.names, scale, strict=True))
                # The wrapper averages gradients over ranks; the mean over the global batch wants their sum.
                self.scaler.scale(total * self.world.size).backward()
            losses += torch.stack([results[name].loss.detach().double() for name in self.names])
        if self.grad_clip is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.grad_clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        losses /= counts.to(losses.device)
        # Looking at a loss one step late keeps the host ahead of a GPU.
        self.check_loss(self.step - 1)
        self._unchecked, self._keys = losses, [key for batch in micro_batches for key in batch.keys]
        return losses, bool(agreed[-1])

    def check_loss(self, step: int | None = None) -> None:
        """Raises NonFiniteLoss if the loss of the last step, number `step`, is NaN or infinite; waits for it."""
        if self._unchecked is None:
            return
        losses, self._unchecked = self._unchecked, None
        bad = [name for name, value in zip(self.names, losses.tolist(), strict=True) if not np.isfinite(value)]
        if bad:
            what = f"the loss of {', '.join(bad)} is not finite at step {step or self.step}"
            raise NonFiniteLoss(f"{what}; {self._images()}")

    def check_finite(self) -> None:
        """Raises NonFiniteLoss if the last loss or a weight is NaN or infinite."""
        self.check_loss()
        for name, parameter in self.model.named_parameters():
            if not torch.isfinite(parameter).all():
                raise NonFiniteLoss(f"{name} is not finite after step {self.step}; {self._images()}")

    def _images(self) -> str:
        more = f" and {len(self._keys) - 8} more" if len(self._keys) > 8 else ""
        return f"images: {', '.join(self._keys[:8])}{more}"

    def learning_rates(self) -> dict[str, float]:
        return {group["role"]: group["lr"] for group in self.optimizer.param_groups}


class StopSignal:
    """Remembers SIGTERM, SIGINT or SIGUSR2 until the running step is done; then a SIGINT ends at once.

    Not so the others: SLURM announces one preemption by SIGTERM and SIGUSR2 together.
    """

    def __init__(self):
        self.name: str | None = None

    def __enter__(self) -> StopSignal:
        self.previous = {s: signal.signal(s, self._note) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)}
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame) -> None:
        if self.name and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name


def fit(
    trainer: Trainer,
    batches: Iterable[Batch],
    *,
    total_steps: int,
    accumulation: int,
    global_batch: int,
    epoch_pairs: int,
    log_every: int,
    on_log: Callable[[StepReport], None],
    after_step: Callable[[int, bool], bool],
) -> None:
    """Steps from `trainer.step` to `total_steps`.

    batches: this rank's micro-batches from the first one of `trainer.step` on. after_step(step, stop) is called
    after every step with the number of steps done and whether a signal asked for the end (on any rank); where it
    returns False, training ends.
    """
    iterator: Iterator[Batch] = iter(batches)
    waited, mark, mark_step, images, skipped = 0.0, time.perf_counter(), trainer.step, 0, Counter()
    with StopSignal() as stop:
        while trainer.step < total_steps:
            trainer.model.train()
            start = time.perf_counter()
            micro_batches = [next(iterator) for _ in range(accumulation)]
            waited += time.perf_counter() - start
            for batch in micro_batches:
                images += len(batch.keys)
                skipped.update(batch.skipped)
            losses, stopping = trainer.train_step(micro_batches, bool(stop.name))
            if trainer.step % log_every == 0 or trainer.step == total_steps:
                trainer.check_loss()
                values = all_sum(losses.clone()).tolist()
                counts = gather_objects((images, skipped))
                elapsed = max(time.perf_counter() - mark, 1e-9)
                report = StepReport(
                    step=trainer.step,
                    epoch=trainer.step * global_batch / epoch_pairs,
                    losses=dict(zip(trainer.names, values, strict=True)),
                    learning_rates=trainer.learning_rates(),
                    pairs_per_second=(trainer.step - mark_step) * global_batch / elapsed,
                    data_wait_share=waited / elapsed,
                    images=sum(read for read, _ in counts),
                    skipped=dict(sum((left_out for _, left_out in counts), Counter())),
                )
                on_log(report)
                waited, mark, mark_step, images, skipped = 0.0, time.perf_counter(), trainer.step, 0, Counter()
            paused = time.perf_counter()
            if not after_step(trainer.step, stopping):
                return
            mark += time.perf_counter() - paused
