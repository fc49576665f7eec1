"""A rank that dies, fails, runs out of memory or hangs ends the job with its name, host and step."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# On rank 1, at another step each time that torchrun has started the ranks again.
TROUBLE = """
import os, signal, time
import torch
from bt.engine import watch
from bt.tasks.itm import ITM

TROUBLES = {0: (3, "killed"), 1: (5, "memory"), 2: (7, "nan"), 3: (9, "hangs")}


class TroubledITM(ITM):
    def forward(self, shared, targets):
        result = super().forward(shared, targets)
        step, trouble = TROUBLES.get(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 9)), (0, ""))
        if not self.training or os.environ.get("RANK") != "1" or watch._watch.state.step != step:
            return result
        if trouble == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if trouble == "memory":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        if trouble == "hangs":
            time.sleep(600)
        result.loss = result.loss * float("nan")
        return result
"""


def run(*command: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", *map(str, command)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=550,
    )


def lines(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.timeout(600)  # six starts of two processes
def test_every_trouble_is_named_and_torchrun_comes_back_from_the_last_checkpoint(tmp_path, few_dir):
    """Two ranks on shards, started again after each trouble of rank 1; in the end the losses of one process alone."""
    (tmp_path / "plugins").mkdir()
    (tmp_path / "plugins/trouble.py").write_text(TROUBLE)
    settings = [
        "experiment=easy_vqa_pretrain", f"data.dir={few_dir}", "encoder=tiny", "cross=tiny", "tracking=none",
        "encoder.text.dropout=0", "cross.dropout=0", "global_batch=8", "trainer.max_steps=10", "trainer.log_every=1",
        "checkpoint.every_steps=2", "checkpoint.keep=2", "eval.every_epochs=null", "eval.every_steps=5", "eval.batch=7",
        "eval.max_samples=7", "data.workers=0", "task.objectives.itm.negatives=sampled",
        f"plugins=[{tmp_path}/plugins]", "task.objectives.itm._target_=trouble.TroubledITM",
    ]  # fmt: skip
    alone = run("bt.train", *settings, f"run_dir={tmp_path}/alone")
    assert alone.returncode == 0, alone.stderr
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=4", "-m", "bt.train"]
    ranks = ["trainer.parallel=fsdp", "trainer.timeout_minutes=0.25", f"run_dir={tmp_path}/two"]
    done = run(*torchrun, *settings, *ranks)
    assert done.returncode == 0, done.stderr
    where = f"rank 1 on {socket.gethostname()}"
    for message in (
        f"error: {where}, step 5, training: out of memory (CUDA out of memory. Tried to allocate 20.00 GiB.); less",
        "error: out of memory (CUDA out of memory. Tried to allocate 20.00 GiB.); less is needed with a smaller tra",
        f"error: {where}: the loss of itm is not finite at step 7; images: ",
        "error: no progress in 0.25 minutes (trainer.timeout_minutes): ",
    ):
        assert message in done.stderr, (message, done.stderr)
    assert re.search(rf"error: lost at step 3: {where}, .* when last heard of \(killed, ", done.stderr)
    assert re.search(rf"{where}, step 9, training \(trouble\.py:\d+ forward\)", done.stderr), done.stderr
    for step in (2, 4, 6, 8):
        assert f"continuing at step {step} of 10" in done.stdout, done.stdout
    one, two = lines(tmp_path / "alone"), lines(tmp_path / "two")
    assert [line["step"] for line in one] == [line["step"] for line in two] and len(one) == 10 + 2
    for a, b in zip(one, two, strict=True):
        losses = {key: value for key, value in a.items() if key.split("/")[-1] in ("loss", "accuracy")}
        assert {key: b[key] for key in losses} == pytest.approx(losses, rel=1e-4) and losses
    kept = sorted(path.name for path in (tmp_path / "two/checkpoints").glob("step-*"))
    assert kept[-2:] == ["step-00000008", "step-00000010"] and len(kept) <= 3
