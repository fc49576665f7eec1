"""What this machine has for `bt`, and what is missing for what: `python -m bt.doctor`.

Ends with status 1 if something that every run needs is broken; what only some commands need may be missing.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

# What each extra of pyproject.toml is for.
EXTRAS = {
    "dev": "make test, make lint, make demo",
    "slurm": "hydra/launcher=slurm",
    "tracking": "MLflow on PostgreSQL, tracking.system_metrics=true",
    "app": "make app",
    "onnx": "bt.checkpoint export --format onnx",
    "notebooks": "make notebooks",
    "docs": "make docs",
}
PROGRAMS = {
    "git": "the revision in report.json",
    "sbatch": "hydra/launcher=slurm (SLURM's clients)",
    "npm": "python -m bt.samples icons",
    "chromium": "the browser test of make app",
    "chromedriver": "the browser test of make app (Debian's chromium-driver)",
    "psql": "make mlflow-server (Debian's postgresql)",
}
SHARED_MEMORY = 1 << 30  # bytes that loader workers like to have


@dataclass(frozen=True)
class Check:
    """state: ok; missing: only what `matters` names suffers; broken: no run works. found: version, place, ..."""

    name: str
    state: Literal["ok", "missing", "broken"]
    found: str
    matters: str = ""


def checks() -> Iterator[Check]:
    """Everything that is looked at, one after the other."""
    for look in (python, requirements, libraries, configuration, devices, folders, shared_memory, tracking, programs):
        try:
            yield from look()
        except Exception as error:  # whatever is wrong with a machine must not hide the rest
            yield Check(look.__name__, "broken", f"{type(error).__name__}: {error}")


def python() -> Iterator[Check]:
    state = "ok" if sys.version_info >= (3, 11) else "broken"
    yield Check("python", state, f"{platform.python_version()} ({sys.executable})", "3.11 or newer")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Check("machine", "ok", f"{platform.platform()}, {cores} cores")


def requirements() -> Iterator[Check]:
    """The packages of pyproject.toml, as the installation recorded them."""
    from packaging.requirements import Requirement

    try:
        listed = [Requirement(line) for line in importlib.metadata.requires("bt") or ()]
    except importlib.metadata.PackageNotFoundError:
        yield Check("bt", "broken", "not installed", "pip install -e . (make venv)")
        return
    yield Check("bt", "ok", f"{importlib.metadata.version('bt')} ({Path(__file__).parent})")
    for requirement in listed:
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield _requirement(requirement, "broken", "every run")
    known = importlib.metadata.metadata("bt").get_all("Provides-Extra") or []
    for extra in known:
        lacking = []
        for requirement in listed:
            belongs = requirement.marker is not None and requirement.marker.evaluate({"extra": extra})
            if belongs and not requirement.marker.evaluate({"extra": ""}):
                found = _requirement(requirement, "missing", "")
                lacking += [f"{found.name}: {found.found}"] if found.state != "ok" else []
        state = "missing" if lacking else "ok"
        yield Check(f"extra {extra}", state, "; ".join(lacking) or "complete", EXTRAS.get(extra, ""))


def _requirement(requirement, otherwise: Literal["missing", "broken"], matters: str) -> Check:
    try:
        version = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return Check(requirement.name, otherwise, "not installed", matters)
    if not requirement.specifier.contains(version, prereleases=True):
        return Check(requirement.name, otherwise, f"{version} is not {requirement.specifier}", matters)
    return Check(requirement.name, "ok", version, matters)


def libraries() -> Iterator[Check]:
    """Compiled parts that fail only when they are loaded."""
    for name, matters in (("torchvision", "its operators load beside this torch"), ("transformers", "text encoders")):
        try:
            importlib.import_module(name)
        except Exception as error:
            yield Check(f"import {name}", "broken", f"{type(error).__name__}: {error}".split("\n")[0], matters)


def configuration() -> Iterator[Check]:
    from bt.config import compose_run
    from bt.config.entry import CONF_DIR

    compose_run("trainer=smoke", "experiment=vqa_base")
    yield Check("conf", "ok", CONF_DIR)


def devices() -> Iterator[Check]:
    import torch

    if not torch.cuda.is_available():
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built for the CPU"
        yield Check("gpu", "missing", f"none is visible; {built}", "training at full size")
        return
    for number in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(number)
        total = about.total_memory / 2**30
        torch.ones(8, device=f"cuda:{number}").sum().item()
        yield Check(f"gpu {number}", "ok", f"{about.name}, {total:.0f} GiB")
    bf16 = torch.cuda.is_bf16_supported()
    yield Check("bf16", "ok" if bf16 else "missing", "yes" if bf16 else "no", "trainer.precision=bf16")


def folders() -> Iterator[Check]:
    for name, folder in (("working directory", Path.cwd()), ("temporary files", Path(tempfile.gettempdir()))):
        free = f"{shutil.disk_usage(folder).free / 2**30:.0f} GiB free"
        try:
            with tempfile.TemporaryFile(dir=folder):
                pass
            yield Check(name, "ok", f"{folder}, {free}")
        except OSError as error:
            yield Check(name, "broken", f"{folder} cannot be written: {error.strerror}", "run directories")


def shared_memory(folder: Path = Path("/dev/shm")) -> Iterator[Check]:
    matters = "data.workers above 0 (in a container: --shm-size)"
    if not folder.is_dir():
        yield Check("shared memory", "missing", f"no {folder}", matters)
        return
    size = shutil.disk_usage(folder).total
    state = "ok" if size >= SHARED_MEMORY else "missing"
    yield Check("shared memory", state, f"{folder}, {size / 2**30:.2f} GiB", matters)


def tracking() -> Iterator[Check]:
    from bt.engine.mlflow_store import default_uri, make_client, without_secrets

    uri = default_uri(None)
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).exists():
        yield Check("mlflow store", "ok", f"{uri}, made by the first run")
        return
    try:
        make_client(uri, 5).search_experiments(max_results=1)
        yield Check("mlflow store", "ok", without_secrets(uri))
    except Exception as error:
        reason = without_secrets(f"{uri}: {type(error).__name__}: {error}".split("\n")[0])
        yield Check("mlflow store", "missing", reason, "runs are sent when it answers, or by bt.sync")


def programs(find: Callable[[str], str | None] = shutil.which) -> Iterator[Check]:
    for name, matters in PROGRAMS.items():
        place = find(name)
        yield Check(name, "ok" if place else "missing", place or "not found", matters)


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bt.doctor", description=__doc__.partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="for programs")
    arguments = parser.parse_args(given)
    try:
        broken = [check.name for check in _shown(arguments.json) if check.state == "broken"]
    except BrokenPipeError:  # the reader, as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return
    if broken:
        sys.exit(f"broken: {', '.join(broken)}")


def _shown(as_json: bool) -> list[Check]:
    """All checks, printed."""
    found = []
    for check in checks():
        found.append(check)
        if not as_json:
            needed = f"  [{check.matters}]" if check.matters and check.state != "ok" else ""
            print(f"{check.state:8s}{check.name:20s}{check.found}{needed}", flush=True)
    if as_json:
        print(json.dumps([vars(check) for check in found], indent=1), flush=True)
    return found


if __name__ == "__main__":
    main()
