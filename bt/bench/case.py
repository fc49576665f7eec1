"""One comparison of the benchmark."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass
class Case:
    """Two ways to do the same work.

    ours, peer: do it once, and return what must agree (losses and gradient norm, or outputs). count: `unit`s of work
    that this is, without "/s". check: returns the disagreement where the outputs themselves are random. tolerance: the
    largest disagreement. threads: of torch; None for its own choice. holds: what must live as long as the case.
    """

    count: float
    ours: Callable[[], Tensor]
    peer: Callable[[], Tensor]
    unit: str = "pairs/s"
    check: Callable[[], float] | None = None
    tolerance: float = 1e-4
    threads: int | None = None
    holds: Any = None

    def disagreement(self) -> float:
        """Relative, of what both sides return if there is no `check`; doubles as the warm-up."""
        ours, peer = self.ours(), self.peer()
        return self.check() if self.check else ((ours - peer).abs().max() / peer.abs().max()).item()
