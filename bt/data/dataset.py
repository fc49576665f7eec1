"""Loaders: a plan and a batch maker behind worker processes, one item a micro-batch."""

from __future__ import annotations

import copy
import dataclasses
import signal
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.utils.data import DataLoader, Dataset

from bt.data.batch import Batch
from bt.data.collate import BatchMaker
from bt.data.device import Pending
from bt.data.mix import MixedPlan
from bt.data.plan import EvalPlan, TrainPlan
from bt.data.shards import BadSample
from bt.data.transforms import UNDECODABLE
from bt.errors import DataError, UserError


@dataclass(frozen=True)
class _Failure:
    """A user's error on its way out of a worker, where raising it would wrap it in a worker's traceback."""

    kind: type[UserError]
    message: str


class BatchDataset(Dataset):
    """Position in a plan -> batch. Map style: a batch depends on its position alone, so workers do not matter."""

    def __init__(self, plan: TrainPlan | MixedPlan | EvalPlan, maker: BatchMaker):
        self.plan, self.maker = plan, maker

    def __getitem__(self, position: int) -> Batch | _Failure:
        try:
            return self.maker(self.plan.cut(position))
        except UserError as error:
            return _Failure(DataError if isinstance(error, BadSample) else type(error), str(error))

    def finish(self, position: int, batch: Batch) -> Batch | _Failure:
        """The batch of a worker with its images decoded on the device, where they were left to it.

        If one cannot be, the batch is made anew on the CPU, which finds the bad sample before pairs are drawn.
        """
        if not isinstance(batch.images, Pending):
            return batch
        try:
            return dataclasses.replace(batch, images=self.maker.transform.finish(batch.images))
        except UNDECODABLE:
            maker = copy.copy(self.maker)
            maker.transform = maker.transform.cpu
            return BatchDataset(self.plan, maker)[position]


def _start_worker(_: int) -> None:
    # Signals that ask a run to stop reach the whole process group (Ctrl-C, torchrun, SLURM). The main process still
    # needs its workers to finish the step and ends them itself; if it dies, they notice.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


def _as_is(item):
    return item


class Loader:
    """Batches at `positions`, in order. Iterating raises the UserError of a worker as it was.

    workers: processes that read ahead, 0 reads in this process. prefetch: batches that each worker keeps ready.
    """

    def __init__(self, dataset: BatchDataset, positions: range, *, workers: int, prefetch: int, pin_memory: bool):
        self.positions = positions
        self._loader = DataLoader(
            dataset,
            batch_size=None,
            sampler=positions,
            collate_fn=_as_is,
            num_workers=workers,
            prefetch_factor=prefetch if workers else None,
            worker_init_fn=_start_worker,
            pin_memory=pin_memory,
            # It draws a base seed for its workers, which must not come out of the generator that dropout uses.
            generator=torch.Generator(),
        )

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def images(self) -> int:
        """Images of the whole plan, all ranks together."""
        return len(self._loader.dataset.plan.index.samples)

    def __iter__(self) -> Iterator[Batch]:
        for position, item in zip(self.positions, self._loader, strict=True):
            if isinstance(item, Batch):
                item = self._loader.dataset.finish(position, item)
            if isinstance(item, _Failure):
                raise item.kind(item.message)
            yield item


def train_loader(
    plan: TrainPlan | MixedPlan,
    maker: BatchMaker,
    *,
    start_step: int,
    total_steps: int,
    workers: int = 0,
    prefetch: int = 4,
    pin_memory: bool = False,
) -> Loader:
    """The micro-batches of this rank from `start_step` to the end, `plan.accumulation` a step."""
    positions = range(start_step * plan.accumulation, total_steps * plan.accumulation)
    return Loader(BatchDataset(plan, maker), positions, workers=workers, prefetch=prefetch, pin_memory=pin_memory)


def eval_loader(
    plan: EvalPlan, maker: BatchMaker, *, workers: int = 0, prefetch: int = 4, pin_memory: bool = False
) -> Loader:
    """The batches of an evaluation that are this rank's."""
    dataset = BatchDataset(plan, maker)
    return Loader(dataset, plan.positions, workers=workers, prefetch=prefetch, pin_memory=pin_memory)
