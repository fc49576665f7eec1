"""What a run leaves to be read: report.json, curves, and the circumstances that it ran in."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import resource
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from bt.engine.mlflow_store import metrics_of
from bt.engine.tracking import Journal

PACKAGES = ("torch", "torchvision", "transformers", "open_clip_torch", "timm", "webdataset", "hydra-core", "mlflow")
REPOSITORY = Path(__file__).resolve().parents[2]


def git_state() -> dict[str, Any]:
    """The code's commit as `git_revision`, and whether tracked files were changed as `git_dirty`; None without git, and
    of an installed package, which may lie in a clone of something else."""
    if not (REPOSITORY / ".git").exists():
        return {"git_revision": None, "git_dirty": None}

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(REPOSITORY), *arguments], capture_output=True, text=True, timeout=20, check=True
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip()

    changes = git("status", "--porcelain", "--untracked-files=no")
    return {"git_revision": git("rev-parse", "HEAD"), "git_dirty": None if changes is None else bool(changes)}


def environment(device: torch.device) -> dict[str, Any]:
    """Machine, device and versions."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        versions[package] = importlib.metadata.version(package)
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "device_type": device.type,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "versions": versions,
    }


def tracking_tags(device: torch.device) -> dict[str, str]:
    """Git state and environment as flat text, for a tracking store."""
    around = environment(device)
    versions = {f"version.{name}": version for name, version in around.pop("versions").items()}
    return {key: str(value) for key, value in (git_state() | around | versions).items()}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def peak_memory(device: torch.device) -> dict[str, int]:
    """Bytes: the most that this process held in main memory, and of the GPU's memory where there is one."""
    # Linux counts in KiB, macOS in bytes.
    unit = 1 if platform.system() == "Darwin" else 1024
    peak = {"peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if device.type == "cuda":
        peak["peak_device_memory_bytes"] = torch.cuda.max_memory_allocated(device)
    return peak


def write_report(run_dir: Path, report: Mapping[str, Any], name: str = "report.json") -> Path:
    """Writes run_dir/report.json, whole or not at all."""
    path = Path(run_dir) / name
    temporary = path.with_name(f".{name}-{os.getpid()}")
    temporary.write_text(json.dumps(report, indent=1) + "\n")
    temporary.replace(path)
    return path


def plot_curves(run_dir: Path, name: str = "curves.png") -> Path | None:
    """Losses and validation metrics over steps, from metrics.jsonl; None where there is nothing to draw.

    A metric is drawn with the losses if the last part of its name is "loss", with the evaluations if its name is
    "task/split/metric"; other entries (rates, epochs) are left out. Sends nothing to a display.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    curves: dict[str, list[tuple[int, float]]] = {}
    for record in Journal(run_dir).records():
        for key, value in metrics_of(record):
            curves.setdefault(key, []).append((record["step"], value))
    losses = {k: v for k, v in curves.items() if k.split("/")[-1] == "loss"}
    metrics = {k: v for k, v in curves.items() if k.count("/") >= 2 and k not in losses}
    panels = [(title, lines) for title, lines in (("loss", losses), ("evaluation", metrics)) if lines]
    if not panels:
        return None
    figure = Figure(figsize=(6.4 * len(panels), 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (title, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for key, points in sorted(lines.items()):
            # An evaluation is a few points, which a line alone would hide.
            axes.plot(*zip(*points, strict=True), label=key, marker="o" if len(points) < 30 else None, markersize=3)
        axes.set(xlabel="step", title=title)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    path = Path(run_dir) / name
    temporary = path.with_name(f".{os.getpid()}-{name}")
    figure.savefig(temporary, dpi=120)
    temporary.replace(path)
    return path
