"""Sweeps on a real SLURM of two nodes: real sbatch, preemption, time limits, a node that dies.

In this order: the first tests look at what the fixture `submitted` has sent off, because a job's start takes seconds.
No test depends on the machine's speed: slow members wait for the file `gate` of their sweep (helpers.slow).
"""

import json
import os
import random
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient

from launchers import states
from launchers.sweep import Member, Sweep, find, read
from tests.launchers.helpers import (
    TINY,
    check_same,
    finish,
    journal,
    lines,
    logged_steps,
    run,
    slow,
    start,
    steps,
    until,
)

pytestmark = pytest.mark.timeout(1200)
SECRET = "hunter2"
# Passed on literally: as an option of sbatch, and as a value of the configuration.
EVIL = 'it\'s a "job" $(touch {mark})'
STEPS = 150


def quoted(text: str) -> str:
    """A value in Hydra's grammar."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def on(node: str) -> str:
    return f"+hydra.launcher.additional_parameters.nodelist={node}"


def heartbeat(member: Member) -> dict:
    return json.loads((member.run_dir / "heartbeat.json").read_text())


def becomes(sweep: Sweep, member: Member, word: str) -> states.State:
    until(lambda: states.of(sweep)[member.key].word == word, f"{member.label} is {word}")
    return states.of(sweep)[member.key]


def without_jobs(words: list[str]) -> list[str]:
    """The settings of runs, without what says how they are submitted."""
    return [word for word in words if not word.removeprefix("+").startswith("hydra")]


class Submitted:
    """What has been submitted in the directory `root`, each to one sweep."""

    def __init__(self, root: Path, data: Path, port: int):
        self.root, self.port, self.mark = root, port, root / "mark"
        self.store = {"BT_TEST_STORE": f"http://user:{SECRET}@127.0.0.1:{port}"}
        evil = EVIL.format(mark=self.mark)
        # Six members, two at a time, whose MLflow server is down; the one with micro-batches of 3 fails in its job.
        self.six = [
            *TINY, f"data.dir={data}", "trainer.micro_batch=8,4,3,2,1,null", "hydra/launcher=slurm", on("n2"),
            "hydra.launcher.array_parallelism=2", f"hydra.launcher.name={quoted(evil)}",
            "tracking.uri=${oc.env:BT_TEST_STORE}", f"tracking.experiment={quoted(evil)}",
        ]  # fmt: skip
        self.data = data
        self.limited_store = f"sqlite:///{root}/limited.db"
        self.limited = [
            *self.training("limited"), on("n1"), "hydra.launcher.timeout_min=2", "hydra.launcher.signal_delay_s=5",
            f"tracking.uri={self.limited_store}", "tracking.system_metrics=true", "data.workers=1",
        ]  # fmt: skip
        self.pair = [*self.training("pair"), on("n2"), "seed=0,1", "hydra.sweep.dir=sweeps/pair", "tracking=none"]
        self.two = [*self.training("two"), "hydra.launcher.nodes=2", "tracking=none"]  # and seeds

    def gate(self, name: str) -> Path:
        return self.root / f"gate-{name}"

    def training(self, name: str) -> list[str]:
        """A second and more for each step, as long as the gate is not there."""
        words = [*steps(STEPS, every=2), *slow(1, self.gate(name)), f"data.dir={self.data}"]
        return [*words, "hydra/launcher=slurm"]

    def submit(self, name: str, overrides: list[str]) -> subprocess.CompletedProcess:
        return run("launchers", "submit", "--name", name, *overrides, cwd=self.root, **self.store)


@pytest.fixture(scope="module")
def submitted(cluster, tmp_path_factory, few_dir):
    root = tmp_path_factory.mktemp("sweeps")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    made = Submitted(root, few_dir, port)
    before = os.umask(0o027)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(root)
            made.answer = made.submit("six", made.six)
            assert made.answer.returncode == 0, made.answer.stderr
            # The command has returned at once.
            assert not all(state.ended for state in states.of(find("six")).values())
            limited = made.submit("limited", made.limited)
            assert limited.returncode == 0, limited.stderr
            yield made
    finally:
        os.umask(before)


def test_six_members_two_at_a_time(submitted, cluster):
    """One fails in its job alone; the store comes up in the middle; no secret is written, and no word is a command."""
    assert "6 of 6 submitted" in submitted.answer.stdout
    six = find("six")
    jobs = [entries[-1] for entries in six.jobs().values()]
    assert len({job.split("_")[0] for job in jobs}) == 1, "one array"
    most = 0

    def running() -> int:
        found = cluster.command("squeue", "-h", "-r", "-t", "running", "-j", jobs[0].split("_")[0], "-o", "%i|%j")
        rows = [row for row in found.splitlines() if row]
        assert all(row.split("|")[1] == EVIL.format(mark=submitted.mark) for row in rows), rows
        return len(rows)

    server = None
    try:
        found = states.of(six)
        while not all(state.ended for state in found.values()):
            most = max(most, running())
            if server is None and sum(state.word == "finished" for state in found.values()) >= 2:
                server = mlflow_server(submitted)
            time.sleep(0.5)
            found = states.of(six)
        server = server or mlflow_server(submitted)
        assert most <= 2
        check_six(submitted, six, found)
    finally:
        if server:
            os.killpg(server.pid, signal.SIGTERM)
            server.wait()


def check_six(submitted, six, found) -> None:
    words = {six.members[key].label: state.word for key, state in found.items()}
    assert words.pop("trainer.micro_batch=3") == "failed" and set(words.values()) == {"finished"} and len(words) == 5
    shown = run("launchers", "status", "six", cwd=submitted.root).stdout
    assert "(trainer.micro_batch=3) failed: global_batch=8 is not a multiple of 1 ranks x" in shown
    assert "5 finished, 1 failed" in shown and "3/3" in shown and "vqa/val/score" in shown
    logs = run("launchers", "logs", "six", cwd=submitted.root).stdout
    assert logs.count("finished; ") == 5 and "error: global_batch=8" in logs
    # What the store missed arrives, each point once, in one run per member below the sweep's.
    sent = run("launchers", "sync", "six", cwd=submitted.root, **submitted.store)
    assert sent.returncode == 0, sent.stderr
    client = MlflowClient(f"http://127.0.0.1:{submitted.port}")
    experiment = client.get_experiment_by_name(EVIL.format(mark=submitted.mark)).experiment_id
    runs = client.search_runs([experiment])
    parents = [r for r in runs if "mlflow.parentRunId" not in r.data.tags]
    assert [r.info.run_name for r in parents] == ["six"] and parents[0].info.status == "FINISHED"
    children = {json.loads((m.run_dir / "tracking.json").read_text()).get("run_id"): m for m in six.members.values()}
    children.pop(None)  # the one that failed had nothing to send
    assert {r.info.run_id for r in runs} - {parents[0].info.run_id} == set(children) and len(children) == 5
    for run_id, member in children.items():
        tracked = client.get_run(run_id)
        assert tracked.data.tags["mlflow.parentRunId"] == parents[0].info.run_id and tracked.info.status == "FINISHED"
        points = [(p.step, p.value) for p in client.get_metric_history(run_id, "vqa/train/loss")]
        wanted = [(line["step"], line["vqa/train/loss"]) for line in journal(member.run_dir) if "lr/base" in line]
        assert sorted(points) == wanted and len(wanted) == 3
    check_files(submitted, six)


def check_files(submitted, six) -> None:
    assert not submitted.mark.exists()
    files = [path for path in six.dir.rglob("*") if not path.is_symlink()]
    scripts = [path for path in files if path.name.endswith("_submission.sh")]
    assert len(scripts) == 1 and len(files) > 60
    for path in submitted.root.rglob("server/**/*"):
        assert path.is_dir() or SECRET.encode() not in path.read_bytes(), path
    for path in files:
        assert not stat.S_IMODE(path.stat().st_mode) & 0o027, f"{path} has not the umask's mode"
        assert path.is_dir() or SECRET.encode() not in path.read_bytes(), path
    assert "${oc.env:BT_TEST_STORE}" in (next(iter(six.members.values())).run_dir / "config.yaml").read_text()


def mlflow_server(submitted) -> subprocess.Popen:
    where = submitted.root / "server"
    where.mkdir()
    words = [
        sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(submitted.port),
        "--workers", "1", "--backend-store-uri", f"sqlite:///{where}/mlflow.db",
        "--artifacts-destination", str(where / "files"),
    ]  # fmt: skip
    with open(where / "log", "w") as log:
        server = subprocess.Popen(words, cwd=where, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)

    def answers() -> bool:
        assert server.poll() is None, (where / "log").read_text()
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", submitted.port)) == 0

    until(answers, "the MLflow server answers")
    return server


def test_what_slurm_refuses_is_one_line(submitted, cluster):
    words = [*TINY, f"data.dir={submitted.data}", "tracking=none", "hydra/launcher=slurm"]
    answer = submitted.submit("refused", [*words, "hydra.launcher.partition=nosuch"])
    assert answer.returncode == 1 and len(answer.stderr.splitlines()) == 1, answer.stderr
    assert answer.stderr.startswith("error: sbatch refuses: ") and "invalid partition" in answer.stderr
    assert not find("refused").jobs()


def test_the_same_sweep_again_submits_only_what_is_missing(submitted, cluster):
    # Held, so that it is there to be cancelled.
    again = submitted.submit("six", [*submitted.six, "+hydra.launcher.additional_parameters.hold=true"])
    assert again.returncode == 0 and "1 of 6 submitted" in again.stdout, again.stderr
    assert again.stdout.count("finished") == 5 and again.stdout.count("submitted again") == 1
    six = find("six")
    member = next(member for member in six.members.values() if member.label == "trainer.micro_batch=3")
    assert becomes(six, member, "waiting").why == "JobHeldUser"
    done = run("launchers", "cancel", "six", cwd=submitted.root)
    assert done.returncode == 0 and "cancelled 1 of 6" in done.stdout, done.stderr
    becomes(six, member, "cancelled")


def test_a_sweep_is_read_as_it_was_written(submitted):
    assert read(submitted.root / "sweeps/six") == find("six") and len(find("six").members) == 6


def turns(text: str) -> tuple[list[int], list[int]]:
    """Steps at which a run says that it stopped, and those at which it says that it goes on."""
    stopped = text.split("stopped by a signal after step ")[1:]
    continued = text.split("continuing at step ")[1:]
    return [int(part.split(";")[0]) for part in stopped], [int(part.split()[0]) for part in continued]


def output(sweep: Sweep, job: str) -> str:
    """What rank 0 of a job has printed, in all its attempts."""
    files = sorted(Path(sweep.dir, ".submitit", job).glob("*_log.out"))
    return files[0].read_text() if files else ""


def retry(submitted, word: str, *words: str) -> None:
    done = run("launchers", word, *words, cwd=submitted.root)
    assert done.returncode == 0 and "1 of 2 submitted" in done.stdout, done.stderr


def test_a_killed_member_is_shown_and_a_dead_node_is_survived(submitted, cluster):
    """A multirun in the foreground: it neither waits for ever nor ends the other member."""
    waiting = start("bt.train", "-m", *submitted.pair, cwd=submitted.root)
    try:
        until(lambda: (submitted.root / "sweeps/pair/jobs.json").exists(), "the pair is submitted")
        pair = find("pair")
        killed, moved = pair.members.values()
        for member in (killed, moved):
            until(lambda m=member: len(logged_steps(m.run_dir)) > 3, f"{member.label} has saved")
        (job,), (moved_job,) = pair.jobs()[killed.key], pair.jobs()[moved.key]
        cluster.command("scancel", "--signal=KILL", job)
        until(lambda: states.of(pair)[killed.key].ended, "the killed member is noticed")
        # SLURM sends SIGTERM before, and the run may have had the time to save. It must not requeue itself then.
        assert states.of(pair)[killed.key].word in ("cancelled", "killed") and heartbeat(killed)["step"] > 3
        cluster.script("stop-node", "n2")
        before = len(logged_steps(moved.run_dir))
        submitted.gate("pair").touch()
        words = ["-m", *without_jobs(submitted.pair), "hydra.sweep.dir=sweeps/whole"]
        whole = start("bt.train", *words, cwd=submitted.root)
        until(lambda: "down" in cluster.command("sinfo", "-h", "-n", "n2", "-o", "%T"), "n2 is down")
        becomes(pair, moved, "requeued")
        cluster.command("scontrol", "update", f"jobid={moved_job}", "reqnodelist=n1")
        becomes(pair, moved, "finished")
        ended = finish(waiting)
        assert ended.returncode == 1 and "error in member seed=0: " in ended.stderr, ended.stderr
        assert ended.stderr.splitlines()[-1] == "error: 1 of the sweep's members failed"
    finally:
        waiting.kill()
    beat = heartbeat(moved)
    assert (beat["state"], beat["attempt"], beat["step"], beat["job"]) == ("finished", 1, STEPS, moved_job)
    (resumed,) = turns(output(pair, moved_job))[1]
    assert resumed % 2 == 0 and before - 5 < resumed <= before
    cluster.script("start-node", "n2")
    continue_killed(submitted, pair, killed)
    done = finish(whole)
    assert done.returncode == 0, done.stderr
    for member in (killed, moved):
        check_same(member.run_dir, submitted.root / "sweeps/whole" / member.key)


def continue_killed(submitted, pair: Sweep, killed: Member) -> None:
    """`retry` goes on with it, and when it is killed again, the same command."""
    submitted.gate("pair").unlink()
    step = heartbeat(killed)["step"]
    retry(submitted, "retry", "pair")
    until(lambda: len(logged_steps(killed.run_dir)) > step + 2, "it has gone on")
    os.kill(heartbeat(killed)["pid"], signal.SIGKILL)  # as for lack of memory
    state = becomes(pair, killed, "killed")
    assert state.why == "ended without a word (SLURM: FAILED)" and state.step > step
    submitted.gate("pair").touch()
    retry(submitted, "submit", *submitted.pair)
    becomes(pair, killed, "finished")
    assert [len(jobs) for jobs in pair.jobs().values()] == [3, 1]
    (resumed,) = turns(output(pair, pair.jobs()[killed.key][-1]))[1]
    assert resumed >= step


def test_a_time_limit_shorter_than_the_run(submitted, cluster):
    """Requeued until finished, although Submitit counts signals in jobs of ten minutes and less as time-outs."""
    limited = find("limited")
    (member,) = limited.members.values()
    (job,) = limited.jobs()[member.key]
    until(lambda: turns(output(limited, job))[1], "it has gone on after its time was up")
    submitted.gate("limited").touch()
    becomes(limited, member, "finished")
    assert logged_steps(member.run_dir) == list(range(1, STEPS + 1))
    beat = heartbeat(member)
    assert beat["attempt"] >= 1 and beat["job"] == job
    text = output(limited, job)
    assert text.count("requeueing job") == beat["attempt"]
    # Nothing is lost: each attempt goes on where the one before said that it stopped.
    stopped, continued = turns(text)
    # A signal before the first step or after the last one finds nothing to save.
    assert stopped and stopped == [step for step in dict.fromkeys(continued) if step < STEPS]
    # All attempts are one run in MLflow, with each point once.
    client = MlflowClient(submitted.limited_store)
    (experiment,) = [one for one in client.search_experiments() if one.name == "bt"]
    runs = client.search_runs([experiment.experiment_id])
    assert sorted(("mlflow.parentRunId" in r.data.tags, r.info.status) for r in runs) == [
        (False, "FINISHED"),
        (True, "FINISHED"),
    ]
    run_id = json.loads((member.run_dir / "tracking.json").read_text())["run_id"]
    for key in ("vqa/train/loss", "system/cpu_percent"):
        points = [(p.step, p.value) for p in client.get_metric_history(run_id, key)]
        assert sorted(points) == [(line["step"], line[key]) for line in journal(member.run_dir) if key in line], key
        assert len(points) == STEPS


def test_two_nodes_pre_empted_at_a_random_moment_give_the_same_bits(submitted, cluster):
    """An array of two jobs of a rank on each node, by SLURM's variables; `high` takes both nodes away in the middle.

    Two, because the last task of an array has the array's own number for its $SLURM_JOB_ID.
    """
    answer = submitted.submit("two", [*submitted.two, "seed=0,1"])
    assert answer.returncode == 0, answer.stderr
    two = find("two")
    members = list(two.members.values())
    step = random.randrange(3, 12)
    until(lambda: all(len(logged_steps(m.run_dir)) >= step for m in members), f"step {step}")
    time.sleep(random.random())
    cluster.command("sbatch", "-p", "high", "-N2", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 1")
    for member in members:
        until(lambda m=member: heartbeat(m)["attempt"] == 1, "it starts again")
    submitted.gate("two").touch()
    words = ["-m", "bt.train", *without_jobs(submitted.two), "seed=0", "run_dir=whole"]
    whole = run("torch.distributed.run", "--standalone", "--nproc-per-node=2", *words, cwd=submitted.root)
    assert whole.returncode == 0, whole.stderr
    for member in members:
        becomes(two, member, "finished")
        # Both nodes took part, and what was done between the checkpoint and the preemption was not done twice.
        job = two.jobs()[member.key][-1]
        assert (heartbeat(member)["attempt"], heartbeat(member)["job"]) == (1, job)
        outputs = sorted(Path(two.dir, ".submitit", job).glob("*_log.out"))
        assert len(outputs) == 2 and "node=1(2)" in outputs[1].read_text()
        stopped, continued = turns(outputs[0].read_text())
        assert stopped == continued and len(stopped) == 1
        assert json.loads((member.run_dir / "report.json").read_text())["world_size"] == 2
    check_same(members[0].run_dir, submitted.root / "whole")
    assert len(lines(members[0].run_dir)) == STEPS + 2 and logged_steps(members[1].run_dir) == list(range(1, STEPS + 1))
