"""`make soak`: interrupted again and again, a run is the unbroken one bit for bit."""

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest

from launchers import states
from launchers.sweep import find
from tests.launchers.helpers import check_same, logged_steps, run, slow, start, steps, until

pytestmark = pytest.mark.soak


@pytest.mark.timeout(1500)
@pytest.mark.parametrize("nodes", [1, 2])
def test_five_preemptions(cluster, tmp_path, few_dir, monkeypatch, nodes):
    """At random moments of a job's life, its first second included."""
    monkeypatch.chdir(tmp_path)
    gate = tmp_path / "gate"
    settings = [*steps(400, every=10), *slow(0.5, gate), f"data.dir={few_dir}", "tracking=none"]
    words = ["hydra/launcher=slurm", f"hydra.launcher.nodes={nodes}"]
    done = run("launchers", "submit", "--name", "soak", *settings, *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    sweep = find("soak")
    (member,) = sweep.members.values()
    (job,) = sweep.jobs()[member.key]

    def field(form: str) -> str:
        return cluster.command("squeue", "-h", "-t", "all", "-j", job, "-o", form)

    for count in range(5):
        until(lambda: field("%T") == "RUNNING", "the job runs")
        # The first within the first second, before Python has a handler; the others as they come.
        time.sleep(random.uniform(0, 1) if count == 0 else random.uniform(0, 20))
        cluster.command("sbatch", "-W", "-p", "high", "-N2", "--exclusive", "-o", "/dev/null", "--wrap", "true")
        print(f"preemption {count + 1} at step {(logged_steps(member.run_dir) or [0])[-1]}")
    gate.touch()
    until(lambda: states.of(sweep)[member.key].word == "finished", "the run has finished")
    assert json.loads((member.run_dir / "heartbeat.json").read_text())["attempt"] == 5
    ranks = ["--standalone", f"--nproc-per-node={nodes}"]
    whole = run("torch.distributed.run", *ranks, "-m", "bt.train", *settings, "run_dir=whole", cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    check_same(member.run_dir, tmp_path / "whole")


@pytest.mark.timeout(1500)
def test_the_second_node_of_a_job_fails(cluster, tmp_path, few_dir, monkeypatch):
    """As in a power cut: the rank that is left waits until SLURM knows, and the job goes on with two nodes again."""
    monkeypatch.chdir(tmp_path)
    gate = tmp_path / "gate"
    settings = [*steps(100, every=10), *slow(0.5, gate), f"data.dir={few_dir}", "tracking=none"]
    words = ["hydra/launcher=slurm", "hydra.launcher.nodes=2"]
    done = run("launchers", "submit", "--name", "cut", *settings, *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    sweep = find("cut")
    (member,) = sweep.members.values()
    (job,) = sweep.jobs()[member.key]
    until(lambda: len(logged_steps(member.run_dir)) > 12, "it has saved")
    cluster.script("stop-node", "n2")
    try:
        until(lambda: states.of(sweep)[member.key].word == "requeued", "SLURM has put the job back")
        (output,) = (path.read_text() for path in Path(sweep.dir, ".submitit", job).glob("*_0_log.out"))
        assert "lost at step " in output and ": rank 1 on " in output and "; waiting 80 s for SLURM" in output
    finally:
        time.sleep(60)  # see slurm_local.sh
        cluster.script("start-node", "n2")
    gate.touch()
    until(lambda: states.of(sweep)[member.key].word == "finished", "the run has finished")
    assert json.loads((member.run_dir / "heartbeat.json").read_text())["attempt"] == 1
    ranks = ["--standalone", "--nproc-per-node=2"]
    whole = run("torch.distributed.run", *ranks, "-m", "bt.train", *settings, "run_dir=whole", cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    check_same(member.run_dir, tmp_path / "whole")


@pytest.mark.timeout(3000)
def test_fifty_sigkills(tmp_path, few_dir):
    """Of a plain run with two loader workers, in the middle of whatever it does."""
    gate = tmp_path / "gate"
    settings = [*steps(900, every=3), *slow(0.02, gate), f"data.dir={few_dir}", "tracking=none", "data.workers=2"]
    kills = 0
    while kills < 50:
        before = len(logged_steps(tmp_path / "killed"))
        process = start("bt.train", *settings, "run_dir=killed", cwd=tmp_path, start_new_session=True)
        if kills % 5 == 4:
            time.sleep(random.uniform(0, 12))  # while it starts, too
        else:
            goal, deadline = min(before + random.randrange(1, 18), 890), time.monotonic() + 90
            while len(logged_steps(tmp_path / "killed")) < goal and time.monotonic() < deadline:
                time.sleep(0.05)
            time.sleep(random.uniform(0, 0.2))
        assert process.poll() is None, process.communicate()
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        kills += 1
    gate.touch()
    for name in ("killed", "whole"):
        done = run("bt.train", *settings, f"run_dir={name}", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    check_same(tmp_path / "killed", tmp_path / "whole")
    assert not [path.name for path in (tmp_path / "killed/checkpoints").iterdir() if "saving" in path.name]
