"""Use of the machine that rank 0 is on, for those who ask for it (tracking.system_metrics)."""

from __future__ import annotations

import contextlib
from typing import Any

from bt.errors import ConfigError


class SystemMetrics:
    """Processor, main memory and GPUs, as metrics of the journal, which brings them to MLflow once."""

    def __init__(self):
        try:
            import psutil
            import pynvml
        except ImportError as error:
            raise ConfigError(
                f"tracking.system_metrics=true needs {error.name}: pip install -e '.[tracking]'"
            ) from error
        self.psutil, self.nvml = psutil, pynvml
        self.gpus: list[Any] = []
        with contextlib.suppress(pynvml.NVMLError):  # no driver, no GPUs
            pynvml.nvmlInit()
            self.gpus = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        psutil.cpu_percent()  # counts from here

    def sample(self) -> dict[str, float]:
        """{"system/cpu_percent": of all cores since the last sample, "system/memory_bytes": in use, and each GPU's}."""
        found = {
            "system/cpu_percent": self.psutil.cpu_percent(),
            "system/memory_bytes": float(self.psutil.virtual_memory().used),
        }
        for number, gpu in enumerate(self.gpus):
            with contextlib.suppress(self.nvml.NVMLError):
                found[f"system/gpu{number}_percent"] = float(self.nvml.nvmlDeviceGetUtilizationRates(gpu).gpu)
                found[f"system/gpu{number}_memory_bytes"] = float(self.nvml.nvmlDeviceGetMemoryInfo(gpu).used)
        return found
