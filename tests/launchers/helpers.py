"""What the tests of the launchers share: commands as a user runs them, and waiting with a limit."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PLUGINS = Path(__file__).parent
TINY = ["experiment=easy_vqa", "trainer=smoke", "trainer.threads=1"]


def steps(count: int, every: int = 20) -> list[str]:
    """A run of so many steps, each a line of its journal, that saves now and then."""
    return [
        "experiment=easy_vqa", "encoder=tiny", "cross=tiny", "data.workers=0", "global_batch=8", "trainer.epochs=null",
        f"trainer.max_steps={count}", "trainer.log_every=1", "trainer.threads=1", f"checkpoint.every_steps={every}",
        "eval.every_epochs=null", f"eval.every_steps={count // 2}", "eval.max_samples=8", "eval.test=false",
    ]  # fmt: skip


def slow(seconds: float) -> list[str]:
    """So many seconds more for each step."""
    return [f"plugins=[{PLUGINS}]", "bridge._target_=slow_bridges.SlowBridge", f"+bridge.seconds={seconds}"]


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


def run(*words: object, cwd: Path, **around: str) -> subprocess.CompletedProcess:
    process = start(*words, cwd=cwd, **around)
    out, err = process.communicate(timeout=240)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def until(condition: Callable[[], Any], seconds: float, what: str) -> Any:
    """What `condition` returns once it is true."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.2)
    return value


def journal(run_dir: Path) -> list[dict]:
    path = run_dir / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def lines(run_dir: Path) -> list[dict]:
    """The journal without what depends on the time of day."""
    timing = ("time", "pairs_per_second", "data_wait_share")
    return [{k: v for k, v in line.items() if k not in timing} for line in journal(run_dir)]


def logged_steps(run_dir: Path) -> list[int]:
    return [line["step"] for line in journal(run_dir) if "vqa/train/loss" in line]
