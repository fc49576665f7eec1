"""A rank that dies, fails, runs out of memory or hangs ends the job with its name, host and step."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from bt.config import compose_run, prepare_run_dir

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


TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node=2"]


def lines(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_a_mistake_is_one_line_on_each_rank(tmp_path, few_dir):
    """One that all ranks see, and one that rank 0 alone sees."""
    settings = ["experiment=easy_vqa", "trainer=smoke", f"data.dir={few_dir}", "tracking=none"]
    other = prepare_run_dir(compose_run(*settings, "seed=3", f"run_dir={tmp_path}/other"))
    (tmp_path / "file").touch()
    logs = ["--redirects=3", f"--log-dir={tmp_path}/logs"]
    done = run(*TORCHRUN, *logs, "-m", "bt.train", "-m", *settings, f"run_dir={other},{tmp_path}/file/run")
    assert done.returncode == 1
    mistakes = [f"run_dir={other} holds a run of another configuration: seed: 3 -> 0"]
    mistakes.append(f"run_dir={tmp_path}/file/run cannot be written: Not a directory")
    whose = f"rank 0 on {socket.gethostname()}, starting: "
    for rank in (0, 1):
        (log,) = (tmp_path / "logs").glob(f"*/attempt_0/{rank}/stderr.log")
        expected = [mistakes[0], (whose if rank else "") + mistakes[1], "2 of the sweep's members failed"]
        said = log.read_text()
        found = [line for line in said.splitlines() if line.startswith("error")]
        assert [re.sub(r"error( in member .*?(other|file/run))?: ", "", line) for line in found] == expected, said
        assert "Traceback" not in said


@pytest.mark.timeout(600)  # five starts of two processes
def test_every_trouble_is_named_and_torchrun_comes_back_from_the_last_checkpoint(tmp_path, few_dir, command):
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
    status, said = command(*settings, f"run_dir={tmp_path}/alone")
    assert status == 0, said
    ranks = ["trainer.parallel=fsdp", "trainer.timeout_minutes=0.4", f"run_dir={tmp_path}/two"]
    done = run(*TORCHRUN, "--max-restarts=4", "-m", "bt.train", *settings, *ranks)
    assert done.returncode == 0, done.stderr
    where = f"rank 1 on {socket.gethostname()}"
    for message in (
        f"error: {where}, step 5, training: out of memory (CUDA out of memory. Tried to allocate 20.00 GiB.); less",
        f"error: {where}: the loss of itm is not finite at step 7; images: ",
        "error: no progress in 0.4 minutes (trainer.timeout_minutes): ",
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
