"""What the tests of the launchers share: commands as a user runs them, and waiting with a limit."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
PLUGINS = Path(__file__).parent
TINY = ["experiment=easy_vqa", "trainer=smoke", "trainer.threads=1"]
PATIENCE = 600  # seconds; slurmctld itself may take four minutes to let go of what ran on a dead node


def steps(count: int, every: int = 20) -> list[str]:
    """A run of so many steps, each a line of its journal, that saves now and then."""
    return [
        "experiment=easy_vqa", "encoder=tiny", "cross=tiny", "data.workers=0", "global_batch=8", "trainer.epochs=null",
        f"trainer.max_steps={count}", "trainer.log_every=1", "trainer.threads=1", f"checkpoint.every_steps={every}",
        "eval.every_epochs=null", f"eval.every_steps={count // 2}", "eval.max_samples=8", "eval.test=false",
    ]  # fmt: skip


def slow(seconds: float, gate: Path) -> list[str]:
    """So many seconds more for each step, until the file `gate` is there: no test depends on the machine's speed."""
    bridge = ["bridge._target_=slow_bridges.SlowBridge", f"+bridge.seconds={seconds}", f"+bridge.gate={gate}"]
    return [f"plugins=[{PLUGINS}]", *bridge]


def start(*words: object, cwd: Path, start_new_session: bool = False, **around: str) -> subprocess.Popen:
    """`python -m WORDS` in a directory."""
    return subprocess.Popen(
        [sys.executable, "-m", *map(str, words)],
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | around,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=start_new_session,
    )


def finish(process: subprocess.Popen) -> subprocess.CompletedProcess:
    """Its end, with what it has said."""
    try:
        out, err = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def run(*words: object, cwd: Path, **around: str) -> subprocess.CompletedProcess:
    return finish(start(*words, cwd=cwd, **around))


def until(condition: Callable[[], Any], what: str) -> Any:
    """What `condition` returns once it is true."""
    deadline = time.monotonic() + PATIENCE
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {PATIENCE} s: {what}"
        time.sleep(0.2)
    return value


def journal(run_dir: Path) -> list[dict]:
    path = run_dir / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def lines(run_dir: Path) -> list[dict]:
    """The journal without what depends on the time of day."""
    timing = ("time", "pairs_per_second", "data_wait_share")
    return [
        {key: value for key, value in line.items() if key not in timing and not key.startswith("system/")}
        for line in journal(run_dir)
    ]


def logged_steps(run_dir: Path) -> list[int]:
    return [line["step"] for line in journal(run_dir) if "vqa/train/loss" in line]


def check_same(interrupted: Path, whole: Path) -> None:
    """The same lines, metrics and weights, bit for bit, as a run that nothing has interrupted."""
    assert lines(interrupted) == lines(whole)
    reports = [json.loads((run_dir / "report.json").read_text())["metrics"] for run_dir in (interrupted, whole)]
    assert reports[0] == reports[1]
    for part in ("model", "optimizer"):
        file = f"checkpoints/last/{part}.safetensors"
        one, other = load_file(interrupted / file), load_file(whole / file)
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
