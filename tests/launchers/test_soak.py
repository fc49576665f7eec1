"""`make soak`: interrupted again and again, a run is the unbroken one bit for bit."""

import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from launchers import states
from launchers.sweep import find
from tests.launchers.helpers import lines, logged_steps, run, slow, start, steps, until

pytestmark = pytest.mark.soak


def check_same(interrupted: Path, whole: Path) -> None:
    assert lines(interrupted) == lines(whole)
    reports = [json.loads((run_dir / "report.json").read_text())["metrics"] for run_dir in (interrupted, whole)]
    assert reports[0] == reports[1]
    for part in ("model", "optimizer"):
        file = f"checkpoints/last/{part}.safetensors"
        one, other = load_file(interrupted / file), load_file(whole / file)
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.timeout(1500)
@pytest.mark.parametrize("nodes", [1, 2])
def test_five_preemptions(cluster, tmp_path, few_dir, monkeypatch, nodes):
    """At random moments of a job's life, its first second included."""
    monkeypatch.chdir(tmp_path)
    settings = [*steps(400, every=50), *slow(0.05), f"data.dir={few_dir}", "tracking=none"]
    words = ["hydra/launcher=slurm", f"hydra.launcher.nodes={nodes}"]
    done = run("launchers", "submit", "--name", "soak", *settings, *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    sweep = find("soak")
    (member,) = sweep.members.values()
    (job,) = sweep.jobs()[member.key]

    def field(form: str) -> str:
        return cluster.command("squeue", "-h", "-t", "all", "-j", job, "-o", form)

    for count in range(5):
        until(lambda: field("%T") == "RUNNING", 120, "the job runs")
        # The first within the first second, before Python has a handler; the others as they come.
        time.sleep(random.uniform(0, 1) if count == 0 else random.uniform(0, 15))
        cluster.command("sbatch", "-W", "-p", "high", "-N2", "--exclusive", "-o", "/dev/null", "--wrap", "true")
        print(f"preemption {count + 1} at step {(logged_steps(member.run_dir) or [0])[-1]}")
    whole = run("torch.distributed.run", "--standalone", f"--nproc-per-node={nodes}", "-m", "bt.train", *settings,
                "run_dir=whole", cwd=tmp_path)  # fmt: skip
    assert whole.returncode == 0, whole.stderr
    until(lambda: states.of(sweep)[member.key].word == "finished", 200, "the run has finished")
    assert json.loads((member.run_dir / "heartbeat.json").read_text())["attempt"] == 5
    check_same(member.run_dir, tmp_path / "whole")


@pytest.mark.timeout(3000)
def test_fifty_sigkills(tmp_path, few_dir):
    """Of a plain run with two loader workers, in the middle of whatever it does."""
    settings = [*steps(900, every=3), *slow(0.02), f"data.dir={few_dir}", "tracking=none", "data.workers=2"]
    kills = 0
    while kills < 50:
        before = len(logged_steps(tmp_path / "killed"))
        process = start("bt.train", *settings, "run_dir=killed", cwd=tmp_path, start_new_session=True)
        if kills % 5 == 4:
            time.sleep(random.uniform(0, 12))  # while it starts, too
        else:
            goal, deadline = min(before + random.randrange(1, 25), 895), time.monotonic() + 90
            while len(logged_steps(tmp_path / "killed")) < goal and time.monotonic() < deadline:
                time.sleep(0.05)
            time.sleep(random.uniform(0, 0.2))
        assert process.poll() is None, process.communicate()
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        kills += 1
    for name in ("killed", "whole"):
        done = run("bt.train", *settings, f"run_dir={name}", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    check_same(tmp_path / "killed", tmp_path / "whole")
    assert subprocess.run(["ls", tmp_path / "killed/checkpoints"], capture_output=True).stdout.count(b"saving") == 0
