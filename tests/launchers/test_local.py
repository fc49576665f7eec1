"""Members as processes of this machine: so many at a time, and one that is killed alone."""

import json
import os
import signal
import time

import pytest
from mlflow import MlflowClient

from bt.engine import heartbeat
from launchers import local, states
from launchers.sweep import find
from tests.launchers.helpers import TINY, logged_steps, run, slow, start, steps, until

LOCAL = ["tracking=none", "hydra/launcher=local"]


@pytest.mark.timeout(900)
def test_members_are_killed_cancelled_and_submitted_again_one_by_one(tmp_path, few_dir, monkeypatch):
    """Detached: the command returns at once, and the queue goes on without it."""
    monkeypatch.chdir(tmp_path)
    gate, data = tmp_path / "gate", f"data.dir={few_dir}"
    settings = [*steps(60, every=2), *slow(2, gate), data, *LOCAL, "hydra.launcher.max_parallel=2", "seed=0,1,2"]

    def command(word: str, *words: str) -> str:
        done = run("launchers", word, *words, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "3 of 3 submitted" in command("submit", "--name", "three", *settings)
    three = find("three")
    first, second, third = three.members.values()

    def becomes(member, word: str) -> states.State:
        until(lambda: states.of(three)[member.key].word == word, f"{member.label} is {word}")
        return states.of(three)[member.key]

    until(lambda: all(len(logged_steps(m.run_dir)) > 3 for m in (first, second)), "two train")
    # The third waits for a place, and gets that of one that is killed.
    assert states.of(three)[third.key].word == "waiting" and not (third.run_dir / "heartbeat.json").exists()
    os.kill(heartbeat.read(first.run_dir)["pid"], signal.SIGKILL)
    becomes(first, "killed")
    becomes(third, "running")
    found = json.loads(command("status", "three", "--json"))[first.key]
    assert (found["word"], found["total"]) == ("killed", 60) and found["step"] > 0
    # Submitted again it waits for a place as well, although it has a queue of its own.
    assert "1 of 3 submitted" in command("submit", "--name", "three", *settings)
    queue = three.jobs()[first.key][-1]
    assert queue != three.jobs()[third.key][-1]
    time.sleep(5)
    assert local.runs(queue) and states.of(three)[first.key].word == "waiting"
    # One that is cancelled saves, and the others go on.
    until(lambda: len(logged_steps(third.run_dir)) > 1, "the third trains")
    assert "cancelled 1 of 1" in command("cancel", "three", third.key)
    becomes(third, "stopped")
    saved = json.loads((third.run_dir / "checkpoints/last/state.json").read_text())["step"]
    assert saved == logged_steps(third.run_dir)[-1]
    becomes(first, "running")
    assert states.of(three)[second.key].word == "running"
    # So does one that waits.
    assert "1 of 1 submitted" in command("retry", "three", third.key)
    becomes(third, "waiting")
    assert "cancelled 1 of 1" in command("cancel", "three", third.key)
    assert becomes(third, "stopped").why == "cancelled before it started"
    gate.touch()
    becomes(second, "finished")
    becomes(first, "finished")
    assert "1 of 3 submitted" in command("retry", "three")
    becomes(third, "finished")
    for member in (first, second, third):
        assert logged_steps(member.run_dir) == list(range(1, 61)), member.label
    assert f"continuing at step {saved}" in command("logs", "three", third.key, "--lines=200")


@pytest.mark.timeout(600)
def test_in_the_foreground_one_fails_alone(tmp_path, few_dir):
    settings = [*TINY, f"data.dir={few_dir}", "hydra/launcher=local", "trainer.micro_batch=4,3"]
    done = run("bt.train", "-m", *settings, cwd=tmp_path)
    assert done.returncode == 1
    assert "error in member trainer.micro_batch=3: failed: global_batch=8 is not a multiple" in done.stderr
    assert done.stderr.splitlines()[-1] == "error: 1 of the sweep's members failed"
    assert len(list(tmp_path.glob("sweeps/easy_vqa/*/report.json"))) == 1
    # Both have ended in MLflow too, which they were in before they started, and with them the sweep.
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    runs = client.search_runs([one.experiment_id for one in client.search_experiments()])
    found = sorted(("mlflow.parentRunId" in run.data.tags, run.info.status) for run in runs)
    assert found == [(False, "FAILED"), (True, "FAILED"), (True, "FINISHED")]


@pytest.mark.timeout(600)
def test_ctrl_c_saves_what_runs(tmp_path, few_dir):
    settings = [*steps(5000), *slow(0.5, tmp_path / "gate"), f"data.dir={few_dir}", *LOCAL, "seed=0,1"]
    process = start("bt.train", "-m", *settings, "hydra.launcher.max_parallel=1", cwd=tmp_path)
    (run_dir,) = until(lambda: [p.parent for p in tmp_path.glob("sweeps/*/*/metrics.jsonl")], "the first trains")
    until(lambda: len(logged_steps(run_dir)) > 2, "some steps")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=200)
    assert process.returncode == 1 and "stopped; the same command goes on from there" in err
    state = json.loads((run_dir / "checkpoints/last/state.json").read_text())
    assert state["step"] == logged_steps(run_dir)[-1] and heartbeat.read(run_dir)["state"] == "stopped"
    assert len(list(tmp_path.glob("sweeps/*/*/heartbeat.json"))) == 1, "the second was not started"


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
