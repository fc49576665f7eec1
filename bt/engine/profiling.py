"""A look into the steps of a run: torch.profiler's trace, and its costliest operations (trainer.profile)."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from bt.engine.progress import table

FIRST, STEPS = 3, 3  # steps that are left to pass, the last of them as a warm-up; steps that are recorded
COSTLIEST = 10


class StepProfiler:
    """Records the fourth to sixth step of this start of a run: call `step` after each.

    Then folder/trace.json.gz is there, for https://ui.perfetto.dev, and folder/operations.txt: what took the most time
    by itself on the device.
    """

    def __init__(self, folder: Path, device: torch.device):
        self.folder, self.device = folder, device
        kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
        self._profile: profile | None = profile(
            activities=kinds,
            schedule=schedule(wait=FIRST - 1, warmup=1, active=STEPS, repeat=1),
            on_trace_ready=self._write,
        )
        self._profile.start()

    def step(self) -> None:
        if self._profile is not None:
            self._profile.step()
            if (self.folder / "operations.txt").exists():
                self.close()

    def close(self) -> None:
        """Ends the recording; of a run with fewer steps, what there was of them is written."""
        if self._profile is not None:
            self._profile.stop()
            self._profile = None

    def _write(self, found: profile) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        found.export_chrome_trace(str(self.folder / "trace.json.gz"))
        (self.folder / "operations.txt").write_text(costliest(found, self.device) + "\n")


def costliest(found: profile, device: torch.device) -> str:
    """A table: the operations with the most time of their own, per step."""
    attribute = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    every = found.key_averages()
    events = [event for event in every if not event.key.startswith("ProfilerStep")]
    steps = max(sum(event.count for event in every if event.key.startswith("ProfilerStep")), 1)
    total = sum(getattr(event, attribute) for event in events)
    events = sorted(events, key=lambda event: -getattr(event, attribute))[:COSTLIEST]
    rows = []
    for event in events:
        microseconds = getattr(event, attribute)
        rows.append(
            [event.key, microseconds / 1e3 / steps, 100 * microseconds / max(total, 1e-9), event.count // steps]
        )
    return table(rows, ("operation", "ms a step", "% of all", "calls a step"))
