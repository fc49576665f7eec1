"""One comparison of the benchmark."""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from bt.engine.cost import counting_flops

REPETITIONS = 3


@dataclass
class Case:
    """Two ways to do the same work.

    ours, peer: do it once, and return what must agree: losses and gradient norm (one-dimensional), or outputs.
    count: `unit`s of work that this is, without "/s". check: returns the disagreement where the outputs themselves are
    random. tolerance: the largest disagreement. threads: of torch; None for its own choice. holds: what must live as
    long as the case.
    whole: how often each side's call is needed for all of the work. notes: more for the JSON.
    costs: what one repetition costs both sides; None: seconds. For what is no time, `unit` has no "/s", `ours` and
    `peer` of the JSON are costs over `count`, and `repetitions` can be fewer. flops: count floating-point operations,
    to give the share of `peak` (operations a second; None: of a large matrix product here) that they reach.
    """

    count: float
    ours: Callable[[], Tensor]
    peer: Callable[[], Tensor]
    unit: str = "pairs/s"
    check: Callable[[], float] | None = None
    tolerance: float = 1e-4
    threads: int | None = None
    holds: Any = None
    whole: tuple[float, float] = (1.0, 1.0)
    notes: dict[str, Any] = field(default_factory=dict)
    costs: Callable[[], tuple[float, float]] | None = None
    repetitions: int = REPETITIONS
    flops: bool = False
    peak: float | None = None

    def compare(self) -> tuple[float, tuple[int, int]]:
        """Disagreement, relative: of numbers each by itself, of outputs by the largest, or what `check` says; and both
        sides' floating-point operations. Doubles as the warm-up."""
        (ours, of_ours), (peer, of_peer) = (self._counted(side) for side in (self.ours, self.peer))
        if self.check:
            return self.check(), (of_ours, of_peer)
        by = peer.abs() if peer.dim() == 1 and len(peer) < 10 else peer.abs().max()
        return ((ours - peer).abs() / by).max().item(), (of_ours, of_peer)

    def _counted(self, side: Callable[[], Tensor]) -> tuple[Tensor, int]:
        with prepared(side):
            return self._count(side)

    def _count(self, side: Callable[[], Tensor]) -> tuple[Tensor, int]:
        if not self.flops:
            return side(), 0
        with counting_flops() as counter:
            return side(), counter.get_total_flops()

    def measure(self, name: str, peak: float | None = None) -> dict[str, Any]:
        """What goes to the JSON. peak: floating-point operations a second of a large matrix product."""
        difference, flops = self.compare()
        if not difference <= self.tolerance:
            raise SystemExit(f"error: {name}: both sides differ by {difference:.1e}, more than {self.tolerance:.0e}")
        # In turn, so that a machine that slows down slows both.
        costs = [self.costs() if self.costs else self._seconds() for _ in range(self.repetitions)]
        ratios = [peer / ours for ours, peer in costs]
        middle = [statistics.median(column) for column in zip(*costs, strict=True)]
        ours, peer = (cost / self.count if self.costs else self.count / cost for cost in middle)
        result = {
            "name": name,
            "ratio": statistics.median(ratios),
            "ours": ours,
            "peer": peer,
            "unit": self.unit,
            "spread": [min(ratios), max(ratios)],
            "loss_difference": difference,
        }
        if self.flops:
            shares = [count * times / seconds for count, times, seconds in zip(flops, self.whole, middle, strict=True)]
            result["gflop"] = [count / 1e9 for count in flops]
            peak = self.peak or peak
            result["gemm_share"] = [share / peak for share in shares] if peak else None
        return result | self.notes

    def _seconds(self) -> tuple[float, float]:
        found = []
        for side, times in zip((self.ours, self.peer), self.whole, strict=True):
            with prepared(side):
                found.append(seconds(side) * times)
        return tuple(found)


@contextlib.contextmanager
def prepared(side: Callable[[], Any]) -> Iterator[None]:
    """Within it the side has what it needs, if it has a `prepare` and a `release`."""
    getattr(side, "prepare", lambda: None)()
    try:
        yield
    finally:
        getattr(side, "release", lambda: None)()
        gc.collect()


@contextlib.contextmanager
def kept_by_autograd(weights: Iterable[nn.Parameter]) -> Iterator[dict[int, int]]:
    """What a forward pass within it keeps for its backward pass beside these weights: bytes of each storage, by its
    address."""
    known = {parameter.untyped_storage().data_ptr() for parameter in weights}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        yield kept


def seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
