"""Members as processes of this machine: so many at a time, and one that is killed alone."""

import json
import os
import signal
import time

import pytest

from bt.engine import heartbeat
from launchers import local, states
from launchers.sweep import find
from tests.launchers.helpers import TINY, logged_steps, run, slow, start, steps, until

pytestmark = pytest.mark.cluster
LOCAL = ["tracking=none", "hydra/launcher=local"]


@pytest.mark.timeout(400)
def test_a_killed_member_does_not_end_the_others_and_goes_on(tmp_path, few_dir, monkeypatch):
    """Detached: the command returns at once, and the queue goes on without it."""
    monkeypatch.chdir(tmp_path)
    settings = [*steps(120), *slow(0.1), f"data.dir={few_dir}", *LOCAL, "hydra.launcher.max_parallel=2", "seed=0,1,2"]
    done = run("launchers", "submit", "--name", "three", *settings, cwd=tmp_path)
    assert done.returncode == 0 and "3 of 3 submitted" in done.stdout, done.stderr
    three = find("three")
    first, second, third = three.members.values()
    until(lambda: len(logged_steps(first.run_dir)) > 25 and len(logged_steps(second.run_dir)) > 2, 150, "two train")
    # The third waits for a place.
    assert states.of(three)[third.key].word == "waiting" and not (third.run_dir / "heartbeat.json").exists()
    os.kill(heartbeat.read(first.run_dir)["pid"], signal.SIGKILL)
    until(lambda: states.of(three)[first.key].word == "killed", 10, "the killed member is noticed")
    until(lambda: all(states.of(three)[m.key].word == "finished" for m in (second, third)), 200, "the others finish")
    shown = run("launchers", "status", "three", "--json", cwd=tmp_path)
    found = json.loads(shown.stdout)
    assert (found[first.key]["word"], found[first.key]["total"]) == ("killed", 120) and found[first.key]["step"] > 0
    again = run("launchers", "submit", "--name", "three", *settings, cwd=tmp_path)
    assert "1 of 3 submitted" in again.stdout, again.stderr
    until(lambda: states.of(three)[first.key].word == "running", 60, "it goes on")
    # Cancelling saves; after that the same again goes on from there.
    done = run("launchers", "cancel", "three", cwd=tmp_path)
    assert "cancelled 1 of 3" in done.stdout, done.stderr
    until(lambda: states.of(three)[first.key].word == "stopped", 30, "it has stopped")
    saved = json.loads((first.run_dir / "checkpoints/last/state.json").read_text())["step"]
    assert saved == logged_steps(first.run_dir)[-1]
    run("launchers", "retry", "three", first.key, cwd=tmp_path)
    until(lambda: states.of(three)[first.key].word == "finished", 100, "it finishes")
    assert all(logged_steps(member.run_dir) == list(range(1, 121)) for member in (first, second, third))
    logs = run("launchers", "logs", "three", first.key, "--lines=200", cwd=tmp_path).stdout
    assert f"continuing at step {saved}" in logs


@pytest.mark.timeout(300)
def test_in_the_foreground_one_fails_alone(tmp_path, few_dir):
    settings = [*TINY, f"data.dir={few_dir}", *LOCAL, "trainer.micro_batch=4,3"]
    done = run("bt.train", "-m", *settings, cwd=tmp_path)
    assert done.returncode == 1 and "1 finished, 1 failed" not in done.stdout
    assert "error in member trainer.micro_batch=3: failed: global_batch=8 is not a multiple" in done.stderr
    assert done.stderr.splitlines()[-1] == "error: 1 of the sweep's members failed"
    assert len(list(tmp_path.glob("sweeps/easy_vqa/*/report.json"))) == 1


@pytest.mark.timeout(300)
def test_ctrl_c_saves_what_runs(tmp_path, few_dir):
    settings = [*steps(5000), *slow(0.05), f"data.dir={few_dir}", *LOCAL, "hydra.launcher.max_parallel=1", "seed=0,1"]
    process = start("bt.train", "-m", *settings, cwd=tmp_path)
    (run_dir,) = until(lambda: [p.parent for p in tmp_path.glob("sweeps/*/*/metrics.jsonl")], 120, "the first trains")
    until(lambda: len(logged_steps(run_dir)) > 2, 30, "some steps")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and "stopped; the same command goes on from there" in err
    state = json.loads((run_dir / "checkpoints/last/state.json").read_text())
    assert state["step"] == logged_steps(run_dir)[-1] and heartbeat.read(run_dir)["state"] == "stopped"


def test_each_member_has_gpus_of_its_own(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3,4")
    assert local.slots({"max_parallel": None, "gpus_per_member": 2}) == [["0", "1"], ["2", "3"]]
    assert local.slots({"max_parallel": 1, "gpus_per_member": 2}) == [["0", "1"]]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(7))
    assert local.slots({"max_parallel": None, "gpus_per_member": 2}) == [[]] * 3


def test_a_queue_is_known_by_number_and_start():
    own = local.name_of(os.getpid())
    assert local.runs(own)
    host, pid, begun = own.rsplit(":", 2)
    assert not local.runs(f"{host}:{pid}:{int(begun) + 1}"), "another process of that number"
    assert local.runs(f"elsewhere:{pid}:{int(begun) + 1}"), "another machine's cannot be seen"
    assert time.time() > 0
