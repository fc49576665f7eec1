"""Training: a plain loop over batches."""

from __future__ import annotations

import signal
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from bt.data.batch import Batch
from bt.engine import watch
from bt.engine.distributed import all_sum, gather_objects
from bt.engine.parallel import Parallel, local
from bt.engine.precision import autocast
from bt.errors import UserError


class NonFiniteLoss(UserError):
    """A loss became NaN or infinite."""


@dataclass(frozen=True)
class Wishes:
    """What a rank asks of all after the running step: to save, or to save and stop."""

    stop: bool = False
    save: bool = False


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


class Trainer:
    """The state of a training run: model, optimizer, schedule and position.

    parallel: the model (bt.tasks.base.TaskModel) and how ranks share it; the optimizer holds its parameters.
    schedule: step -> factor on every group's peak learning rate.
    """

    def __init__(
        self,
        parallel: Parallel,
        optimizer: torch.optim.Optimizer,
        schedule: Callable[[int], float],
        *,
        seed: int,
        precision: str = "fp32",
        grad_clip: float | None = None,
    ):
        self.parallel, self.optimizer, self.schedule = parallel, optimizer, schedule
        self.model, self.world = parallel.model, parallel.world
        self.seed, self.precision, self.grad_clip = seed, precision, grad_clip
        self.scaler = parallel.scaler(enabled=precision == "fp16")
        self.names = list(self.model.objectives)
        self.weights = [self.model.objectives[name].weight for name in self.names]
        self.step = 0
        self._unchecked: Tensor | None = None
        self._keys: list[str] = []  # images of the last step
        self._bad: str | None = None  # what was not finite on this rank

    def train_step(self, micro_batches: list[Batch], wishes: Wishes | None = None) -> tuple[Tensor, Wishes]:
        """One optimizer step over this rank's micro-batches.

        Returns the losses, (objectives,) float64 on the device: this rank's share of each objective's mean over the
        global batch (their sum over ranks is the loss); and what any of the ranks wished. Raises NonFiniteLoss on all
        ranks if the loss before the last one was not finite on any of them.
        """
        wishes = wishes or Wishes()
        factor = self.schedule(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
        # Dropout is drawn from (seed, step, rank), so that resuming needs no saved generator.
        torch.manual_seed(int(np.random.SeedSequence([self.seed, self.step, self.world.rank]).generate_state(1)[0]))
        counts = sum(self.model.counts(batch) for batch in micro_batches)
        # On the host, in one collective: how many terms each mean has, what ranks wish, and whether all is well.
        flags = torch.tensor([wishes.stop, wishes.save, self._bad is not None], dtype=counts.dtype)
        agreed = all_sum(torch.cat([counts, flags]))
        counts, (stop, save, bad) = agreed[:-3].clamp(min=1.0), agreed[-3:].tolist()
        if bad:
            self._raise_bad()
        losses = self._backward(micro_batches, counts.tolist())
        if self.grad_clip is not None:
            self.scaler.unscale_(self.optimizer)
            self.parallel.clip_gradients(self.grad_clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        losses /= counts.to(losses.device)
        # Looking at a loss one step late keeps the host ahead of a GPU.
        self._look(self.step - 1)
        self._unchecked, self._keys = losses, [key for batch in micro_batches for key in batch.keys]
        return losses, Wishes(bool(stop), bool(save))

    def _backward(self, micro_batches: list[Batch], counts: list[float]) -> Tensor:
        """The gradients of the means over the global batch; returns this rank's sums, (objectives,) float64."""
        scale = [weight / count for weight, count in zip(self.weights, counts, strict=True)]
        losses = torch.zeros(len(self.names), dtype=torch.float64, device=self.world.device)
        for i, batch in enumerate(micro_batches):
            with self.parallel.accumulating(last=i == len(micro_batches) - 1):
                with autocast(self.world.device, self.precision):
                    results = self.parallel.forward(batch.to(self.world.device))
                total = sum(results[name].loss * share for name, share in zip(self.names, scale, strict=True))
                # Gradients are averaged over ranks; the mean over the global batch wants their sum.
                self.scaler.scale(total * self.world.size).backward()
            losses += torch.stack([results[name].loss.detach().double() for name in self.names])
        self.parallel.finish_backward()
        return losses

    def _look(self, step: int) -> None:
        """Notes whether the last loss, of step `step`, was NaN or infinite on this rank; waits for that step."""
        if self._unchecked is None:
            return
        losses, self._unchecked = self._unchecked, None
        bad = [name for name, value in zip(self.names, losses.tolist(), strict=True) if not np.isfinite(value)]
        if bad and self._bad is None:
            what = f"the loss of {', '.join(bad)} is not finite at step {step}"
            self._bad = f"{watch.here()}{what}; {self._images()}"

    def _raise_bad(self) -> None:
        found = [text for text in gather_objects(self._bad) if text]
        more = f"; and on {len(found) - 2} more ranks" if len(found) > 2 else ""
        raise NonFiniteLoss("; ".join(found[:2]) + more)

    def check_loss(self) -> None:
        """Raises NonFiniteLoss on all ranks, which must all call it, if the last loss of any is NaN or infinite."""
        self._look(self.step)
        if all_sum(torch.tensor([float(self._bad is not None)])).item():
            self._raise_bad()

    def check_finite(self) -> None:
        """As check_loss, and also if a weight is NaN or infinite."""
        self._look(self.step)
        named = list(self.model.named_parameters())
        finite = torch.stack([torch.isfinite(local(parameter)).all() for _, parameter in named]).tolist()
        if not all(finite) and self._bad is None:
            what = f"{named[finite.index(False)][0]} is not finite after step {self.step}"
            self._bad = f"{watch.here()}{what}; {self._images()}"
        self.check_loss()

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
    wants_save: Callable[[], bool],
    after_step: Callable[[int, Wishes], bool],
) -> None:
    """Steps from `trainer.step` to `total_steps`.

    batches: this rank's micro-batches from the first one of `trainer.step` on. wants_save(): whether this rank wishes
    for a checkpoint after the next step. after_step(step, wishes) is called after every step with the number of steps
    done and what any rank wished (to stop where it got a signal); where it returns False, training ends.
    """
    iterator: Iterator[Batch] = iter(batches)
    waited, mark, mark_step, images, skipped = 0.0, time.perf_counter(), trainer.step, 0, Counter()
    # What started the ranks asks the others to stop as soon as one is gone, before they can say why: so `explained` is
    # inside.
    with StopSignal() as stop, watch.explained():
        while trainer.step < total_steps:
            trainer.model.train()
            watch.mark(trainer.step + 1, "reading data")
            start = time.perf_counter()
            micro_batches = [next(iterator) for _ in range(accumulation)]
            waited += time.perf_counter() - start
            for batch in micro_batches:
                images += len(batch.keys)
                skipped.update(batch.skipped)
            watch.mark(trainer.step + 1, "training")
            losses, wishes = trainer.train_step(micro_batches, Wishes(bool(stop.name), wants_save()))
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
            if not after_step(trainer.step, wishes):
                return
            mark += time.perf_counter() - paused
